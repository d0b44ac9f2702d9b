"""The demo without a browser: what it does, and what it tells of bad input."""

import importlib
import sys
import time
import warnings

import gradio as gr
import pytest
import torch
from PIL import Image, ImageDraw
from test_pipeline import NUM_SCALES, quiet
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.demo import actions, page
from transformers_nextflow.utils.provenance import read_provenance


@pytest.fixture(scope="module")
def pipe():
    return quiet(NextFlowPipeline(tiny_model(), tiny_processor()))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def last(drawing):
    *before, shown = drawing
    assert not any(one.is_finished for one in before) and shown.is_finished
    return shown


def painted(image: Image.Image, box=None) -> dict:
    layer = Image.new("RGBA", image.size)
    if box is not None:
        ImageDraw.Draw(layer).rectangle(box, fill="magenta")
    return {"background": image.convert("RGBA"), "layers": [layer], "composite": None}


def test_a_drawing_grows_by_scales_and_ends_as_the_pipeline_draws_it(pipe):
    for size in (None, "", "63 x 64"):
        with pytest.raises(ValueError, match="choose one of the list"):
            next(actions.draw(pipe, "a red circle", size, 1, 3, None))
    drawing = list(actions.draw(pipe, "a red circle", actions.DEFAULT_SIZE, 1, 3, None))
    assert [len(shown.growth) for shown in drawing] == [*range(1, NUM_SCALES + 1), NUM_SCALES]
    [(image, caption)] = drawing[-1].images
    assert image == pipe("a red circle", generator=seeded(3)).images[0] and caption == "seed 3"


def test_the_file_of_a_shown_image_says_what_drew_it(pipe):
    for seed in (3, 4):
        # Both seeds draw the same pixels, which the last preview has as well.
        drawing = actions._stream_scales(pipe, "one", 1, seed, temperature=0)
        *_, [(path, _)] = (page._files(shown.images) for shown in drawing)
        assert read_provenance(path)["seed"] == seed


def test_candidates_come_with_scores_best_first(pipe):
    images, captions = zip(*last(actions.draw(pipe, "a red circle", actions.DEFAULT_SIZE, 3, 5, 2.0)).images)
    scores = pipe.score(list(images), ["a red circle"] * 3).text_given_image.tolist()
    assert [caption.partition("score ")[2] for caption in captions] == [f"{score:.2f}" for score in scores]
    assert scores == sorted(scores, reverse=True)
    drawn = pipe("a red circle", num_images_per_prompt=3, guidance_scale=2.0, generator=seeded(5, 6, 7)).images
    assert [drawn[int(caption[5]) - 5] for caption in captions] == list(images)


def test_every_size_that_the_model_draws_can_be_chosen(pipe):
    for size in actions.sizes(pipe)[1:]:
        [(image, _)] = last(actions.draw(pipe, "one", size, 1, 0, None)).images
        assert f"{image.width} x {image.height}" == size


