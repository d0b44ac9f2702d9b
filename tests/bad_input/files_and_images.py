"""Cases of folders, of outputs, and of images and videos that come in."""

from __future__ import annotations

import base64
import gzip
import io
import os
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from bad_input import RIGHT, Case, Place, broken
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import modeling_utils

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.utils.atomic_files import atomic_write


FOLDERS, OUTPUTS, IMAGES = "folders are swapped", "outputs are looked at first", "one door for images"
FULL = OSError(28, "No space left on device")


# --- Folders ------------------------------------------------------------------------------------------------------


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _linked_final(place: Place):
    (place.folder / "disk" / "final").mkdir(parents=True)
    place.file("disk/final/old", "1")
    os.symlink(place.folder / "disk" / "final", "final")
    with atomic_write("final") as partial:
        Path(partial).mkdir(exist_ok=True)
        (partial / "new").write_text("2")
    assert os.path.islink("final") and _content(place.folder / "disk") == {"final/new": b"2"}, "the link was destroyed"


def _linked_file(place: Place):
    place.file("disk/scores.json", "1")
    os.symlink(place.folder / "disk" / "scores.json", "scores.json")
    write_result("scores.json", {"a": 1})
    assert os.path.islink("scores.json") and b'"a"' in Path("disk/scores.json").read_bytes(), "the link was destroyed"


def _never_without(place: Place):
    """A folder is looked for at each step of taking its place."""
    (place.folder / "final").mkdir()
    missing = []

    def look(original):
        def run(*args, **kwargs):
            result = original(*args, **kwargs)
            missing.append(not os.path.isdir("final"))
            return result

        return run

    with (
        mock.patch.object(shutil, "rmtree", look(shutil.rmtree)),
        mock.patch.object(Path, "rename", look(Path.rename)),
        atomic_write("final") as partial,
    ):
        partial.mkdir()
    assert not any(missing), "for a moment there was no folder"


def _saved(kind: str, module, name: str):
    def act(place: Place):
        model, processor = tiny_model(), tiny_processor()
        saved = {"model": model, "processor": processor, "pipeline": NextFlowPipeline(model, processor)}
        saved |= {"config": model.config, "image processor": processor.image_processor, "tokenizer": model.vq_model}
        saved[kind].save_pretrained("saved")
        before = _content(place.folder)
        with broken(module(saved[kind]), name, FULL):
            try:
                saved[kind].save_pretrained("saved")
            except OSError:
                assert _content(place.folder) == before, "what was saved before is damaged"
                return
        raise AssertionError("nothing was raised")

    return act


def _half_tokenizer(place: Place):
    processor = tiny_processor()
    processor.save_pretrained("saved")
    before = _content(place.folder)

    def half(folder, *args, **kwargs):
        Path(folder, "tokenizer.json").write_text("{")
        raise FULL

    with mock.patch.object(processor.tokenizer, "save_pretrained", half):
        try:
            processor.save_pretrained("saved")
        except OSError:
            pass
    assert _content(place.folder) == before, "half a tokenizer.json is left"


def _rotated(place: Place):
    from transformers_nextflow.trainers.runs import atomic_checkpoints

    class Trained(atomic_checkpoints.AtomicCheckpointMixin):
        args = mock.Mock(save_total_limit=1)
        state = mock.Mock(best_model_checkpoint=None)

    for step in (1, 2):
        place.file(f"checkpoint-{step}/weights")
        place.file(f"checkpoint-{step}/state")
    (place.folder / "partial-checkpoint").mkdir()
    seen = []
    original = shutil.rmtree

    def interrupted(path, *args, **kwargs):
        next(Path(path).rglob("weights")).unlink()
        seen.append([sorted(f.name for f in c.iterdir()) for c in place.folder.glob("checkpoint-*")])
        return original(path, *args, **kwargs)

    with mock.patch.object(shutil, "rmtree", interrupted):
        Trained()._rotate(place.folder)
        if (place.folder / "partial-checkpoint" / "surplus-checkpoint-1").exists():
            shutil.rmtree(place.folder / "partial-checkpoint")
    assert all(files == ["state", "weights"] for found in seen for files in found), "half a checkpoint is taken for one"


