"""Cases of texts, of calls on the pipeline, of bounds, and of what lies outside of a checkpoint's training."""

from __future__ import annotations

import asyncio
import warnings
from unittest import mock

import numpy as np
import torch
from bad_input import BUNDLED, RIGHT, WARNED, Case, Place
from PIL import Image

from transformers_nextflow import ImageSampling, video_processing_nextflow


WORDS, CALLS, BOUNDS, OUTSIDE = "words", "Python API", "bounds", "outside of the training"

# --- Texts --------------------------------------------------------------------------------------------------------

SURROGATE, NOT_UTF8, NONCHARACTER = "a \ud800 star", b"a \xff star".decode("utf-8", "surrogateescape"), "a \ufdd0 star"
RIGHT_TO_LEFT, NUL, LONG = "כוכב אדום \u202e star", "a \0 star", "a star " * 15_000
TEXTS = {
    "a lone surrogate": (SURROGATE, ("surrogate",)),
    "bytes that are not UTF-8": (NOT_UTF8, ("surrogate", "UTF-8")),
    "a noncharacter": (NONCHARACTER, ("U+FDD0",)),
    "right to left": (RIGHT_TO_LEFT, ()),
    "a NUL": (NUL, ()),
    "100,000 characters": (LONG, ("positions",)),
}
SURFACES = {
    "generate": lambda place, text: place.run("generate", text, "--model", place.model),
    "edit": lambda place, text: place.run("edit", text, "--image", place.image, "--model", place.model),
    "describe --question": lambda place, text: place.run(
        "describe", place.image, "--question", text, "--model", place.model, "--max-new-tokens", 1
    ),
    "score": lambda place, text: place.run("score", text, "--image", place.image, "--model", place.model),
    "video": lambda place, text: place.run("video", "a star", text, "--model", place.model),
    "chat": lambda place, text: place.pipe.chat([user(text)], max_new_tokens=1, max_images=0),
    "processor": lambda place, text: place.pipe.processor(text=text),
    "validate-data": lambda place, text: _validated(place, text),
}
LEFT_OUT = {("processor", "100,000 characters"), ("validate-data", "100,000 characters")}


def user(text) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def _validated(place: Place, text: str):
    result = place.run("validate-data", place.rows({"messages": [user(text), {"role": "assistant", "content": "a"}]}))
    if result.exit_code == 1 and "messages[0].content[0].text" in result.stderr:
        raise ValueError(result.stderr)  # it lists what it finds
    return result


def _text_case(surface: str, text: str) -> Case:
    given, words = TEXTS[text]
    return Case(
        WORDS, f"{surface}: {text}", lambda place: SURFACES[surface](place, given), words, "refused" if words else RIGHT
    )


WORD_CASES = [
    *(_text_case(surface, text) for surface in SURFACES for text in TEXTS if (surface, text) not in LEFT_OUT),
    Case(
        WORDS, "generate: a negative prompt with a lone surrogate",
        lambda p: p.draw("--negative-prompt", SURROGATE, "--guidance-scale", 2), ("surrogate",),
    ),
    Case(WORDS, "generate: nothing but white space", lambda p: p.run("generate", " ", "--model", p.model), ("empty",)),
    Case(WORDS, "an image whose name is not UTF-8", lambda p: p.draw("--output", "\udcff.png"), expected=RIGHT),
    Case(
        WORDS, "a missing model whose name is not UTF-8",
        lambda p: p.run("generate", "a", "--model", "\udcff"), ("No model can be loaded",),
    ),
    Case(WORDS, "a chat template that refuses", lambda p: _refusing(p), ("no stars",)),
]  # fmt: skip


def _refusing(place: Place):
    return place.pipe.processor.apply_chat_template([user("a")], chat_template="{{ raise_exception('no stars') }}")


# --- Calls --------------------------------------------------------------------------------------------------------


def _call(name: str, call, *words: str, expected: str = "refused") -> Case:
    return Case(CALLS, name, call, words, expected)


def _array() -> np.ndarray:
    return np.zeros((16, 16, 3), dtype=np.uint8)


