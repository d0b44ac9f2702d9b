"""What transformers asks of every processor and image processor, asked of ours; `test_library_contracts.py` says where
each check stands.
"""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, tiny_processor, tiny_tokenizer
from tiny_onecat import tiny_onecat_processor
from tiny_tokenflow_t2i import tiny_t2i_processor

from transformers_nextflow import NextFlowImageProcessor, NextFlowProcessor, OneCatProcessor


PLACEHOLDER = "<|image_pad|>"
NOISE = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(array) for array in NOISE]


def image_processor(**kwargs) -> NextFlowImageProcessor:
    return NextFlowImageProcessor(scales=(1, 2, 3, 4), patch_size=4, **kwargs)


def processor_of(image_kwargs=(), tokenizer_kwargs=()) -> NextFlowProcessor:
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= dict(tokenizer_kwargs)
    return NextFlowProcessor(image_processor(**dict(image_kwargs)), tokenizer)


# The processor: which setting wins ------------------------------------------------------------------------------------


def test_settings_of_the_parts_hold_where_a_call_says_nothing():
    processor = processor_of({"do_normalize": False}, {"padding": "max_length", "max_length": 60})
    output = processor(text=f"a {PLACEHOLDER}", images=IMAGES[0])
    assert len(output["input_ids"][0]) == 60
    assert np.asarray(output["pixel_values"]).min() >= 0


@pytest.mark.parametrize("structured", [False, True], ids=["flat", "by part"])
@pytest.mark.parametrize("count", [1, 2], ids=["one", "batch"])
def test_settings_of_a_call_win_flat_and_by_part(structured, count):
    processor = processor_of({}, {"padding": "max_length", "max_length": 99})
    text, image = {"padding": "max_length", "max_length": 50}, {"do_normalize": False}
    kwargs = {"text_kwargs": text, "images_kwargs": image} if structured else text | image
    texts = [f"a {PLACEHOLDER}", f"{PLACEHOLDER} two blue squares"][:count]
    output = processor(text=texts, images=[[image] for image in IMAGES[:count]], return_tensors="pt", **kwargs)
    assert output["input_ids"].shape == (count, 50)
    plain = processor(text=PLACEHOLDER, images=IMAGES[0], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(output["pixel_values"][:1], plain / 2 + 0.5)


def test_a_setting_given_twice_is_refused_and_one_given_flat_is_not_lost():
    processor, inputs = tiny_processor(), {"text": PLACEHOLDER, "images": IMAGES[0]}
    with pytest.raises(ValueError, match="rescale_factor"):
        processor(**inputs, images_kwargs={"rescale_factor": 1.0}, rescale_factor=2.0)
    assert all(torch.is_tensor(value) for value in processor(**inputs, text_kwargs={}, return_tensors="pt").values())


def test_settings_of_loading_win_over_those_that_were_saved(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    loaded = NextFlowProcessor.from_pretrained(tmp_path, do_normalize=False, read_last_scale=True)
    assert loaded.image_processor.do_normalize is False and loaded.read_last_scale is True
    assert len(loaded.image_placeholder_ids(4, 4)) == len(tiny_processor().image_placeholder_ids(4, 4)) + 16


# The processor: what it gives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "placeholder"), [(tiny_processor, PLACEHOLDER), (tiny_onecat_processor, "<IMG_CONTEXT>")]
)
def test_it_gives_what_its_model_takes_and_no_more(make, placeholder):
    processor = make()
    output = processor(text=placeholder, images=IMAGES[0], return_tensors="pt")
    assert list(output) == processor.model_input_names
    assert list(processor(text="one", return_tensors="pt")) == ["input_ids", "attention_mask"]
    with pytest.raises((TypeError, ValueError)):
        processor()


def test_each_part_gives_by_itself_what_it_gives_within():
    processor = tiny_processor()
    output = processor(text=CAPTIONS, images=None, padding=True, return_tensors="pt")
    assert torch.equal(output["input_ids"], processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt").input_ids)
    output = processor(text=[PLACEHOLDER] * 2, images=IMAGES, return_tensors="pt")
    expected = processor.image_processor(IMAGES, return_tensors="pt")
    assert all(torch.equal(output[name], expected[name]) for name in expected)


def test_it_decodes_as_its_tokenizer_does():
    processor, ids = tiny_processor(), [[20, 2, 30], [0, 40, 50]]
    for options in ({}, {"skip_special_tokens": True}):
        assert processor.batch_decode(ids, **options) == processor.tokenizer.batch_decode(ids, **options)
        assert processor.decode(ids[0], **options) == processor.tokenizer.decode(ids[0], **options)


def test_texts_of_a_call_are_left_as_they_were():
    processor, texts, rows = tiny_processor(), [f"a {PLACEHOLDER}", "one"], [[IMAGES[0]], []]
    before = copy.deepcopy(texts)
    processor(text=texts, images=rows, padding=True)
    assert texts == before and rows == [[IMAGES[0]], []]


@pytest.mark.parametrize("kind", [NextFlowProcessor, OneCatProcessor])
def test_the_arguments_of_a_call_are_optional_and_its_parts_are_named_in_its_init(kind):
    parameters = inspect.signature(kind.__call__).parameters
    assert all(parameters[name].default is None for name in ("text", "images"))
    init = inspect.signature(kind.__init__).parameters
    assert set(kind.get_attributes()) == {"image_processor", "tokenizer"} <= set(init)


# The processor: chats and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_processor, tiny_t2i_processor, tiny_onecat_processor])
def test_it_outlives_its_file_and_its_copy(make, tmp_path):
    processor = make()
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert json.loads(loaded.to_json_string()) == json.loads(processor.to_json_string())
    assert copy.deepcopy(processor).to_dict() == processor.to_dict()
    prompts = [loaded.apply_image_prompt(CAPTIONS), processor.apply_image_prompt(CAPTIONS)]
    assert torch.equal(*(prompt["input_ids"] for prompt in prompts))


def test_a_chat_template_of_its_own_is_kept_in_a_file_and_takes_arguments(tmp_path):
    template = "{% for m in messages %}{{ greeting }} {{ m.content }}{% endfor %}"
    processor = tiny_processor()
    processor.chat_template = template
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template
    loaded = NextFlowProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "one"}]
    assert loaded.apply_chat_template(chat, greeting="hello") == "hello one"


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
@pytest.mark.parametrize("make", [tiny_processor, tiny_onecat_processor])
def test_a_chat_with_images_is_the_call_on_its_text_and_images(batched, tensors, make):
    processor = make()
    image = {"type": "image", "image": IMAGES[0]}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "how many?"}]}]
    chats = [chat, chat] if batched else chat
    output = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors=tensors)
    text = processor.apply_chat_template(chats, tokenize=False)
    count = 2 if batched else 1
    expected = processor(text=text, images=[[IMAGES[0]]] * count, return_tensors=tensors)
    assert list(output) == list(expected)
    assert len(output["input_ids"]) == count
    for name in output:
        np.testing.assert_array_equal(np.asarray(output[name]), np.asarray(expected[name]))


