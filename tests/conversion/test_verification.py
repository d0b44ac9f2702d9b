"""The report of a converted folder, for each kind of folder that a converter writes."""

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model, tiny_processor
from tiny_onecat import tiny_onecat_model, tiny_onecat_processor
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

from transformers_nextflow.conversion.verification import fixed_image, verify


MAKE = {
    "nextflow": (tiny_model, tiny_processor),
    "tokenflow_t2i": (tiny_t2i_model, tiny_t2i_processor),
    "onecat": (tiny_onecat_model, tiny_onecat_processor),
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_report_tells_what_a_model_draws_edits_answers_and_keeps(kind, tmp_path):
    model, processor = (make() for make in MAKE[kind])
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    report = verify(tmp_path / "ours", device="cpu", steps=2)
    assert report.startswith(f"{kind}: {len(model.state_dict())} tensors")
    assert ("edited" in report and "answers" in report) == (kind != "tokenflow_t2i")
    assert "drawn 0.png" in report and " dB" in report
    assert (tmp_path / "ours-verified" / "report.txt").read_text() == report + "\n"
    assert Image.open(tmp_path / "ours-verified" / "0.png").width in (16, 32, 64)

    def plain(text):
        return [line.rsplit(",", 1)[0] for line in text.splitlines()]

    assert plain(verify(tmp_path / "ours", device="cpu", steps=2)) == plain(report)


def test_a_tokenizer_is_read_and_written(tmp_path):
    tiny_model().vq_model.save_pretrained(tmp_path / "ours")
    report = verify(tmp_path / "ours", device="cpu")
    assert report.startswith("nextflow_vq: ") and "16x16 pixels in 30 codes" in report


def test_the_fixed_image_is_the_same_everywhere():
    pixels = np.asarray(fixed_image(16))
    assert (
        pixels[8, 8].tolist() == [255, 0, 0] and pixels[0, 0].tolist() == [64, 64, 128] and pixels.shape == (16, 16, 3)
    )
