"""What a notebook shows of outputs."""

import base64
import io
import re
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from test_pipeline import NUM_SCALES, quiet, seeded
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline


@pytest.fixture(scope="module")
def pipe():
    return quiet(NextFlowPipeline(tiny_model(), tiny_processor()))


def shown(html: str) -> list[Image.Image]:
    found = re.findall(r"data:image/\w+;base64,([^\"]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_an_output_shows_its_images(pipe, output_type):
    expected = pipe(["a red circle", "one"], generator=seeded()).images
    drawn = pipe(["a red circle", "one"], generator=seeded(), output_type=output_type)
    assert [image.tobytes() for image in shown(drawn._repr_html_())] == [image.tobytes() for image in expected]


def test_codes_and_many_images_are_told_shortly(pipe):
    assert "codes (1, 30)" in pipe("one", output_type="latent")._repr_html_()
    many = pipe("one", num_images_per_prompt=70)._repr_html_()
    assert len(shown(many)) == 64 and "70 images in all" in many


def test_codes_have_their_previews_too(pipe):
    drawn = pipe("one", output_type="latent", preview=True)
    assert len(drawn.previews[0]) == NUM_SCALES


def test_previews_are_those_of_the_best_candidates(pipe):
    options = {"num_candidates": 2, "candidate_scorer": lambda *_: [0.0, 1.0, 1.0, 0.0], "preview": True}
    best = pipe(["one", "two"], generator=seeded(), **options)
    assert [row[-1] for row in best.previews] == best.images


def test_a_preview_keeps_every_scale_and_shows_it_growing(pipe, monkeypatch):
    updates = []

    def display(shown, **_):
        updates.append(shown)
        return SimpleNamespace(update=updates.append)

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    drawn = pipe("a red circle", num_images_per_prompt=2, generator=seeded(), preview=True)
    assert [len(row) for row in drawn.previews] == [NUM_SCALES] * 2
    assert [row[-1] for row in drawn.previews] == drawn.images
    assert [len(shown(html)) for html in updates] == [2, 4, 6, 8] and len(shown(drawn._repr_html_())) == 8
    assert drawn.images == pipe("a red circle", num_images_per_prompt=2, generator=seeded()).images


def test_a_video_plays(pipe):
    [gif] = shown(pipe.video([["a red circle", "it <moves>"]], generator=seeded())._repr_html_())
    assert gif.format == "GIF" and gif.n_frames == 2
    assert "it &lt;moves&gt;" in pipe.video([["a red circle", "it <moves>"]])._repr_html_()
