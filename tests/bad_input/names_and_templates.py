"""Cases of names: repeated in files, unknown in calls; of chat templates that lose what users say, and of counts."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from bad_input import RIGHT, Case, Place
from checkpoints_and_recipes import MODELS, TRANSFORMER, TYPED, _recipe, image_row
from files_and_images import IMAGES, OUTPUTS
from PIL import Image
from settings_and_surroundings import _case, _folder
from tiny import tiny_tokenizer
from words_and_calls import BOUNDS, CALLS, _outside, _seeded, user

from transformers_nextflow import (
    NextFlowImageProcessor,
    NextFlowPipeline,
    NextFlowProcessor,
)


# --- Names that a file holds twice --------------------------------------------------------------------------------


def _twice(file: str):
    """Repeat the first name of the object in a file of a checkpoint."""

    def damage(folder: Path):
        path = folder / file
        path.write_text(path.read_text().replace("{", '{"repeated": 1, "repeated": 2, ', 1))

    return damage


def _validated(place: Place, *lines: str):
    result = place.run("validate-data", place.rows(*lines))
    if result.exit_code == 1:
        raise ValueError(result.stderr)  # it lists what it finds
    return result


MESSAGES = '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
REPEATED = '{"role": "user", "content": "a", "content": "b"}'
TWICE_CASES = [
    _recipe("a kind twice", TRANSFORMER + TRANSFORMER, "own.yaml", "'kind'", "twice"),
    _recipe(
        "an argument twice", TRANSFORMER + "arguments:\n  max_steps: 1\n  max_steps: 2\n", "'max_steps'", "twice",
    ),
    _recipe(
        "a change that names an entry twice", TRANSFORMER, "'a'", "twice",
        changes=("mixture={a: 1, a: 2}", "max_steps=1"),
    ),
    *(
        _folder(f"{file} with a name twice", _twice(file), file, "'repeated'", "twice")
        for file in ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json")
    ),
    _case(TYPED, "row: messages twice", lambda p: _validated(p, f"{{{MESSAGES}, {MESSAGES}}}"), "row 0", "'messages'"),
    _case(
        TYPED, "row: content twice", lambda p: _validated(p, f'{{"messages": [{REPEATED}]}}'), "row 0", "'content'",
    ),
    _case(
        TYPED, "note: a name twice",
        lambda p: (p.file("codes/extraction.json", '{"source": "a", "source": "b"}'), p.run("check-codes", "codes"))[1],
        "extraction.json", "'source'", "twice",
    ),
]  # fmt: skip

# --- Names that nothing has ---------------------------------------------------------------------------------------


def _array() -> np.ndarray:
    return np.zeros((16, 16, 3), "u1")


def _processor(**names):
    return lambda place: place.pipe.processor(text="<|image_pad|>", images=_array(), **names)


def _images(**names):
    return lambda place: place.pipe.processor.image_processor(_array(), **names)


def _made(**names):
    return lambda place: NextFlowImageProcessor(**names)


NAME_CASES = [
    _case(CALLS, "processor leval=", _processor(leval=16), "'leval'", "level"),
    _case(CALLS, "processor size=", _processor(size=16), "'size'"),
    _case(CALLS, "processor return_tensor=", _processor(return_tensor="pt"), "'return_tensor'", "return_tensors"),
    _case(CALLS, "processor image=", _processor(image=1), "'image'", "images"),
    _case(CALLS, "processor images_kwargs", _processor(images_kwargs={"leval": 16}), "'leval'", "level"),
    _case(CALLS, "processor text_kwargs", _processor(text_kwargs={"paddin": True}), "'paddin'", "padding"),
    Case(CALLS, "processor of what it knows", lambda p: p.pipe.processor(
        text=["<|image_pad|>"], images=[_array()], padding=True, level=16, return_tensors="pt", text_kwargs={
            "add_special_tokens": False}), (), RIGHT),
    _case(CALLS, "image processor leval=", _images(leval=16), "'leval'", "level"),
    _case(CALLS, "image processor size=", _images(size=16), "'size'"),
    _case(CALLS, "image processor mean=", _images(mean=0.5), "'mean'", "image_mean"),
    _case(CALLS, "image processor do_resize='no'", _images(do_resize="no"), "do_resize", "'no'"),
    _case(CALLS, "image processor image_mean='x'", _images(image_mean="x"), "image_mean", "'x'"),
    _case(CALLS, "image processor image_std=0", _images(image_std=[0, 0, 0]), "image_std"),
    _case(CALLS, "image processor image_mean of two", _images(image_mean=[0.5, 0.5]), "image_mean", "0.5"),
    _case(CALLS, "image processor resample='x'", _images(resample="x"), "resample", "'x'"),
    _case(CALLS, "image processor resample=99", _images(resample=99), "resample", "99"),
    _case(CALLS, "image processor rescale_factor='x'", _images(rescale_factor="x"), "rescale_factor", "'x'"),
    _case(CALLS, "image processor return_tensors='tf5'", _images(return_tensors="tf5"), "tf5"),
    _case(CALLS, "image processor input_data_format=5", _images(input_data_format=5), "input_data_format", "5"),
    _case(CALLS, "made with leval=", _made(leval=16), "'leval'", "level"),
    _case(CALLS, "made with size=", _made(size=16), "'size'"),
    _case(CALLS, "made with image_mean='x'", _made(image_mean="x"), "image_mean", "'x'"),
    _case(CALLS, "made with image_std=5", _made(image_std="5"), "image_std", "'5'"),
    _case(CALLS, "made with do_rescale='no'", _made(do_rescale="no"), "do_rescale", "'no'"),
    _case(CALLS, "made with level=5.5", _made(level=5.5), "level", "5.5"),
    _case(
        CALLS, "a processor made with think=",
        lambda p: NextFlowProcessor(NextFlowImageProcessor(), tiny_tokenizer(), think="a"), "'think'",
        "think_prefix",
    ),
    _case(
        CALLS, "a processor of the wrong parts", lambda p: NextFlowProcessor(tiny_tokenizer(), tiny_tokenizer()),
        "image_processor",
    ),
    _case(
        CALLS, "a processor without a tokenizer", lambda p: NextFlowProcessor(NextFlowImageProcessor(), None),
        "tokenizer", "None",
    ),
    _case(
        CALLS, "a processor with a path as tokenizer",
        lambda p: NextFlowProcessor(NextFlowImageProcessor(), "folder"), "tokenizer", "'folder'",
    ),
    _case(CALLS, "chat_template=5", lambda p: NextFlowProcessor(
        NextFlowImageProcessor(), tiny_tokenizer(), chat_template=5), "chat_template", "5"),
    _case(CALLS, "pipeline size=", lambda p: p.pipe("a", size=(16, 16)), "'size'", "height and width"),
    _case(CALLS, "pipeline(heigth) of video", lambda p: p.pipe.video("a", num_frames=2, size=16), "height and width"),
    _case(
        CALLS, "from_pretrained of a tokenizer of None", lambda p: NextFlowPipeline.from_pretrained(
            p.model, tokenizer=None), "'tokenizer'", "processor",
    ),
    _case(
        CALLS, "from_pretrained with vae=", lambda p: NextFlowPipeline.from_pretrained(p.model, vae=5), "'vae'",
    ),
    _case(
        CALLS, "from_pretrained with torch_dtypes=",
        lambda p: NextFlowPipeline.from_pretrained(p.model, torch_dtypes="x"), "'torch_dtypes'", "torch_dtype",
    ),
    _case(
        CALLS, "from_pretrained of dtype=int9", lambda p: NextFlowPipeline.from_pretrained(p.model, dtype="int9"),
        "dtype", "int9",
    ),
    _case(CALLS, "from_pretrained(None)", lambda p: NextFlowPipeline.from_pretrained(None), "None", "folder"),
    _case(CALLS, "from_pretrained(5)", lambda p: NextFlowPipeline.from_pretrained(5), "5", "folder"),
]  # fmt: skip

# --- Calls --------------------------------------------------------------------------------------------------------


def _callback(function):
    return lambda place: place.pipe("a red circle", callback_on_step_end=function)


CALL_CASES = [
    _case(CALLS, "pipe.to('nowhere')", lambda p: p.pipe.to("nowhere"), "'nowhere'", "cpu"),
    _case(CALLS, "pipe.to('cuda')", lambda p: p.pipe.to("cuda"), "'cuda'"),
    _case(CALLS, "pipe.to('cpu:5')", lambda p: p.pipe.to("cpu:5"), "'cpu:5'"),
    _case(CALLS, "pipe.to('meta')", lambda p: p.pipe.to("meta"), "'meta'"),
    _case(CALLS, "pipe.to(device='nowhere')", lambda p: p.pipe.to(device="nowhere"), "'nowhere'"),
    _case(CALLS, "pipe.to(5.5)", lambda p: p.pipe.to(5.5), "5.5"),
    _case(CALLS, "pipe.to(int8)", lambda p: p.pipe.to(__import__("torch").int8), "int8"),
    _case(CALLS, "pipe.save_pretrained(None)", lambda p: p.pipe.save_pretrained(None), "None", "folder"),
    _case(CALLS, "pipe.save_pretrained('')", lambda p: p.pipe.save_pretrained(""), "''", "folder"),
    _case(CALLS, "pipe.save_pretrained(5)", lambda p: p.pipe.save_pretrained(5), "5", "folder"),
    _case(CALLS, "model.save_pretrained(None)", lambda p: p.pipe.model.save_pretrained(None), "None", "folder"),
    _case(CALLS, "processor.save_pretrained(None)", lambda p: p.pipe.processor.save_pretrained(None), "None", "folder"),
    _case(
        CALLS, "image_processor.save_pretrained(None)",
        lambda p: p.pipe.processor.image_processor.save_pretrained(None), "None", "folder",
    ),
    _case(CALLS, "a callback of one argument", _callback(lambda pipe: None), "callback_on_step_end", "4 arguments"),
    _case(CALLS, "a callback of five arguments", _callback(lambda a, b, c, d, e: None), "callback_on_step_end"),
    _case(CALLS, "a callback that returns 5", _callback(lambda *given: 5), "callback_on_step_end", "5"),
    _case(
        CALLS, "a scorer of one argument",
        lambda p: p.pipe("a", num_candidates=2, candidate_scorer=lambda a: [1, 2]), "candidate_scorer", "4 arguments",
    ),
    Case(CALLS, "a callback of any arguments", _callback(lambda *given, **more: None), (), RIGHT),
]  # fmt: skip

for _device in ("cpu:5", "cuda:-1", "cpu:x", "mps", "xpu:3"):
    CALL_CASES.append(
        _case(BOUNDS, f"generate --device {_device}", lambda p, d=_device: p.draw("--device", d), _device)
    )
CALL_CASES += [
    _case(
        BOUNDS, "evaluate --device cpu:5", lambda p: p.run("evaluate", p.model, "--device", "cpu:5"), "cpu:5"
    ),
    _case(
        BOUNDS, "extract-codes --device cpu:5", lambda p: p.run(
            "extract-codes", p.rows(image_row(str(p.image))), "--tokenizer", p.model, "--output", "codes", "--device",
            "cpu:5"), "cpu:5"
    ),
]  # fmt: skip

# --- Chat templates -----------------------------------------------------------------------------------------------

START = "<|im_start|>assistant\n"
TEXTS_ONLY = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endfor %}" + START
)


def _template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def _edited(place: Place, folder: Path) -> tuple:
    return ("edit", "make it red", "--image", place.image, "--model", folder)


def _described(place: Place, folder: Path) -> tuple:
    return ("describe", place.image, "--model", folder)


TEMPLATE_CASES = [
    _folder("a template of nothing", _template("{# nothing #}"), "template"),
    _folder("a template that drops prompts", _template(START), "template", "prompt"),
    _folder("a template of capitals", _template("{{ messages[0].role | upper }}" + START), "template", "prompt"),
    _folder("a template that drops images", _template(TEXTS_ONLY), "template", "image", command=_edited),
    _folder("a template that drops images of chats", _template(TEXTS_ONLY), "template", "image", command=_described),
    _folder(
        "a template that drops chats", _template("<|image_pad|>" + START), "template", command=_described,
    ),
    _folder("a template that is no Jinja", _template("{% for"), "template"),
    _case(
        MODELS, "a template of one call that drops texts",
        lambda p: p.pipe.processor.apply_chat_template([user("a red star")], chat_template=START), "template",
    ),
]  # fmt: skip

# --- Counts -------------------------------------------------------------------------------------------------------


def _no_warning(prompt: str):
    def act(place: Place):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            place.shapes(prompt, generator=_seeded())
        found = [str(one.message) for one in told if "never seen" in str(one.message)]
        assert not found, found

    return act


COUNT_CASES = [
    _outside("0 stars", lambda p: p.shapes("0 stars", generator=_seeded()), "'0 stars'", "from 1 to 4"),
    _outside("0 red stars", lambda p: p.shapes("0 red stars", generator=_seeded()), "'0 red stars'"),
    _outside("zero stars", lambda p: p.shapes("zero stars", generator=_seeded()), "'zero stars'"),
    _outside("no stars", lambda p: p.shapes("no red stars", generator=_seeded()), "'no red stars'"),
    _outside("00 stars", lambda p: p.shapes("00 stars", generator=_seeded()), "'00 stars'"),
    _outside("-1 stars", lambda p: p.shapes("-1 stars", generator=_seeded()), "'-1 stars'"),
    _outside("1.5 stars", lambda p: p.shapes("1.5 stars", generator=_seeded()), "'1.5 stars'"),
    _outside("twenty stars", lambda p: p.shapes("twenty stars", generator=_seeded()), "'twenty'"),
    Case("outside of the training", "four stars", _no_warning("four stars"), (), RIGHT),
]  # fmt: skip

# --- Outputs that would meet --------------------------------------------------------------------------------------


def _previewed(output: str, previews: str):
    return lambda place: place.draw("--output", output, "--previews", previews)


def _scored(json: str, sheets: str):
    return lambda place: place.run("evaluate", place.model, "--json", json, "--sheets", sheets)


def _extracted(output: str):
    def act(place: Place):
        Path("data").mkdir()
        image = str(place.png("data/a.png"))
        rows = place.rows(image_row(image), name="data/rows.jsonl")
        return place.run("extract-codes", rows, "--tokenizer", place.copy(), "--output", output)

    return act


def _trained(output: str):
    def act(place: Place):
        Path("data").mkdir()
        rows = place.rows(image_row(str(place.png("data/a.png"))), name="data/rows.jsonl")
        options = ["--set", "max_steps=1", "--set", "use_cpu=true", "--set", "bf16=false"]
        recipe = place.file("own.yaml", TRANSFORMER)
        return place.run("train", recipe, "--model", place.copy(), "--data", rows, "--output", output, *options)

    return act


MEETING_CASES = [
    _case(OUTPUTS, "previews are the output", _previewed("a.png", "a.png"), "--previews", "--output"),
    _case(OUTPUTS, "previews inside of the output", _previewed("a.png", "a.png/b"), "--previews", "--output"),
    _case(OUTPUTS, "previews are the output by another way", _previewed("./a.png", "b/../a.png"), "--previews"),
    Case(OUTPUTS, "previews around the output", _previewed("p/a.png", "p"), (), RIGHT),
    _case(OUTPUTS, "sheets are the JSON", _scored("a", "a"), "--sheets", "--json"),
    _case(OUTPUTS, "sheets inside of the JSON", _scored("a", "a/b"), "--sheets", "--json"),
    _case(OUTPUTS, "codes into their tokenizer", _extracted("model"), "--output", "--tokenizer"),
    _case(OUTPUTS, "a training into its model", _trained("model"), "--output", "--model"),
    _case(OUTPUTS, "a training into its data", _trained("data/rows.jsonl"), "rows.jsonl"),
    _case(
        OUTPUTS, "edit over its own input",
        lambda p: p.run("edit", "a", "--image", p.image, "--output", p.image, "--model", p.model), "--output",
        "--image",
    ),
    _case(
        OUTPUTS, "edit over its mask", lambda p: p.run(
            "edit", "a", "--image", p.image, "--mask", p.png("m.png"), "--output", "m.png", "--model", p.model),
        "--output", "--mask",
    ),
    _case(
        OUTPUTS, "vary over its own input",
        lambda p: p.run("vary", "a", "--image", p.image, "--output", p.image, "--num-images", 1, "--model", p.model),
        "--output", "--image",
    ),
    _case(
        OUTPUTS, "a video over its first frame",
        lambda p: p.run("video", "a", "b", "--first-frame", _gif(p), "--output", "v.gif", "--model", p.model),
        "--output", "--first-frame",
    ),
    _case(
        OUTPUTS, "inspect --sheet over the data", lambda p: p.run(
            "inspect", p.model, "--data", p.rows(image_row(str(p.image))), "--sheet", "rows.jsonl"), "rows.jsonl",
    ),
    _case(OUTPUTS, "inspect --sheet of no image", lambda p: p.run(
        "inspect", p.model, "--data", p.rows(image_row(str(p.image))), "--sheet", "sheet.txt"), "sheet.txt", "png"),
    _case(OUTPUTS, "inspect --sheet without data", lambda p: p.run(
        "inspect", p.model, "--sheet", "sheet.png"), "--sheet", "--data"),
]  # fmt: skip


def _gif(place: Place) -> Path:
    Image.new("RGB", (16, 16)).save("v.gif")
    return place.folder / "v.gif"


# --- Provenance ---------------------------------------------------------------------------------------------------


def _read(make):
    def act(place: Place):
        from transformers_nextflow.utils.provenance import read_provenance  # which earlier code, if measured, has not

        return read_provenance(make(place))

    return act


PROVENANCE_CASES = [
    _case(IMAGES, "provenance of nothing", _read(lambda p: "none.png"), "none.png"),
    _case(IMAGES, "provenance of a text", _read(lambda p: p.file("a.png", "a")), "a.png"),
    _case(IMAGES, "provenance of a cut file", _read(lambda p: p.file("a.png", p.image.read_bytes()[:40])), "a.png"),
    _case(IMAGES, "provenance of a pipe", _read(lambda p: (__import__("os").mkfifo("f"), "f")[1]), "pipe"),
    _case(IMAGES, "provenance of a folder", _read(lambda p: p.folder), "folder"),
    _case(IMAGES, "provenance of None", _read(lambda p: None), "None"),
    Case(IMAGES, "provenance that nests", _read(lambda p: _noted(p, "[" * 100_000)), (), RIGHT),
    Case(IMAGES, "provenance of a number", _read(lambda p: _noted(p, "5")), (), RIGHT),
]  # fmt: skip


def _noted(place: Place, text: str) -> Path:
    Image.new("RGB", (16, 16)).save("noted.gif", comment=text.encode()[:50000])
    return place.folder / "noted.gif"


CASES = [
    *TWICE_CASES, *NAME_CASES, *CALL_CASES, *TEMPLATE_CASES, *COUNT_CASES, *MEETING_CASES, *PROVENANCE_CASES,
]  # fmt: skip