FOLDER_CASES = [
    Case(FOLDERS, "final is a link", _linked_final, expected=RIGHT),
    Case(FOLDERS, "a result file is a link", _linked_file, expected=RIGHT),
    Case(FOLDERS, "there is always a folder", _never_without, expected=RIGHT),
    Case(FOLDERS, "model on a full disk", _saved("model", lambda _: modeling_utils, "safe_save_file"), expected=RIGHT),
    Case(
        FOLDERS, "vision tokenizer on a full disk", _saved("tokenizer", lambda _: modeling_utils, "safe_save_file"),
        expected=RIGHT,
    ),
    Case(FOLDERS, "processor on a full disk", _saved("processor", type, "to_json_file"), expected=RIGHT),
    Case(FOLDERS, "pipeline on a full disk", _saved("pipeline", type, "save_config"), expected=RIGHT),
    Case(FOLDERS, "half a tokenizer.json", _half_tokenizer, expected=RIGHT),
    Case(FOLDERS, "half a surplus checkpoint", _rotated, expected=RIGHT),
    Case(
        FOLDERS, "a model is saved to a file",
        lambda place: tiny_model().save_pretrained(place.file("file")), ("is a file", "folder"),
    ),
]  # fmt: skip


# --- Outputs ------------------------------------------------------------------------------------------------------

# No such model: what is told first is what was looked at first.
NO_MODEL = ("--model", "no/folder")


def _generate(output: str, *words: str, before=lambda place: None, name: str | None = None) -> Case:
    def act(place: Place):
        before(place)
        return place.run("generate", "a star", *NO_MODEL, "--output", output)

    return Case(OUTPUTS, f"generate --output {name or output[:30]}", act, words)


def _with(option: str, value: str, *words: str, before=lambda place: None, command=("generate", "a star")) -> Case:
    def act(place: Place):
        before(place)
        return place.run(*command, *NO_MODEL, option, value)

    return Case(OUTPUTS, f"{command[0]} {option} {value}", act, words)


def _folder(name: str):
    return lambda place: (place.folder / name).mkdir(parents=True)


def _evaluate(option: str, value: str, *words: str, before=lambda place: None) -> Case:
    def act(place: Place):
        before(place)
        scored = ModuleType("scored")

        def evaluate(*args, **kwargs):
            raise AssertionError("hours of work before the output was looked at")

        scored.evaluate_shapes = evaluate
        with mock.patch.dict("sys.modules", {"transformers_nextflow.worlds.shapes.evaluation": scored}):
            return place.run("evaluate", place.model, option, value)

    def told(place: Place):
        result = act(place)
        if isinstance(result.exception, AssertionError):
            raise result.exception
        return result

    return Case(OUTPUTS, f"evaluate {option} {value}", told, words)


def _lost_scores(place: Place):
    """The folder of the scores becomes a file while they are made."""
    scored = ModuleType("scored")

    def evaluate(*args, **kwargs):
        shutil.rmtree("out", ignore_errors=True)
        place.file("out", "")
        return {"overall": 0.123456}

    scored.evaluate_shapes = evaluate
    with mock.patch.dict("sys.modules", {"transformers_nextflow.worlds.shapes.evaluation": scored}):
        result = place.run("evaluate", place.model, "--json", "out/scores.json")
    kept = [path for path in place.folder.rglob("*") if path.is_file() and b"0.123456" in path.read_bytes()]
    assert kept or "0.123456" in result.stdout, "the scores are lost"
    return result


def _lost_image(place: Place):
    """The path becomes a folder while the image is drawn."""
    original = NextFlowPipeline.__call__

    def call(self, *args, **kwargs):
        os.mkdir("out.png")
        return original(self, *args, **kwargs)

    with mock.patch.object(NextFlowPipeline, "__call__", call):
        result = place.draw("--output", "out.png")
    assert any(path.suffix == ".png" and path.is_file() for path in place.folder.rglob("*")), "the image is lost"
    return result