CALL_CASES = [
    _call("chat of a string", lambda p: p.pipe.chat("hi"), "messages"),
    _call("chat of strings", lambda p: p.pipe.chat(["hi"]), "messages[0]", "role and content"),
    _call("chat of nothing", lambda p: p.pipe.chat([]), "messages"),
    _call("chat of empty messages", lambda p: p.pipe.chat([{}]), "messages[0].role"),
    _call("chat of empty chats", lambda p: p.pipe.chat([[]]), "messages[0]"),
    _call("chat of None", lambda p: p.pipe.chat(None), "messages"),
    _call("a pirate", lambda p: p.pipe.chat([{"role": "pirate", "content": "hi"}]), "role", "pirate", "user"),
    _call("a message without content", lambda p: p.pipe.chat([{"role": "user"}]), "messages[0].content"),
    _call("a text that is None", lambda p: p.pipe.chat([user(None)]), "messages[0].content[0].text"),
    _call("a text that is a number", lambda p: p.pipe.chat([user(5)]), "messages[0].content[0].text", "5"),
    _call("an unknown part", lambda p: p.pipe.chat([{"role": "user", "content": [{"type": "audio"}]}]), "audio"),
    _call("a part that is a string", lambda p: p.pipe.chat([{"role": "user", "content": ["hi"]}]), "content[0].type"),
    _call(
        "an image part without an image", lambda p: p.pipe.chat([{"role": "user", "content": [{"type": "image"}]}]),
        "content[0].image", "missing",
    ),
    _call("seed=", lambda p: p.pipe("a", seed=1), "'seed'", "generator"),
    _call("num_inference_steps=", lambda p: p.pipe("a", num_inference_steps=50), "num_inference_steps", "scales"),
    _call("strength=", lambda p: p.pipe("a", image=_array(), strength=0.5), "strength", "num_kept_scales"),
    _call("guidance=", lambda p: p.pipe("a", guidance=3), "guidance", "guidance_scale"),
    _call("cfg_scale=", lambda p: p.pipe("a", cfg_scale=3), "guidance_scale"),
    _call("mask=", lambda p: p.pipe("a", image=_array(), mask=_array()), "mask_image"),
    _call("heigth=", lambda p: p.pipe("a", heigth=16), "did you mean height"),
    _call("num_images=", lambda p: p.pipe("a", num_images=2), "num_images_per_prompt"),
    _call("video(seed=)", lambda p: p.pipe.video("a", num_frames=2, seed=1), "'seed'", "generator"),
    _call("video(guidance=)", lambda p: p.pipe.video("a", num_frames=2, guidance=1), "guidance_scale"),
    _call("chat(seed=)", lambda p: p.pipe.chat([user("a")], seed=1), "seed", "generator"),
    _call("chat(max_tokens=)", lambda p: p.pipe.chat([user("a")], max_tokens=1), "max_new_tokens"),
    _call("score(image=)", lambda p: p.pipe.score(image=[_array()], prompts=["a"]), "'image'", "images"),
    _call("generate_images(seed=)", lambda p: p.pipe.model.generate_images(seed=1), "'seed'", "generator"),
    _call("ImageSampling of unknown names", lambda p: ImageSampling.from_dict({"guidance": 1}), "guidance_scale"),
    _call("height as a text", lambda p: p.pipe("a", height="64"), "height", "'64'"),
    _call("width as a fraction", lambda p: p.pipe("a", width=16.5), "width", "16.5"),
    _call("prompt None", lambda p: p.pipe(None), "prompts"),
    _call("prompt of numbers", lambda p: p.pipe([1]), "Prompt 0"),
    _call("no prompts", lambda p: p.pipe([]), "prompts"),
    _call("half an image", lambda p: p.pipe("a", num_images_per_prompt=0.5), "num_images_per_prompt", "0.5"),
    _call("True images", lambda p: p.pipe("a", num_images_per_prompt=True), "num_images_per_prompt"),
    _call("guidance as a text", lambda p: p.pipe("a", guidance_scale="high"), "guidance_scale", "'high'"),
    _call("a seed as generator", lambda p: p.pipe("a", generator=5), "generator"),
    _call("output as bytes", lambda p: p.pipe("a", output_type="bytes"), "output_type"),
    _call("frames as a text", lambda p: p.pipe.video("a", num_frames="3"), "num_frames"),
    _call("a script with a number", lambda p: p.pipe.video(["a", 5]), "5"),
    _call("a script in a script", lambda p: p.pipe.video([["a", 5]]), "5"),
    _call("images as a text", lambda p: p.pipe.chat([user("a")], max_images="1"), "max_images"),
    _call("score without lists", lambda p: p.pipe.score(_array(), "a"), "lists"),
    _call("texts of numbers", lambda p: p.pipe.processor(text=[1]), "text"),
]  # fmt: skip


# --- Bounds -------------------------------------------------------------------------------------------------------


def _silent_reward(place: Place):
    from transformers_nextflow.trainers.rl.checked_reward import validated_reward

    async def reward(completions, **columns):
        await asyncio.sleep(60)

    return asyncio.run(validated_reward(reward, timeout=0.1)(completions=[1]))


def _long_video(place: Place):
    frames = [Image.new("L", (16, 16), shade) for shade in range(8)]
    frames[0].save("long.gif", save_all=True, append_images=frames[1:])
    with mock.patch.object(video_processing_nextflow, "MAX_PIXELS", 1000, create=True):
        return place.run("describe", "long.gif", "--model", place.model)