def test_an_edit_keeps_what_was_not_painted_on_though_the_image_was_enlarged(pipe):
    [image] = pipe("a red circle", generator=seeded(0)).images
    large = actions.enlarged(image)
    assert max(large.size) > image.width and actions.shrunk(pipe, large) == image.convert("RGB")
    box = (0, 0, large.width // 2 - 1, large.height - 1)
    [(edited, _)] = last(actions.edit(pipe, "make it blue", painted(large, box), 1, 1, None)).images
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle((0, 0, image.width // 2 - 1, image.height - 1), fill=255)
    expected = pipe("make it blue", image=image, mask_image=mask, paste_back=True, generator=seeded(1)).images[0]
    assert edited == expected
    right = (image.width // 2, 0, image.width, image.height)
    assert edited.crop(right).tobytes() == image.crop(right).tobytes()


def test_an_edit_with_nothing_painted_is_one_of_the_whole_image(pipe):
    [image] = pipe("a red circle", generator=seeded(0)).images
    [(edited, _)] = last(actions.edit(pipe, "make it blue", painted(image), 1, 1, None)).images
    assert edited == pipe("make it blue", image=image, generator=seeded(1)).images[0]


def test_a_photograph_of_any_size_can_be_edited_and_varied(pipe):
    photograph = Image.effect_noise((203, 150), 80).convert("RGB")
    assert actions.shrunk(pipe, photograph) == photograph
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the pipeline warns of is shown
        edited = last(actions.edit(pipe, "one", painted(photograph, (0, 0, 99, 99)), 1, 0, None))
        varied = last(actions.vary(pipe, "one", photograph, 1, 2, 0))
    assert len(edited.images) == 1 and len(varied.images) == 2


def test_transparent_pixels_are_white_as_in_the_pipeline(pipe):
    hidden = Image.new("RGBA", (20, 20), (0, 0, 255, 0))
    assert actions.shrunk(pipe, hidden) == Image.new("RGB", (20, 20), "white")


def test_variations_keep_scales(pipe):
    [image] = pipe("a red circle", generator=seeded(0)).images
    shown = last(actions.vary(pipe, "one", actions.enlarged(image), NUM_SCALES, 1, 4))
    assert [found for found in shown.warnings if "is the image itself" in found]
    options = {"num_kept_scales": NUM_SCALES - 1, "num_images_per_prompt": 2, "generator": seeded(4, 5)}
    expected = pipe("one", image=image, **options).images
    varied = last(actions.vary(pipe, "one", actions.enlarged(image), NUM_SCALES - 1, 2, 4))
    assert [image for image, _ in varied.images] == expected


def test_a_chat_goes_on_with_what_was_said_and_shown():
    pipe = quiet(NextFlowPipeline(tiny_model(text_config={"max_position_embeddings": 2048}), tiny_processor()))
    image = Image.new("RGB", (32, 32), "red")
    first = actions.chat(pipe, [], "a red circle", [image], 0)
    second = actions.chat(pipe, first, "one", [], 0)
    assert [message["role"] for message in second] == ["user", "assistant"] * 2 and second[:2] == first
    assert [part["type"] for part in first[0]["content"]] == ["image", "text"]
    bubbles = page._bubbles(second)
    assert len(bubbles) == sum(len(message["content"]) for message in second)
    assert isinstance(bubbles[0]["content"], gr.Image) and bubbles[1]["content"] == "a red circle"


def test_who_stops_watching_stops_the_drawing(pipe, monkeypatch):
    previews, make = [], pipe._callback_kwargs

    def slowly(*values):
        previews.append(values)
        time.sleep(0.2)
        return make(*values)

    monkeypatch.setattr(pipe, "_callback_kwargs", slowly)
    drawing = actions.draw(pipe, "one", actions.DEFAULT_SIZE, 1, 0, None)
    next(drawing)
    drawing.close()
    time.sleep(0.2 * NUM_SCALES)
    assert len(previews) <= 2 < NUM_SCALES
    [(image, _)] = last(actions.draw(pipe, "one", actions.DEFAULT_SIZE, 1, 0, None)).images
    assert image == pipe("one", generator=seeded(0)).images[0]  # the next one is whole


SQUARE = Image.new("RGB", (32, 32))
BAD = {
    "no prompt": (lambda p: actions.draw(p, " ", actions.DEFAULT_SIZE, 1, 0, None), "no prompt"),
    "an empty field": (lambda p: actions.draw(p, "one", actions.DEFAULT_SIZE, 1, None, None), "seed"),
    "half an image": (lambda p: actions.draw(p, "one", actions.DEFAULT_SIZE, 1.5, 0, None), "1.5"),
    "no images": (lambda p: actions.draw(p, "one", actions.DEFAULT_SIZE, 0, 0, None), "from 1, got 0"),
    "a million images": (lambda p: actions.draw(p, "one", actions.DEFAULT_SIZE, 10**6, 0, None), "1000000 images"),
    "a negative seed": (lambda p: actions.draw(p, "one", actions.DEFAULT_SIZE, 1, -1, None), "-1"),
    "an infinite seed": (lambda p: actions.draw(p, "one", actions.DEFAULT_SIZE, 1, float("inf"), None), "inf"),
    "guidance below none": (lambda p: actions.draw(p, "one", actions.DEFAULT_SIZE, 1, 0, -2.0), "guidance_scale"),
    "a size that is not drawn": (lambda p: actions.draw(p, "one", "3 x 3", 1, 0, None), "3"),
    "nothing to edit": (lambda p: actions.edit(p, "one", None, 1, 0, None), "no image to edit"),
    "an empty canvas": (lambda p: actions.edit(p, "one", {"background": None, "layers": []}, 1, 0, None), "no image"),
    "an edit without words": (lambda p: actions.edit(p, "", painted(SQUARE), 1, 0, None), "no prompt"),
    "nothing to vary": (lambda p: actions.vary(p, "one", None, 1, 1, 0), "no image to vary"),
    "variations that cannot differ": (lambda p: actions.vary(p, "one", SQUARE, NUM_SCALES, 2, 0), "Keep fewer scales"),
    "an image without words": (lambda p: iter(actions.chat(p, [], " ", [SQUARE], 0)), "is empty"),
}


@pytest.mark.parametrize("called, told", BAD.values(), ids=BAD)
def test_bad_input_is_told_to_the_person(pipe, called, told, caplog):
    event = page.shows_errors(lambda: called(pipe))
    with pytest.raises(gr.Error) as raised:
        list(event())
    assert told in raised.value.message and not raised.value.print_exception
    assert not caplog.records  # what a person can mend is no line of a log


def test_a_defect_is_told_and_logged(caplog):
    def fails():
        yield from [][1]

    with pytest.raises(gr.Error, match="IndexError"):
        list(page.shows_errors(fails)())
    assert caplog.records[0].exc_info


def test_the_page_has_a_label_for_every_field_and_draws_on_enter(pipe):
    made = page.make_page(pipe)
    fields = [block for block in made.blocks.values() if isinstance(block, gr.components.Component)]
    named = (gr.Button, gr.State, gr.Markdown)
    assert len(fields) > 20 and all(field.label for field in fields if not isinstance(field, named))
    prompts = {block._id: block.label for block in fields if type(block) in (gr.Textbox, gr.MultimodalTextbox)}
    entered = {prompts.get(target) for fn in made.fns.values() for target, event in fn.targets if event == "submit"}
    assert len(prompts) == 4 and entered == set(prompts.values())


@pytest.mark.parametrize("interleaves", [True, False])
def test_a_seed_is_asked_for_in_chats_that_follow_it(pipe, interleaves, monkeypatch):
    monkeypatch.setattr(NextFlowPipeline, "interleaves", interleaves)
    *_, seed = [block for block in page.make_page(pipe).blocks.values() if getattr(block, "label", "") == "Seed"]
    assert seed.visible == interleaves


def test_without_gradio_the_demo_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, page.__name__)
    with pytest.raises(ImportError, match=r"pip install transformers-nextflow\[demo\]"):
        importlib.import_module(page.__name__)