OUTPUT_CASES = [
    _generate("out.png", "out.png is a folder", before=_folder("out.png")),
    *(_generate(f"out{extension}", extension, "use .png") for extension in (".wmf", ".h5", ".xbm", ".grib", ".doc")),
    _generate("out", "no extension"),
    _generate("file/out.png", "is not a folder", before=lambda place: place.file("file")),
    _generate("/proc/out.png", "cannot be written"),
    _generate("/dev/null/out.png", "is not a folder"),
    _generate("a" * 300 + ".png", "cannot be written", "too long", name="a name of 300 characters"),
    _generate("a/" * 2500 + "out.png", "cannot be written", name="a path of 5,000 characters"),
    _generate("link.png", "is a device", before=lambda place: os.symlink("/dev/full", "link.png"), name="a device"),
    _generate("pipe.png", "pipe", before=lambda place: os.mkfifo("pipe.png"), name="a pipe"),
    _with("--previews", "file", "file is a file", before=lambda place: place.file("file")),
    _with("--previews", "file/in", "cannot be written", before=lambda place: place.file("file")),
    _with("--output", "out.png", "is a folder", before=_folder("out.png"), command=("edit", "a", "--image", "i.png")),
    _with("--output", "out.wmf", "use .png", command=("vary", "a", "--image", "i.png")),
    _with("--output", "out.gif", "is a folder", before=_folder("out.gif"), command=("video", "a", "b")),
    _with("--output", "file/out.gif", "not a folder", before=lambda p: p.file("file"), command=("video", "a", "b")),
    _with("--output", "out.avi", ".gif or .mp4", command=("video", "a", "b")),
    _evaluate("--json", "out", "is a folder", before=_folder("out")),
    _evaluate("--json", "file/out.json", "is not a folder", before=lambda place: place.file("file")),
    _evaluate("--json", "/proc/out.json", "cannot be written"),
    _evaluate("--sheets", "file", "is a file", before=lambda place: place.file("file")),
    Case(
        OUTPUTS, "extract-codes --output a file",
        lambda p: p.run("extract-codes", p.rows({}), "--tokenizer", "no/folder", "--output", p.file("file")),
        ("is a file",),
    ),
    Case(
        OUTPUTS, "train --output a file",
        lambda p: p.run("train", "sft", *NO_MODEL, "--data", p.rows({}), "--output", p.file("file")), ("is a file",),
    ),
    Case(OUTPUTS, "scores whose folder has gone", _lost_scores, ("kept in",)),
    Case(OUTPUTS, "an image whose path has gone", _lost_image, ("kept in", "out.1.png")),
]  # fmt: skip


# --- Images -------------------------------------------------------------------------------------------------------


