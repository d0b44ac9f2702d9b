"""Cases of settings in calls, configs and statements, of devices, of pipes, and of results that are half written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from bad_input import Case, Place, broken
from checkpoints_and_recipes import MODELS, TRANSFORMER, TYPED, _config, _extract, _json, _recipe, _weights
from files_and_images import OUTPUTS
from PIL import Image
from tiny import tiny_config, tiny_tokenizer, tiny_vq_config
from words_and_calls import BOUNDS, CALLS, _outside, _seeded, user

from transformers_nextflow import (
    NextFlowImageProcessor,
    NextFlowPipeline,
    NextFlowProcessor,
    cli,
)


def _case(kind: str, name: str, act, *words: str) -> Case:
    return Case(kind, name, act, words)


# --- Settings of calls --------------------------------------------------------------------------------------------

SETTINGS = {
    "top_k": (True, "top_k", "True"),
    "top_p": (True, "top_p", "True"),
    "guidance_scale": (1e30, "guidance_scale", "1000"),
    "image_guidance_scale": (True, "image_guidance_scale", "True"),
    "num_unguided_scales": (True, "num_unguided_scales", "True"),
    "guidance_ramp": ("no", "guidance_ramp", "'no'"),
    "max_thought_tokens": ("x", "max_thought_tokens", "'x'"),
    "thought_temperature": ("hot", "thought_temperature", "'hot'"),
    "candidate_scorer": (5, "candidate_scorer", "function", "5"),
    "callback_on_step_end": (5, "callback_on_step_end", "function", "5"),
    "callback_on_step_end_tensor_inputs": (5, "callback_on_step_end_tensor_inputs", "5"),
}
CHATS = {
    "max_new_tokens": ("5", "max_new_tokens", "'5'"),
    "temperature": ("hot", "temperature", "'hot'"),
    "do_sample": ("yes", "do_sample", "'yes'"),
    "stop_strings": (5, "stop_strings", "5"),
    "eos_token_id": ("end", "eos_token_id", "'end'"),
    "streamer": (5, "streamer", "put"),
    "sampling": ({"temperature": 1}, "sampling", "ImageSampling"),
    "max_images": (True, "max_images", "True"),
}


def _call(name: str) -> Case:
    value, *words = SETTINGS[name]
    return _case(CALLS, f"call {name}={value}", lambda p: p.pipe("a red circle", **{name: value}), *words)


def _chat(name: str) -> Case:
    value, *words = CHATS[name]
    given = {"max_images": 0, "max_new_tokens": 1, name: value}
    return _case(CALLS, f"chat {name}={value}", lambda p: p.pipe.chat([user("a")], **given), *words)


CALL_CASES = [
    *map(_call, SETTINGS),
    *map(_chat, CHATS),
    _case(
        CALLS, "a temperature of no thought", lambda p: p.pipe("a", thought_temperature=0.5),
        "thought_temperature", "think",
    ),
    _case(
        CALLS, "video max_transition_tokens='x'",
        lambda p: p.pipe.video("a red circle", num_frames=2, max_transition_tokens="x"), "max_transition_tokens",
    ),
    _case(
        CALLS, "processor level='x'",
        lambda p: p.pipe.processor(text="<|image_pad|>", images=np.zeros((16, 16, 3), "u1"), level="x"), "level", "'x'",
    ),
    _case(CALLS, "a pipeline without a model", lambda p: NextFlowPipeline(None, p.pipe.processor), "model"),
    _case(
        CALLS, "a pipeline of a tokenizer", lambda p: NextFlowPipeline(p.pipe.model, tiny_tokenizer()), "processor",
    ),
    _case(CALLS, "scales: 5", lambda p: NextFlowImageProcessor(scales=5), "scales", "5"),
    _case(CALLS, "scales: '12'", lambda p: NextFlowImageProcessor(scales="12"), "scales", "'12'"),
    _case(CALLS, "scales of fractions", lambda p: NextFlowImageProcessor(scales=[1, 2.5]), "scales", "2.5"),
    _case(CALLS, "patch_size='4'", lambda p: NextFlowImageProcessor(patch_size="4"), "patch_size", "'4'"),
    _case(CALLS, "levels without scales", lambda p: NextFlowImageProcessor(levels=[[256]]), "levels", "256"),
    _case(
        CALLS, "think_prefix=5",
        lambda p: NextFlowProcessor(NextFlowImageProcessor(), tiny_tokenizer(), think_prefix=5), "think_prefix", "5",
    ),
]  # fmt: skip


# --- Configs, statements and recipes ------------------------------------------------------------------------------


def _rope(**values) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} | values}


def _statement(**values):
    return lambda place: tiny_config(trained_on={"domain": "shapes"} | values)


TOWER = tiny_vq_config().semantic_config.to_dict()
CONFIG_CASES = [
    _case(TYPED, "config: levels without scales", lambda p: tiny_vq_config(levels=[[16]]), "levels", "16"),
    _case(TYPED, "config: levels of fractions", lambda p: tiny_vq_config(levels=[[16, 4.7]]), "levels", "4.7"),
    _case(TYPED, "config: 10^9 layers", lambda p: tiny_vq_config(semantic_decoder_depth=10**9), "at most 1000"),
    _case(
        TYPED, "config: a tower of 10^9 layers",
        lambda p: tiny_vq_config(semantic_config=TOWER | {"num_hidden_layers": 10**9}), "num_hidden_layers", "1000",
    ),
    _case(TYPED, "config: rope_theta 0", lambda p: tiny_config(_rope(rope_theta=0)), "rope_theta", "0"),
    _case(TYPED, "config: mrope_section of texts", lambda p: tiny_config(_rope(mrope_section=["a"])), "mrope_section"),
    _case(TYPED, "statement: no domain", _statement(domain=" "), "domain"),
    _case(TYPED, "statement: no words", _statement(words=[]), "words"),
    _case(TYPED, "statement: sizes of one side", _statement(sizes=[[64]]), "sizes", "height and width"),
    _case(TYPED, "statement: no sizes", _statement(sizes=[]), "sizes"),
    _case(TYPED, "statement: -1 at most", _statement(most=-1), "most", "-1"),
    _recipe("output_dir in arguments", TRANSFORMER, "output_dir", changes=("output_dir=x",)),
    _recipe("decoder_width=0", TRANSFORMER, "decoder_width", "0", changes=("decoder_width=0",)),
    _recipe("save_total_limit=-1", TRANSFORMER, "save_total_limit", "-1", changes=(
        "save_total_limit=-1", "use_cpu=true", "bf16=false",
    )),
]  # fmt: skip


# --- Model folders ------------------------------------------------------------------------------------------------


def _folder(name: str, damage, *words: str, command=lambda place, folder: None) -> Case:
    def act(place: Place):
        folder = place.copy()
        damage(folder)
        given = command(place, folder) or ("generate", "a red circle", "--model", folder)
        return place.run(*given)

    return _case(MODELS, f"folder: {name}", act, *words)


def _describe(place: Place, folder: Path) -> tuple:
    return ("describe", place.image, "--model", folder)


def _pipe(folder: Path):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


MODEL_CASES = [
    _folder(
        "a processor of another model", lambda f: _json(f / "processor_config.json", processor_class="CLIPProcessor"),
        "processor", "CLIPProcessor",
    ),
    _folder("a think_prefix of 5", lambda f: _json(f / "processor_config.json", think_prefix=5), "think_prefix", "5"),
    _folder("a template that divides", lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "template"),
    _folder(
        "a template that counts too far",
        lambda f: (f / "chat_template.jinja").write_text("{% for i in range(10**9) %}{% endfor %}"), "template",
    ),
    _folder(
        "an end of text", lambda f: _json(f / "generation_config.json", eos_token_id="end"), "eos_token_id", "'end'",
        command=_describe,
    ),
    _folder(
        "a hot temperature", lambda f: _json(f / "generation_config.json", temperature="hot"), "temperature", "'hot'",
        command=_describe,
    ),
    _folder(
        "a ramp of text", lambda f: _json(f / "generation_config.json", image_sampling={"guidance_ramp": "no"}),
        "guidance_ramp", "'no'",
    ),
    _folder(
        "weights beyond all measure", lambda f: _weights(f, lambda w: {name: w[name] * 1e30 for name in w}),
        "logits", "NaN or infinity",
    ),
    _folder("rope_theta 0", lambda f: _config(None, f, text_config__rope_parameters__rope_theta=0), "rope_theta"),
    _case(
        MODELS, "extract-codes with a pipe as weights",
        lambda p: p.run(*_extract(p, _piped(p))), "model.safetensors",
    ),
    _case(
        MODELS, "inspect a pipe", lambda p: (os.mkfifo("f.safetensors"), p.run("inspect", "f.safetensors"))[1], "pipe",
    ),
]  # fmt: skip


def _piped(place: Place) -> Path:
    folder = place.copy()
    _pipe(folder)
    return folder


# --- Devices, seeds and memory ------------------------------------------------------------------------------------


def _extraction(*options):
    return lambda place: place.run(*_extract(place, place.model), *options)


def _full(error: BaseException):
    def act(place: Place):
        with broken(NextFlowPipeline, "__call__", error):
            return place.draw()

    return act


DEVICE_CASES = [
    _case(BOUNDS, "generate --device meta", lambda p: p.draw("--device", "meta"), "'meta'"),
    _case(BOUNDS, "generate --device ''", lambda p: p.draw("--device", ""), "Device ''"),
    _case(BOUNDS, "extract-codes --device nowhere", _extraction("--device", "nowhere"), "'nowhere'"),
    _case(
        BOUNDS, "evaluate --device nowhere", lambda p: p.run("evaluate", p.model, "--device", "nowhere"), "'nowhere'"
    ),
    _case(BOUNDS, "extract-codes --seed of 30 digits", _extraction("--seed", 10**30), "seed"),
    _case(
        BOUNDS, "extract-codes of no level leaves no rows out",
        _extraction("--level", 7, "--on-bad-image", "skip"), "Level 7", "16",
    ),
    _case(BOUNDS, "generate --guidance-scale 3e38", lambda p: p.draw("--guidance-scale", "3e38"), "1000"),
    _case(BOUNDS, "the memory is full", _full(MemoryError()), "memory is full", "fewer"),
    _case(BOUNDS, "a GPU's memory is full", _full(torch.OutOfMemoryError("CUDA out of memory")), "fewer"),
]  # fmt: skip


# --- Outputs ------------------------------------------------------------------------------------------------------


def _interrupted_saving(place: Place):
    with broken(cli, "write_with_fallback", KeyboardInterrupt(), after=1):
        return place.draw("--num-images", 3)


OUTPUT_CASES = [
    _case(OUTPUTS, "Ctrl-C between two images", _interrupted_saving, "Interrupted", "nextflow-0.png"),
    _case(
        OUTPUTS, "an image that is too large for its format",
        lambda p: p.draw("--output", "a.webp", "--height", 8, "--width", 32, "--scale", 512), "16384x4096", ".png",
    ),
    _case(
        OUTPUTS, "the 150th image is a folder",
        lambda p: (os.mkdir("o-150.png"), p.draw("--output", "o.png", "--num-images", 200))[1], "o-150.png is a folder",
    ),
    _case(
        OUTPUTS, "a preview whose name is too long",
        lambda p: p.draw("--output", "s" * 248 + ".png", "--previews", "previews"), "too long",
    ),
    _case(OUTPUTS, "recipes into a file", lambda p: p.run("recipes", "--copy", p.file("f") / "r"), "is not a folder"),
]  # fmt: skip


# --- Outside of the training --------------------------------------------------------------------------------------


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


OUTSIDE_CASES = [
    _outside("a raised number", lambda p: p.shapes("⁵ stars", generator=_seeded()), "'⁵'"),
    _outside("signs without words", lambda p: p.shapes("🔴🔴", generator=_seeded()), "'🔴'"),
    _outside("punctuation", lambda p: p.shapes("!!!", generator=_seeded()), "'!!!'"),
    _outside(
        "a negative prompt",
        lambda p: p.shapes("a star", negative_prompt="blurry", guidance_scale=2, generator=_seeded()), "'blurry'",
    ),
    _outside(
        "a script", lambda p: p.shapes.video([["a red circle", "a dog comes"]], generator=_seeded()), "'dog'",
    ),
    _outside("a score of noise", lambda p: p.shapes.score([_noise()], ["a star"]), "Image 0", "dB"),
    _outside("a score of a cat", lambda p: p.shapes.score([Image.new("RGB", (64, 64))], ["a cat"]), "'cat'"),
    _outside(
        "a size in a chat",
        lambda p: p.shapes.chat([user("a star")], height=32, width=128, max_images=0, max_new_tokens=1), "32x128",
    ),
]  # fmt: skip

CASES = [*CALL_CASES, *CONFIG_CASES, *MODEL_CASES, *DEVICE_CASES, *OUTPUT_CASES, *OUTSIDE_CASES]
