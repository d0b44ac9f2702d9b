"""The bundled emoji checkpoint: small enough for a clone, with its licences, and it says what it knows."""

import warnings
from pathlib import Path

import pytest
import torch

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.vision_tokenizer.resampling import resample


FOLDER = Path(__file__).parents[2] / "checkpoints" / "nextflow-emoji"
DECODER = FOLDER.with_name("nextflow-emoji-decoder")
PROMPTS = ("a rocket, 3d style", "Rocket", "panda emoji", "a noto castle on a pink background", "draw a cat")


@pytest.fixture(scope="module")
def pipe() -> NextFlowPipeline:
    pipe = NextFlowPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_takes_at_most_48_mib_and_names_the_licences_of_its_drawings():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 48 * 2**20
    for name in ("README.md", "NOTICE"):
        text = (FOLDER / name).read_text()
        assert all(f'style "{style}"' in text for style in ("flat", "noto", "3d"))
        assert "twemoji" not in text and "CC-BY" not in text.split("CC-BY-4.0: https")[0]


def test_its_diffusion_decoder_is_small_and_makes_sharper_images_from_the_same_codes(pipe):
    assert sum(path.stat().st_size for path in DECODER.iterdir()) <= 24 * 2**20 and (DECODER / "NOTICE").is_file()
    decoding = NextFlowPipeline.from_pretrained(FOLDER, diffusion_decoder=DECODER)
    decoding.set_progress_bar_config(disable=True)

    def draw(pipe, count=2, **options):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return pipe(list(PROMPTS[:count]), generator=seeds, output_type="pt", **options)

    plain, sharp = draw(pipe), draw(decoding, decoder="diffusion")
    assert torch.equal(plain.image_tokens, sharp.image_tokens) and sharp.images.shape == (2, 3, 128, 128)
    torch.testing.assert_close(draw(decoding, 1, decoder="diffusion").images[0], sharp.images[0], atol=1e-4, rtol=0)
    enlarged = resample(plain.images, (128, 128), "bicubic")
    # It is the same drawing, with more of its edges.
    assert (enlarged - sharp.images).square().mean() < 0.01
    assert sharp.images.diff(dim=-1).square().mean() > 1.3 * enlarged.diff(dim=-1).square().mean()


def test_it_draws_what_it_knows_without_a_warning_and_the_same_image_for_a_seed(pipe):
    def draw():
        return pipe(list(PROMPTS), generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = draw(), draw()
    assert torch.equal(first.image_tokens, second.image_tokens)
    assert {image.size for image in first.images} == {(64, 64)}


@pytest.mark.parametrize(("prompt", "said"), [("a dragon", "'dragon'"), ("three cats", "three cats")])
def test_it_warns_of_what_it_does_not_know(pipe, prompt, said):
    pipe.__dict__.pop("_kinds_warned_of", None)
    with pytest.warns(UserWarning, match=said):
        pipe(prompt)


def test_it_answers_about_its_own_images(pipe):
    image = pipe("a watermelon, 3d style on white", generator=torch.Generator().manual_seed(0)).images[0]
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]
    answer = pipe.chat([{"role": "user", "content": content}], max_images=0, do_sample=False)
    assert answer["content"][0]["text"].strip()