# The image processor --------------------------------------------------------------------------------------------------


def test_an_image_processor_outlives_dicts_json_and_files(tmp_path):
    settings = {"do_rescale": True, "do_normalize": False, "image_mean": [0.1, 0.2, 0.3], "levels": [[8, 2], [16, 4]]}
    processor = image_processor(**settings)
    for name, value in settings.items():
        assert json.loads(processor.to_json_string())[name] == value
    processor.to_json_file(tmp_path / "file.json")
    processor.save_pretrained(tmp_path)
    others = [
        NextFlowImageProcessor.from_dict(processor.to_dict()),
        NextFlowImageProcessor.from_json_file(tmp_path / "file.json"),
        NextFlowImageProcessor.from_pretrained(tmp_path),
        copy.deepcopy(processor),
    ]
    for other in others:
        assert other.to_dict() == processor.to_dict()
        assert json.loads(other.to_json_string()) == json.loads(processor.to_json_string())
    changed = NextFlowImageProcessor.from_dict(processor.to_dict(), do_normalize=True)
    assert changed.do_normalize is True and processor.do_normalize is False


def test_an_image_processor_without_arguments_is_the_papers():
    processor = NextFlowImageProcessor()
    assert processor.scale_schedules.resolutions == (1024,)
    assert processor(IMAGES[0].resize((1024, 1024)))["image_grids"].tolist() == [[64, 64]]


def test_what_one_image_processor_is_told_another_does_not_hear():
    levels = [[8, 2], [16, 4]]
    first, second = image_processor(levels=levels), image_processor(levels=levels)
    before = copy.deepcopy(second.to_dict())
    first(IMAGES[0], level=8, do_normalize=False)
    assert first.to_dict() == before
    first.levels[0][1], first.scales[-1], first.do_resize = 9, 5, False
    assert second.to_dict() == before and levels == [[8, 2], [16, 4]]


def test_the_values_can_be_cast_and_the_grids_stay_whole_numbers():
    output = image_processor()(IMAGES, return_tensors="pt")
    for dtype in (torch.float16, torch.bfloat16):
        cast = output.to("cpu", dtype)
        assert cast["pixel_values"].dtype == dtype and cast["image_grids"].dtype == torch.int64


@pytest.mark.parametrize("kind", ["PIL", "numpy", "torch"])
def test_a_batch_holds_what_its_images_give_alone(kind):
    of_kind = {"PIL": Image.fromarray, "numpy": np.asarray, "torch": lambda a: torch.from_numpy(a).permute(2, 0, 1)}
    images = [of_kind[kind](array) for array in (NOISE[0], np.ascontiguousarray(NOISE[1].swapaxes(0, 1)))]
    processor = image_processor()
    together = processor(images, return_tensors="pt")
    for row, image in enumerate(images):
        alone = processor(image, return_tensors="pt")
        assert torch.equal(alone["image_grids"][0], together["image_grids"][row])
        height, width = alone["pixel_values"].shape[-2:]
        assert torch.equal(alone["pixel_values"][0], together["pixel_values"][row, :, :height, :width])
        assert (together["pixel_values"][row, :, height:] == 0).all()
        assert (together["pixel_values"][row, :, :, width:] == 0).all()
    nested = processor([[image] for image in images], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], together["pixel_values"])


def test_images_of_several_modes_make_one_batch():
    images = [IMAGES[0].convert(mode) for mode in ("RGB", "L", "RGBA", "P", "CMYK")]
    assert image_processor()(images, return_tensors="pt")["pixel_values"].shape == (5, 3, 12, 16)


def test_arguments_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="do_center_crop"):
        image_processor()(IMAGES[0], do_center_crop=True)
