"""Cases of model folders, of recipes, configs, notes and rows, and of signals."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bad_input import RIGHT, Case, Place, broken
from files_and_images import image_row
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_vq_config

from transformers_nextflow import NextFlowConfig, NextFlowPipeline
from transformers_nextflow.conversion import checkpoints, siglip2
from transformers_nextflow.data import code_extraction


MODELS, TYPED, SIGNALS = "model folders", "typed recipes, configs and rows", "signals"
WEIGHTS = "model.safetensors"

# --- Model folders ------------------------------------------------------------------------------------------------


def _config(place: Place, folder: Path, **values) -> Path:
    return _json(folder / "config.json", **values)


def _json(file: Path, **values) -> Path:
    content = json.loads(file.read_text())
    for name, value in values.items():
        target = content
        *path, last = name.split("__")
        for part in path:
            target = target[part]
        target[last] = value
    file.write_text(json.dumps(content))
    return file


def _weights(folder: Path, change: Callable[[dict], dict]):
    weights = load_file(folder / WEIGHTS)
    save_file(
        {name: tensor.contiguous() for name, tensor in change(weights).items()}, folder / WEIGHTS, {"format": "pt"}
    )


def _index(place: Place, folder: Path):
    """An index that names a file outside of its folder."""
    shutil.move(folder / WEIGHTS, place.folder / "outside.safetensors")
    names = load_file(place.folder / "outside.safetensors")
    place.file(
        f"{folder.name}/{WEIGHTS}.index.json",
        {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")},
    )


class _Malicious:
    def __reduce__(self):
        return os.system, ("touch run",)


def _pickle(place: Place, folder: Path):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Malicious()}))


def _torch_pickle(place: Place, folder: Path):
    (folder / WEIGHTS).unlink()
    torch.save({"a": _Malicious()}, folder / "pytorch_model.bin")


def _embedding(name: str, tensor: torch.Tensor):
    return lambda p, f: _weights(f, lambda weights: weights | {name: tensor})


EMBEDDING = "model.language_model.embed_tokens.weight"
POISONS: dict[str, tuple[Callable[[Place, Path], object], tuple[str, ...]]] = {
    "a misshapen tensor": (_embedding(EMBEDDING, torch.zeros(3, 3)), ("embed_tokens",)),
    "NaN in a tensor": (
        lambda p, f: _weights(f, lambda w: w | {EMBEDDING: torch.full_like(w[EMBEDDING], torch.nan)}),
        ("NaN", "embed_tokens"),
    ),
    "a tensor of integers": (
        lambda p, f: _weights(f, lambda w: w | {EMBEDDING: w[EMBEDDING].to(torch.int32)}),
        ("embed_tokens",),
    ),
    "a missing tensor": (
        lambda p, f: _weights(f, lambda w: {name: w[name] for name in w if name != EMBEDDING}),
        ("embed_tokens",),
    ),
    "half the weights": (lambda p, f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]), ()),
    "weights of text": (lambda p, f: (f / WEIGHTS).write_text("no weights"), ()),
    "no weights": (lambda p, f: (f / WEIGHTS).unlink(), (WEIGHTS,)),
    "a malicious pickle": (_pickle, ("not opened",)),
    "a malicious archive": (_torch_pickle, ("not opened",)),
    "an index out of the folder": (_index, ("outside of its folder",)),
    "an index without names": (lambda p, f: p.file(f"{f.name}/{WEIGHTS}.index.json", "{}"), ("weight_map",)),
    "no config": (lambda p, f: (f / "config.json").unlink(), ("config",)),
    "a config of text": (lambda p, f: (f / "config.json").write_text("{"), ("config.json",)),
    "a config that is a list": (lambda p, f: (f / "config.json").write_text("[1]"), ()),
    "a config that nests without end": (lambda p, f: (f / "config.json").write_text("[" * 100_000), ()),
    "vq_config: 5": (lambda p, f: _config(p, f, vq_config=5), ("vq_config",)),
    "vq_config: a list": (lambda p, f: _config(p, f, vq_config=[]), ("vq_config",)),
    "text_config: null": (lambda p, f: _config(p, f, text_config=None), ()),
    "text_config: a text": (lambda p, f: _config(p, f, text_config="large"), ("text_config",)),
    "a negative hidden_size": (lambda p, f: _config(p, f, text_config__hidden_size=-32), ("hidden_size",)),
    "a hidden_size of text": (lambda p, f: _config(p, f, text_config__hidden_size="32"), ("hidden_size",)),
    "an unknown tower": (lambda p, f: _config(p, f, vq_config__semantic_config__model_type="none"), ("none",)),
    "no tower": (lambda p, f: _config(p, f, vq_config__semantic_config={}), ("model_type",)),
    "another model": (lambda p, f: _config(p, f, model_type="bert"), ()),
    "a broken statement": (lambda p, f: _config(p, f, trained_on={"words": 5}), ("trained_on",)),
    "a generation config that is a list": (
        lambda p, f: (f / "generation_config.json").write_text("[]"),
        ("generation_config",),
    ),
    "settings that are a list": (
        lambda p, f: _json(f / "generation_config.json", image_sampling=[1]),
        ("image_sampling",),
    ),
    "settings of text": (
        lambda p, f: _json(f / "generation_config.json", image_sampling={"temperature": "hot"}),
        ("temperature", "hot"),
    ),
    "a tokenizer of text": (lambda p, f: (f / "tokenizer.json").write_text("{}"), ()),
    "half a tokenizer": (lambda p, f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:99]), ()),
    "a processor that is a list": (lambda p, f: (f / "processor_config.json").write_text("[]"), ()),
    "scales of text": (lambda p, f: _json(f / "processor_config.json", image_processor__scales="1234"), ()),
    "a broken template": (lambda p, f: (f / "chat_template.jinja").write_text("{% for %}"), ("template",)),
}


def _poisoned(name: str) -> Case:
    poison, words = POISONS[name]

    def act(place: Place):
        folder = place.copy()
        poison(place, folder)
        result = place.run("generate", "a red circle", "--model", folder)
        assert not Path("run").exists(), "the pickle was run"
        if "weights_only=False" in result.stderr:
            raise TypeError("it advises to open a pickle with code in it")
        return result

    return Case(MODELS, f"generate with {name}", act, words)


def _other(name: str, poison: str, arguments: Callable[[Place, Path], tuple], *words: str) -> Case:
    def act(place: Place):
        folder = place.copy()
        POISONS[poison][0](place, folder)
        return place.run(*arguments(place, folder))

    return Case(MODELS, f"{name} with {poison}", act, words)


def _extract(place: Place, folder: Path) -> tuple:
    return ("extract-codes", place.rows(image_row(str(place.image))), "--tokenizer", folder, "--output", "codes")


def _validate(place: Place, folder: Path) -> tuple:
    return ("validate-data", place.rows(image_row(str(place.image))), "--model", folder)


def _train(place: Place, folder: Path) -> tuple:
    rows = place.rows(image_row(str(place.image)))
    options = ("--set", "max_steps=1", "--set", "bf16=false", "--set", "use_cpu=true")
    return ("train", "sft", "--model", folder, "--data", rows, "--output", "out", *options)


MODEL_CASES = [
    *map(_poisoned, POISONS),
    _other("extract-codes", "an index out of the folder", _extract, "outside of its folder"),
    _other("extract-codes", "vq_config: 5", _extract, "vq_config"),
    _other("extract-codes", "another model", _extract),
    _other("extract-codes", "no config", _extract, "config"),
    _other("validate-data", "a config that is a list", _validate),
    _other("validate-data", "half a tokenizer", _validate),
    _other("train", "a misshapen tensor", _train, "embed_tokens"),
    _other("train", "scales of text", _train),
    _other("evaluate", "vq_config: 5", lambda p, f: ("evaluate", f), "vq_config"),
    _other("evaluate", "half a tokenizer", lambda p, f: ("evaluate", f)),
    _other("inspect", "half the weights", lambda p, f: ("inspect", f), "model.safetensors"),
    _other("inspect", "an index out of the folder", lambda p, f: ("inspect", f), "outside"),
    _other("inspect", "a malicious pickle", lambda p, f: ("inspect", f), "not opened"),
    Case(MODELS, "generate without a folder", lambda p: p.run("generate", "a", "--model", "no/folder"), ("no/folder",)),
    Case(MODELS, "generate with a file", lambda p: p.run("generate", "a", "--model", p.image), ("own.png",)),
    Case(MODELS, "generate with no name", lambda p: p.run("generate", "a", "--model", ""), ("No model",)),
    Case(MODELS, "inspect nothing", lambda p: p.run("inspect", "none"), ("none",)),
    Case(MODELS, "a device that is none", lambda p: p.draw("--device", "nowhere"), ("nowhere",)),
]  # fmt: skip


# --- Recipes, configs, notes, rows --------------------------------------------------------------------------------


def _recipe(name: str, content: str | bytes, *words: str, changes: tuple[str, ...] = ()) -> Case:
    def act(place: Place):
        options = [part for change in changes for part in ("--set", change)]
        rows = place.rows(image_row(str(place.image)))
        recipe = place.file("own.yaml", content)
        return place.run("train", recipe, "--model", place.model, "--data", rows, "--output", "out", *options)

    return Case(TYPED, f"recipe: {name}", act, words)


def _row(name: str, row, *words: str) -> Case:
    def act(place: Place):
        result = place.run("validate-data", place.rows(row))
        if result.exit_code == 1 and "row 0" in result.stderr:
            raise ValueError(result.stderr)
        return result

    return Case(TYPED, f"row: {name}", act, ("row 0", *words))


def _vq(name: str, *words: str, **values) -> Case:
    return Case(TYPED, f"tokenizer config: {name}", lambda place: tiny_vq_config(**values), words)


def _note(name: str, content, *words: str) -> Case:
    def act(place: Place):
        place.file("codes/extraction.json", content)
        return place.run("check-codes", "codes")

    return Case(TYPED, f"note: {name}", act, ("extraction.json", *words))


TRANSFORMER = "kind: transformer\n"
TOWER = tiny_vq_config().semantic_config.to_dict()
SETTINGS = {"source": "rows.jsonl", "source_rows": 1, "tokenizer": "model", "fingerprint": "0"}
CONVOLUTIONS = {"pixel_encoder_type": "convolutional", "pixel_channel_multipliers": [1, 2, 2]}

TYPED_CASES = [
    _recipe("not valid YAML", "kind: [", "own.yaml", "not valid YAML"),
    _recipe("a tag that runs code", "kind: !!python/object/apply:os.system ['touch run']", "not valid YAML"),
    _recipe("nests without end", "[" * 1500, "not valid YAML"),
    _recipe("not UTF-8", b"kind: \xff", "UTF-8"),
    _recipe("a list", "- kind", "is not a recipe"),
    _recipe("empty", "", "is not a recipe"),
    _recipe("kind is missing", "level: 16\n", "own.yaml", "lacks kind"),
    _recipe("kind is a number", "kind: 5\n", "kind", "5"),
    _recipe("arguments: 5", TRANSFORMER + "arguments: 5\n", "arguments", "5"),
    _recipe("arguments: a list", TRANSFORMER + "arguments: [1]\n", "arguments"),
    _recipe("level is a text", TRANSFORMER + "level: large\n", "level", "'large'"),
    _recipe("train is a number", TRANSFORMER + "train: 5\n", "train", "5"),
    _recipe("a share of text", TRANSFORMER + "caption_share: much\n", "caption_share", "'much'"),
    _recipe("a misspelt field", TRANSFORMER + "levle: 16\n", "'levle'", "level"),
    _recipe("learning_rate=abc", TRANSFORMER, "learning_rate", "'abc'", changes=("learning_rate=abc",)),
    _recipe("max_steps=1.5", TRANSFORMER, "max_steps", "1.5", changes=("max_steps=1.5",)),
    _recipe("max_steps=[1]", TRANSFORMER, "max_steps", changes=("max_steps=[1]",)),
    _recipe("muon=maybe", TRANSFORMER, "muon", "'maybe'", changes=("muon=maybe",)),
    _recipe("eval_strategy=off", TRANSFORMER, "eval_strategy", changes=("eval_strategy=off",)),
    _recipe("lr=1", TRANSFORMER, "'lr'", "learning_rate", changes=("lr=1",)),
    _recipe("a change without a value", TRANSFORMER, "name=value", changes=("max_steps",)),
    _recipe("a change that is no YAML", TRANSFORMER, "max_steps", changes=("max_steps=[",)),
    Case(
        TYPED, "recipe: a path of 5,000 characters",
        lambda p: p.run("train", "a" * 5000, "--model", p.model, "--data", "a", "--output", "out"), ("neither a file",),
    ),
    _vq("pixel_channels=48", "pixel_channels", "32", **CONVOLUTIONS, pixel_channels=48),
    _vq("pixel_decoder_channels=40", "pixel_decoder_channels", "32", **CONVOLUTIONS, pixel_decoder_channels=40),
    _vq("pixel_channels=0", "pixel_channels", pixel_channels=0),
    _vq("codebook_size='32'", "codebook_size", "'32'", codebook_size="32"),
    _vq("codebook_size=32.5", "codebook_size", "32.5", codebook_size=32.5),
    _vq("scales of text", "scales", scales=["1", "2"]),
    _vq("levels: 5", "levels", levels=5),
    _vq("an unknown activation", "semantic_decoder_hidden_act", semantic_decoder_hidden_act="zelu"),
    _vq("NaN as a weight", "commitment_weight", commitment_weight=float("nan")),
    _vq("a tower of 5 heads", "num_attention_heads", semantic_config=TOWER | {"num_attention_heads": 5}),
    _vq("a tower without a type", "model_type", semantic_config={"hidden_size": 16}),
    _vq("a tower: 5", "semantic_config", semantic_config=5),
    Case(TYPED, "config: rope_range of text", lambda p: tiny_config(rope_range="wide"), ("rope_range",)),
    Case(TYPED, "config: 5 heads", lambda p: tiny_config({"num_attention_heads": 5}), ("num_attention_heads",)),
    Case(TYPED, "config: no layers", lambda p: tiny_config({"num_hidden_layers": 0}), ("num_hidden_layers",)),
    Case(TYPED, "config: text_config=5", lambda p: NextFlowConfig(text_config=5), ("text_config",)),
    Case(TYPED, "config: a change of type", lambda p: setattr(tiny_vq_config(), "scales", "x"), ("scales",)),
    _note("not valid JSON", "{"),
    _note("a list", "[]"),
    _note("a number of text", SETTINGS | {"source_rows": "many"}, "source_rows", "'many'"),
    _note("a field is missing", {"source": "rows.jsonl"}, "lacks"),
    _note("a field too many", SETTINGS | {"seeds": 5}, "'seeds'", "seed"),
    _row("images: 5", image_row(None) | {"images": 5}, "images", "5"),
    _row("image_tokens: 5", image_row(None) | {"image_tokens": 5}, "image_tokens", "5"),
    _row("messages: 5", {"messages": 5}, "messages"),
    _row("a number", "5", "row"),
    _row("not valid JSON", "{", "JSON"),
    _row("nests without end", "[" * 100_000, "JSON"),
    _row("an image: 5", image_row(5), "image", "int"),
    _row("a path of 5,000 characters", image_row("a" * 5000), "messages[0].content[0].image"),
    _row("a path with a NUL", image_row("a\0b"), "messages[0].content[0].image"),
    _row("a pirate", {"messages": [{"role": "pirate", "content": "a"}]}, "role", "pirate"),
    _row("train: maybe", {"messages": [{"role": "user", "content": "a", "train": "maybe"}]}, "train"),
    Case(TYPED, "rows: no such file", lambda p: p.run("validate-data", "none.jsonl"), ("none.jsonl",)),
    Case(TYPED, "rows: Parquet of text", lambda p: p.run("validate-data", p.file("a.parquet", "a")), ("a.parquet",)),
    Case(TYPED, "rows: an image", lambda p: p.run("validate-data", p.image), ("own.png",)),
    Case(TYPED, "rows: none", lambda p: p.run("validate-data", p.rows()), expected=RIGHT),
    Case(TYPED, "options: no such suite", lambda p: p.run("evaluate", p.model, "--suite", "photos"), ("photos",)),
    Case(TYPED, "options: a dtype that is none", lambda p: p.draw("--dtype", "int8"), ("dtype",)),
    Case(TYPED, "options: no number", lambda p: p.draw("--height", "tall"), ("--height",)),
    Case(TYPED, "options: an unknown one", lambda p: p.draw("--steps", 5), ("--steps",)),
    Case(
        TYPED, "options: on_bad_image", lambda p: p.run("validate-data", p.rows(), "--on-bad-image", "cry"), ("cry",),
    ),
]  # fmt: skip


# --- Signals ------------------------------------------------------------------------------------------------------


def _interrupted(holder, name: str, arguments: Callable[[Place], tuple], after: int = 0):
    def act(place: Place):
        given = arguments(place)
        with broken(holder, name, KeyboardInterrupt(), after):
            return place.run(*given)

    return act


def _some_rows(place: Place, count: int = 3) -> Path:
    return place.rows(*[image_row(str(place.image))] * count)


def _interrupted_training(place: Place):
    from transformers import Trainer

    arguments = ("max_steps=3", "save_steps=1", "save_strategy=steps", "per_device_train_batch_size=1", "bf16=false")
    options = [part for change in (*arguments, "use_cpu=true", "packing=padding") for part in ("--set", change)]
    recipe = place.file("own.yaml", TRANSFORMER)
    with broken(Trainer, "training_step", KeyboardInterrupt(), after=1):
        return place.run(
            "train", recipe, "--model", place.model, "--data", _some_rows(place), "--output", "out", *options
        )


def _interrupted_conversion(place: Place):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from transformers_nextflow.utils.one_line_errors import errors_in_one_line

    SiglipVisionModel(SiglipVisionConfig(**tiny_vq_config().semantic_config.to_dict())).save_pretrained("source")
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()

    @app.command()
    def convert():
        with errors_in_one_line():
            siglip2.convert_siglip2(Path("source"), Path("target"), tiny_vq_config())

    with broken(siglip2, "write_model_card", KeyboardInterrupt()):
        return CliRunner().invoke(app, [])


SIGNAL_CASES = [
    Case(
        SIGNALS, "Ctrl-C in generate",
        _interrupted(NextFlowPipeline, "__call__", lambda p: ("generate", "a red circle", "--model", p.model)),
        ("Interrupted", "Nothing was written"),
    ),
    Case(
        SIGNALS, "Ctrl-C in extract-codes",
        _interrupted(
            code_extraction._Encoder, "encode",
            lambda p: ("extract-codes", _some_rows(p), "--tokenizer", p.model, "--output", "codes", "--shard-size", 1),
            after=1,
        ), ("Interrupted", "1 of 3 shards are kept"),
    ),
    Case(SIGNALS, "Ctrl-C in train", _interrupted_training, ("Interrupted", "checkpoint-1", "--resume")),
    Case(SIGNALS, "Ctrl-C in a converter", _interrupted_conversion, ("Interrupted", "target.partial")),
    Case(
        SIGNALS, "Ctrl-C in inspect", _interrupted(checkpoints, "read_layout", lambda p: ("inspect", p.model)),
        ("Interrupted",),
    ),
    Case(
        SIGNALS, "Ctrl-C while a model is loaded",
        _interrupted(NextFlowPipeline, "from_pretrained", lambda p: ("generate", "a", "--model", p.model)),
        ("Interrupted",),
    ),
]  # fmt: skip

CASES = [*MODEL_CASES, *TYPED_CASES, *SIGNAL_CASES]