@cache
def _bomb_bytes() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in half a megabyte."""
    size = 20_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(size // 8 + 1) * size, 9)
    head = struct.pack(">IIBBBBB", size, size, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _bomb(place: Place) -> Path:
    return place.file("bomb.png", _bomb_bytes())


def _truncated(place: Place) -> Path:
    return place.file("cut.png", place.png("whole.png", (64, 64)).read_bytes()[:3000])


def _pipe(place: Place) -> Path:
    os.mkfifo("pipe.png")
    return Path("pipe.png")


def _gif(place: Place, content: bytes | None = None) -> Path:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    frames[0].save("video.gif", save_all=True, append_images=frames[1:])
    return place.file("video.gif", Path("video.gif").read_bytes() if content is None else content)


FILES = {
    "a bomb": (_bomb, ("bomb.png", "pixels")),
    "a truncated file": (_truncated, ("cut.png",)),
    "a text": (lambda place: place.file("text.png", "no image"), ("text.png", "no image")),
    "an empty file": (lambda place: place.file("empty.png"), ("empty.png",)),
    "a pipe": (_pipe, ("is a pipe or a device",)),
    "a device": (lambda place: Path("/dev/zero"), ("is a pipe or a device",)),
    "a folder": (lambda place: place.folder, ("is a folder",)),
    "a missing file": (lambda place: Path("none.png"), ("There is no", "file none.png")),
    "a long ratio": (lambda place: place.png("long.png", (10, 100)), ("1:4 to 4:1",)),
    "a long path": (lambda place: Path("a" * 5000 + ".png"), ("There is no",)),
}
COMMANDS = {
    "edit --image": lambda place, path: place.run("edit", "a", "--image", path, "--model", place.model),
    "edit --mask": lambda place, path: place.run(
        "edit", "a", "--image", place.image, "--mask", path, "--model", place.model
    ),
    "describe": lambda place, path: place.run("describe", path, "--model", place.model),
    "score --image": lambda place, path: place.run("score", "a", "--image", path, "--model", place.model),
    "video --first-frame": lambda place, path: place.run(
        "video", "a", "b", "--first-frame", path, "--model", place.model
    ),
    "validate-data": lambda place, path: place.run("validate-data", place.rows(image_row(str(path)))),
}
LEFT_OUT = {("edit --mask", "a long ratio"), *(("validate-data", file) for file in ("a folder", "a device", "a pipe"))}


def image_row(image) -> dict:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "one"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "one"}]}


def _command_case(command: str, file: str) -> Case:
    make, words = FILES[file]

    def act(place: Place):
        result = COMMANDS[command](place, make(place))
        if command == "validate-data" and result.exit_code == 1 and "messages[0].content[0].image" in result.stderr:
            raise ValueError(result.stderr)  # it lists what it finds
        return result

    if command == "validate-data":
        words = tuple(word for word in words if "There is no" not in word and "file none" not in word)
    return Case(IMAGES, f"{command} {file}", act, words)


def _api(name: str, give, *words: str, expected: str = "refused") -> Case:
    def act(place: Place):
        image = give(place)
        pixels = place.pipe.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        if expected == RIGHT:
            own = place.pipe.processor.image_processor(Image.open(place.image), return_tensors="pt")["pixel_values"]
            assert torch.equal(pixels[-1:], own), "another image"

    return Case(IMAGES, f"API: {name}", act, words, expected)


def _bytes(place: Place) -> bytes:
    return place.image.read_bytes()


def _array(place: Place) -> np.ndarray:
    return np.asarray(Image.open(place.image))


IMAGE_CASES = [
    *(_command_case(command, file) for command in COMMANDS for file in FILES if (command, file) not in LEFT_OUT),
    Case(
        IMAGES, "describe a GIF that is none",
        lambda p: p.run("describe", _gif(p, b"GIF89a" + bytes(50)), "--model", p.model), ("video.gif",),
    ),
    Case(
        IMAGES, "describe an MP4 that is none",
        lambda p: p.run("describe", p.file("video.mp4", "no video"), "--model", p.model), ("video.mp4",),
    ),
    Case(
        IMAGES, "describe a GIF", lambda p: p.run("describe", _gif(p), "--model", p.model, "--max-new-tokens", 1),
        expected=RIGHT,
    ),
    _api("path", lambda place: place.image, expected=RIGHT),
    _api("string", lambda place: str(place.image), expected=RIGHT),
    _api("bytes", _bytes, expected=RIGHT),
    _api("bytearray", lambda place: bytearray(_bytes(place)), expected=RIGHT),
    _api("memoryview", lambda place: memoryview(_bytes(place)), expected=RIGHT),
    _api("BytesIO", lambda place: io.BytesIO(_bytes(place)), expected=RIGHT),
    _api("open file", lambda place: open(place.image, "rb"), expected=RIGHT),
    _api("gzip file", lambda place: gzip.open(place.file("own.gz", gzip.compress(_bytes(place)))), expected=RIGHT),
    _api("base64", lambda place: base64.b64encode(_bytes(place)).decode(), expected=RIGHT),
    _api("data URL", lambda p: f"data:image/png;base64,{base64.b64encode(_bytes(p)).decode()}", expected=RIGHT),
    _api("array", _array, expected=RIGHT),
    _api("tensor", lambda place: torch.from_numpy(_array(place)).movedim(-1, 0), expected=RIGHT),
    _api("file of text", lambda place: open(place.file("text.txt", "a")), "image"),
    _api("broken data URL", lambda place: "data:image/png;base64,????", "base64"),
    _api("base64 of no image", lambda place: base64.b64encode(bytes(200)).decode(), "base64", "no image"),
    _api("missing path", lambda place: "no/such.png", "There is no image file no/such.png"),
    _api("NUL in a path", lambda place: "a\0b.png", "There is no image file"),
    _api("FTP", lambda place: "ftp://localhost/a.png", "only http and https"),
    _api("URL of nobody", lambda place: "http://127.0.0.1:9/a.png", "cannot be fetched"),
    _api("None", lambda place: None, "None"),
    _api("number", lambda place: 5, "5"),
    _api("dict", lambda place: {"image": 1}, "not a PIL image"),
    _api("array of one axis", lambda place: np.zeros(16), "2 or 3 axes"),
    _api("array of objects", lambda place: np.array([[None] * 16] * 16), "not pixel values"),
    _api("array of nothing", lambda place: np.zeros((0, 0, 3)), "at least 1 pixel"),
    _api("empty list", lambda place: [], "no image"),
    Case(IMAGES, "API: a list of None", lambda p: p.pipe("a red circle", image=[None]), ("None",)),
    Case(IMAGES, "API: None as a mask", lambda p: p.pipe("a", image=_array(p), mask_image=[None]), ("None",)),
    Case(
        IMAGES, "API: two axes of grey as an image", lambda p: p.pipe("a red circle", image=np.zeros((16, 16), "u1")),
        expected=RIGHT,
    ),
    Case(
        IMAGES, "API: two axes as a tensor mask",
        lambda p: p.pipe("a red circle", image=_array(p), mask_image=torch.ones(16, 16)), expected=RIGHT,
    ),
    Case(IMAGES, "API: a number as a video", lambda p: p.pipe.chat([_user({"type": "video", "video": 5})]), ("video",)),
]  # fmt: skip


def _user(part: dict) -> dict:
    return {"role": "user", "content": [part, {"type": "text", "text": "one"}]}


CASES = [*FOLDER_CASES, *OUTPUT_CASES, *IMAGE_CASES]