BOUND_CASES = [
    Case(BOUNDS, "--scale 3000", lambda p: p.draw("--scale", 3000), ("--scale 3000", "use")),
    Case(
        BOUNDS, "video --scale 5000", lambda p: p.run("video", "a", "b", "--model", p.model, "--scale", 5000),
        ("--scale 5000",),
    ),
    Case(
        BOUNDS, "a million candidates", lambda p: p.draw("--num-candidates", 10**6), ("1000000", "max_batch_size"),
    ),
    Case(BOUNDS, "a million images", lambda p: p.draw("--num-images", 10**6), ("1000000", "max_batch_size")),
    Case(
        BOUNDS, "API: a million images", lambda p: p.pipe("a", num_images_per_prompt=10**6), ("max_batch_size",),
    ),
    Case(
        BOUNDS, "1,000 frames", lambda p: p.run("video", "a", "--num-frames", 1000, "--model", p.model), ("positions",),
    ),
    Case(
        BOUNDS, "a billion frames", lambda p: p.run("video", "a", "--num-frames", 10**9, "--model", p.model),
        ("num_frames", "1024"),
    ),
    Case(
        BOUNDS, "a billion tokens",
        lambda p: p.run("describe", p.image, "--model", p.model, "--max-new-tokens", 10**9), ("positions",),
    ),
    Case(BOUNDS, "a seed of 20 digits", lambda p: p.draw("--seed", 10**20), ("--seed",)),
    Case(BOUNDS, "a negative seed", lambda p: p.draw("--seed", -1), ("--seed",)),
    Case(BOUNDS, "a height of 10 digits", lambda p: p.draw("--height", 10**10), ("1:4 to 4:1",)),
    Case(BOUNDS, "a reward that never answers", _silent_reward, ("did not answer", "reward_timeout")),
    Case(BOUNDS, "a GIF of too many pixels", _long_video, ("long.gif", "together")),
]  # fmt: skip


# --- Outside ------------------------------------------------------------------------------------------------------


def _photograph() -> Image.Image:
    """Neither flat nor on a lattice."""
    rows, columns = np.mgrid[0:64, 0:64]
    waves = np.stack([np.sin(rows / 7), np.cos(columns / 9), np.sin((rows + columns) / 5)], -1)
    return Image.fromarray(((waves + 1) * 127).astype(np.uint8))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _outside(name: str, act, *words: str, expected: str = WARNED) -> Case:
    return Case(OUTSIDE, name, act, words, expected)


def _within(place: Place):
    pipe = place.shapes
    circle = pipe("a red circle and two blue squares", generator=_seeded()).images[0]
    pipe("make the red circle green", image=circle, generator=_seeded())
    pipe.chat([user("how many red circles are there? say it plainly.")], max_images=0, max_new_tokens=1)
    assert not pipe._warned_kinds


def _once(place: Place):
    pipe = place.shapes
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for prompt in ("a photo of a cat", "a dog", "a red circle"):
            pipe(prompt, generator=_seeded())
    assert len([one for one in told if "never seen" in str(one.message)]) == 1


OUTSIDE_CASES = [
    _outside("a cat", lambda p: p.shapes("a photo of a cat", generator=_seeded()), "'cat'", "never seen", "shapes"),
    _outside("five stars", lambda p: p.shapes("five red stars", generator=_seeded()), "'five red stars'", "4"),
    _outside("9 circles", lambda p: p.shapes("9 circles", generator=_seeded()), "'9 circles'", "4"),
    _outside("another size", lambda p: p.shapes("a star", height=32, width=128), "32x128", "64x64"),
    _outside(
        "a photograph", lambda p: p.shapes("make it red", image=_photograph(), generator=_seeded()), "Image 0", "dB",
    ),
    _outside(
        "a photograph in a chat",
        lambda p: p.shapes.chat(
            [{"role": "user", "content": [{"type": "image", "image": _photograph()}, {"type": "text", "text": "a"}]}],
            max_images=0, max_new_tokens=1,
        ), "Image 0", "dB",
    ),
    _outside("a dog in a chat", lambda p: p.shapes.chat([user("a dog?")], max_images=0, max_new_tokens=1), "'dog'"),
    _outside(
        "a cat on the command line",
        lambda p: p.run("generate", "a cat", "--model", BUNDLED), "'cat'",
    ),
    _outside("what it knows", _within, expected=RIGHT),
    _outside("the same twice", _once, expected=RIGHT),
    _outside("a model without a statement", lambda p: p.pipe("a cat"), expected=RIGHT),
]  # fmt: skip

CASES = [*WORD_CASES, *CALL_CASES, *BOUND_CASES, *OUTSIDE_CASES]
