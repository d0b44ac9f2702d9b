"""Cases of settings of trainings and of RL, of rows and archives, of servers, and of scores beside a training."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

from bad_input import RIGHT, Case, Place
from checkpoints_and_recipes import MODELS, TYPED
from fastapi.testclient import TestClient
from files_and_images import IMAGES, OUTPUTS, image_row
from PIL import Image
from settings_and_surroundings import _case
from words_and_calls import BOUNDS, user

from transformers_nextflow.conversion import checkpoints
from transformers_nextflow.data.rows import load_image
from transformers_nextflow.evaluation.suites import SUITES
from transformers_nextflow.serving import ray_serve
from transformers_nextflow.serving.app import create_app
from transformers_nextflow.serving.settings import ServingSettings
from transformers_nextflow.serving.worker import Worker


SERVERS = "servers"
CPU = ("use_cpu=true", "bf16=false", "report_to=none", "max_steps=1")
UNPACKED = ("packing=padding", "packing_budget=null", "gradient_checkpointing=false")

# --- Trainings ----------------------------------------------------------------------------------------------------


def _trained(place: Place, *options, data: Path | str, changes: tuple[str, ...] = ()):
    given = [part for change in (*CPU, *changes) for part in ("--set", change)]
    return place.run("train", *options, "--model", place.model, "--data", data, "--output", "out", *given)


def _rows(place: Place) -> Path:
    return place.rows(image_row(str(place.image)))


def _setting(change: str, *words: str, kind: str = TYPED) -> Case:
    return _case(
        kind, f"train {change[:60]}", lambda p: _trained(p, "sft", data=_rows(p), changes=(*UNPACKED, change)), *words
    )


def _diffusion(*changes: str, data=_rows):
    small = ("level=null", "per_device_train_batch_size=1", "decoder={channels: [8, 16], pixel_cell: 2}")
    return lambda place: _trained(place, "diffusion_decoder", data=data(place), changes=(*small, *changes))


def _stream(name: str, image, *words: str) -> Case:
    def act(place: Place):
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"image": [image], "text": ["one"]}), "rows.parquet")
        return _trained(place, "sft", "--streaming", data="rows.parquet", changes=UNPACKED)

    return _case(TYPED, f"a stream of {name}", act, "row 0", *words)


REWARD = "def reward(completions, **columns):\n    return {}\n"
PROMPTS = {"prompt": "a red circle"}, {"prompt": "two blue squares"}


def _rl(name: str, *words: str, reward="[0.0] * len(completions)", rows=PROMPTS, changes=(), file=None) -> Case:
    def act(place: Place):
        place.file("own.py", file or REWARD.format(reward))
        changed = ("per_device_train_batch_size=2", "num_generations=2", *changes)
        return _trained(place, "--rl", "--reward", "own.py:reward", data=place.rows(*rows), changes=changed)

    return _case(TYPED, f"RL: {name}", act, *words)


TRAINING_CASES = [
    _setting("accelerator_config={fast: 1}", "accelerator_config", "'fast'"),
    _setting("lr_scheduler_kwargs={fast: 1}", "lr_scheduler", "'fast'"),
    _setting("max_steps=-2", "max_steps", "-2"),
    _setting("max_steps=-5", "max_steps", "-5"),
    _setting("save_steps=0", "save_steps", "0"),
    _setting("save_steps=-1", "save_steps", "-1"),
    _setting("logging_steps=-1", "logging_steps", "-1"),
    _setting("resume_from_checkpoint=x", "resume_from_checkpoint", "--resume"),
    _setting("train_sampling_strategy=x", "train_sampling_strategy", "'x'", "random"),
    _setting("include_num_input_tokens_seen=x", "include_num_input_tokens_seen", "'x'", "all"),
    _setting("decoder_width=2", "decoder_width", "tokenizer"),
    _setting("lora_rank=1000000000", "rank", "1000000000", kind=BOUNDS),
    _setting("mixture={5: 1}", "mixture", "5"),
    _setting("mixture={null: 1}", "mixture", "None"),
    _setting(f"mixture={{rows.jsonl: {'9' * 400}}}", "mixture"),
    _setting("mixture={../none.jsonl: 1}", "There is no file or folder ../none.jsonl"),
    Case(
        TYPED, "train mixture of 1e-1",
        lambda p: _trained(p, "sft", data=_rows(p).parent, changes=(*UNPACKED, "mixture={rows.jsonl: 1e-1}")),
        (), RIGHT,
    ),
    Case(
        TYPED, "train streaming a file of rows",
        lambda p: _trained(p, "sft", data=_rows(p), changes=(*UNPACKED, "streaming=true")), (), RIGHT,
    ),
    _case(
        TYPED, "train --lora of rank 0", lambda p: _trained(p, "--lora", data=_rows(p), changes=("lora_rank=0",)),
        "--lora", "lora_rank",
    ),
    _stream("numbers as images", 5, "image"),
    _stream("bytes of no image", b"none", "image"),
    Case(TYPED, "diffusion with checkpoints of activations", _diffusion("gradient_checkpointing=true"), (), RIGHT),
    _case(
        TYPED, "diffusion on images too small for its levels",
        _diffusion("decoder={channels: [8, 8, 8, 8, 8], pixel_cell: 2}"), "multiples of 16", "16x16",
    ),
    _rl("a reward that fails", "'reward'", "KeyError", reward="columns['none']"),
    _rl("a file that is no Python", "own.py", "SyntaxError", file="def reward(:"),
    _rl("a file that fails", "own.py", "KeyError", file="{}['none']"),
    *(_rl(f"{name}=0", name, "0", changes=(f"{name}=0",)) for name in (
        "num_generations", "num_iterations", "steps_per_generation",
    )),
    _rl("a prompt that is a list", "row 0", "prompt", rows=({"prompt": ["a"]},)),
    _rl("half a surrogate pair", "row 0", "prompt", "surrogate", rows=('{"prompt": "\\ud800"}',)),
    _rl("a row that is a list", "row 1", "object", rows=(PROMPTS[0], "[1]")),
    _rl("rows that are lists", "row 0", rows=("[1]",)),
]  # fmt: skip


# --- Rows and archives --------------------------------------------------------------------------------------------


def _png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "PNG")
    return content.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def _parquet(*columns: tuple[str, object]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    names, values = [name for name, _ in columns], [pa.array([value]) for _, value in columns]
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_arrays(values, names=names), content)
    return content.getvalue()


def _source(name: str, files: dict[str, bytes | str], source: str, *words: str, options: tuple = ()) -> Case:
    def act(place: Place):
        for path, content in files.items():
            place.file(path, content)
        result = place.run("validate-data", source, *options)
        if result.exit_code == 1 and "row 0" in result.stderr:
            raise ValueError(result.stderr)  # it lists what it finds
        return result

    return _case(TYPED, f"source: {name}", act, source.split("/")[0], *words)


def _extracted(address: str):
    return lambda p: p.run("extract-codes", _rows(p), "--tokenizer", p.model, "--output", address)


NO_FOLDERS = ("dir://x", "reference://x", "zip://x", "ftp://127.0.0.1:9/x")
TWICE = (("image", _png()), ("text", "a"), ("text", "b"))
SAMPLE = {"0.png": _png(), "0.json": b'{"caption": "a", "caption": "b"}'}
ROW_CASES = [
    _source("a tar whose JSON has a name twice", {"a.tar": _tar(SAMPLE)}, "a.tar", "'caption'", "twice",
            options=("--caption-column", "json.caption")),
    _source("a CSV with a column twice", {"d/a.png": _png(), "d/metadata.csv": "file_name,text,text\na.png,x,y\n"},
            "d", "metadata.csv", "'text'", "twice"),
    _source("a Parquet file with a column twice", {"a.parquet": _parquet(*TWICE)}, "a.parquet", "text"),
    _source("a cut Parquet file", {"a.parquet": _parquet(("image", _png()))[:90]}, "a.parquet"),
    _source("a tar of nothing", {"a.tar": _tar({})}, "a.tar", "no files of rows"),
    _source("a folder without images", {"d/a.txt": "a"}, "d", "no images"),
    _source("an image out of its folder", {"d/metadata.jsonl": '{"file_name": "../own.png", "text": "x"}\n'},
            "d", "own.png"),
    _case(TYPED, "a store with a Parquet column twice", lambda p: _stored_twice(p), "a.parquet", "'text'", "twice"),
    *(_case(TYPED, f"codes at {place}", _extracted(place), place) for place in NO_FOLDERS),
    _source("a zip that is none", {"a.zip": "a"}, "zip://*.parquet::a.zip", "a.zip"),
    _source("half a saved table", {"d/dataset_info.json": "{}", "d/state.json": "{}"}, "d", "_data_files", "lacks"),
    _case(
        IMAGES, "EPS, which a program draws",
        lambda p: load_image(p.file("a.eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "a.eps", "program",
    ),
    _case(
        MODELS, "a card of a base with a line break",
        lambda p: checkpoints.write_model_card(p.folder, p.folder, "a", "b", "a\n---\nlicense: none"), "base_model",
    ),
]  # fmt: skip


def _stored_twice(place: Place):
    import fsspec

    fsspec.filesystem("memory").pipe("/twice/a.parquet", _parquet(*TWICE))
    return place.run("validate-data", "memory://twice")


# --- Servers ------------------------------------------------------------------------------------------------------


def _served(*options: str, words: tuple[str, ...]) -> Case:
    def act(place: Place):
        begun = RuntimeError("Ray was begun")
        with (
            mock.patch.object(ray_serve.ray, "init", side_effect=begun),
            mock.patch.object(ray_serve.serve, "shutdown"),
        ):
            return place.run("serve", place.model, *options)

    return _case(SERVERS, f"serve {' '.join(options)[:40]!r}", act, *words)


def _more_than_there_is(place: Place):
    with mock.patch.object(ray_serve.ray, "cluster_resources", return_value={"CPU": 2.0}):
        ray_serve._check_resources(3, 1.0, 0.0)


def _taken(command: str) -> Case:
    def act(place: Place):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            return place.run(command, place.model, "--port", taken.getsockname()[1])

    return _case(SERVERS, f"{command} at a port that is taken", act, "Nothing can listen", "port")


def _client(place: Place) -> TestClient:
    worker = Worker(place.pipe, ServingSettings(str(place.model), "tiny", max_batch_size=4))
    return TestClient(create_app(worker), raise_server_exceptions=False)


def _asked(name: str, body: dict | str, *words: str, path: str = "images/generations") -> Case:
    def act(place: Place):
        given = {"content": body} if isinstance(body, str) else {"json": {"prompt": "a red circle"} | body}
        answer = _client(place).post(f"/v1/{path}", **given)
        if answer.status_code == 400:
            raise ValueError(answer.text)
        if answer.status_code > 400:
            raise TypeError(f"{answer.status_code}: {answer.text}")

    return _case(SERVERS, f"a request: {name}", act, *words)


def _chat(name: str, *words: str, part: dict | None = None, **given) -> Case:
    message = {"role": "user", "content": [part]} if part else user("a")
    body = {"prompt": None, "messages": [message], "max_tokens": 1, "modalities": ["text"]} | given

    def act(place: Place):
        del body["prompt"]
        answer = _client(place).post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            raise ValueError(answer.text)

    return _case(SERVERS, f"a chat: {name}", act, *words)


def _of_server(name: str, value) -> Case:
    given = {"model": "m", name: value}
    return _case(SERVERS, f"settings: {name}={value!r}", lambda place: ServingSettings(**given), name)


WRONG = (("batch_wait", "x"), ("timeout", None), ("timeout", 0), ("name", 5), ("device", 5))
SERVER_CASES = [
    _served("--cpus", "-1", words=("cpus", "-1")),
    _served("--cpus", "inf", words=("cpus", "inf")),
    _served("--gpus", "nan", words=("gpus", "nan")),
    _served("--gpus", "1.5", words=("gpus", "1.5")),
    _served("--metrics-port", "99999", words=("metrics_port", "99999")),
    _served("--host", "no host", words=("'no host'", "Nothing can listen")),
    _served("--host", "", words=("host is empty",)),
    _served("--name", "a\nb", words=("name", "printed")),
    _served("--name", "x" * 5000, words=("name", "200")),
    _served("--batch-wait", "1e9", words=("batch_wait", "timeout")),
    _case(SERVERS, "more replicas than there are cores", _more_than_there_is, "3 CPUs", "has 2"),
    _taken("serve"),
    _taken("demo"),
    *(_of_server(name, value) for name, value in WRONG),
    _case(SERVERS, "settings of no model", lambda p: ServingSettings(""), "No model"),
    _asked("a truth value for a number", {"n": True}, "n: "),
    _asked("a text for a number", {"seed": "5"}, "seed"),
    _asked("a text for a truth value", {"guidance_ramp": "no"}, "guidance_ramp"),
    _asked("compression without loss", {"output_compression": 5}, "output_compression", "PNG"),
    _chat("no modalities", "modalities", modalities=[]),
    _chat("17 stops", "stop", "16", stop=["a"] * 17),
    _chat("stops of nothing", "stop", "1 to 100 characters", stop=[""]),
    _chat("a part with more", "content[0].weight", part={"type": "text", "text": "a", "weight": 2}),
]  # fmt: skip


# --- Scores beside a training -------------------------------------------------------------------------------------


def _scored(name: str, before: Callable[[Place], object], *words: str, options: tuple = (), scores=None) -> Case:
    def act(place: Place):
        place.file("run/checkpoint-1/weights")
        before(place)
        suite = ModuleType("scored")
        suite.evaluate = lambda *args, **kwargs: {"drawing": {"overall": 0.5}} if scores is None else scores
        places = mock.patch.dict(SUITES.places, {"scored": "scored:evaluate"})
        with mock.patch.dict("sys.modules", {"scored": suite}), places:
            return place.run("evaluate-run", "run", "--once", "--suite", "scored", *options)

    return _case(OUTPUTS, f"evaluate-run: {name}", act, *words)


def _stored(content: str, step: int = 1):
    return lambda place: place.file(f"run/evaluation/scored/checkpoint-{step}/scores.json", content)


def _interrupted(place: Place):
    for step in (1, 2):
        place.file(f"run/checkpoint-{step}/weights")
    suite = ModuleType("scored")

    def evaluate(checkpoint, **kwargs):
        if checkpoint.endswith("2"):
            raise KeyboardInterrupt
        return {"drawing": {"overall": 0.5}}

    suite.evaluate = evaluate
    places = mock.patch.dict(SUITES.places, {"scored": "scored:evaluate"})
    with mock.patch.dict("sys.modules", {"scored": suite}), places:
        result = place.run("evaluate-run", "run", "--once", "--suite", "scored")
    scored = place.folder / "run" / "evaluation" / "scored"
    assert (scored / "checkpoint-1" / "scores.json").exists(), "scores are lost"
    assert not [name for name in os.listdir(scored) if name.startswith(".")], "half a folder is left"
    return result


ODD = '{"settings": {"suite": "scored", "limit": null, "seeds": 4}, "written": 1, "scores": 5}'
SCORE_CASES = [
    _scored("scores that are a list", _stored("[]"), "checkpoint-1", "scores.json"),
    _scored("scores that are no JSON", _stored("{"), "checkpoint-1", "scores.json"),
    _scored("scores of nothing", _stored("{}"), "scores.json", "lacks"),
    _scored("scores that are a number", _stored(ODD, step=9), "checkpoint-9", "scores.json", "5"),
    _scored("seconds without end", lambda place: None, "--every", options=("--every", "inf")),
    _case(
        OUTPUTS, "evaluate-run: no checkpoint", lambda p: (os.mkdir("run"), p.run("evaluate-run", "run", "--once"))[1],
        "checkpoint-STEP",
    ),
    _case(OUTPUTS, "evaluate-run: Ctrl-C", _interrupted, "Interrupted", "1 checkpoints are kept"),
]  # fmt: skip

CASES = [*TRAINING_CASES, *ROW_CASES, *SERVER_CASES, *SCORE_CASES]
