"""Make the transformer's training data: conversations about shapes, with the pictures' codes.

    python examples/shapes/make_data.py --tokenizer runs/tokenizer/final --output runs/data --processes 2

Half of the samples draw from a caption (one in ten of them without one, for guidance), and talk about the drawing; the
other half begin with a picture. One conversation asks several things of its picture: the picture's slots are most of a
sequence, and an answer is one word. Captions of the evaluation, and the pairs of shape and colour that are held out,
are never among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from transformers_nextflow import NextFlowImageProcessorPil, NextFlowProcessor, NextFlowVQModel, SelfCorrection
from transformers_nextflow.evaluation.shapes import (
    DESCRIPTIONS,
    Scene,
    World,
    drawing_example,
    question_about,
    question_example,
    render,
)
from transformers_nextflow.tokenization_nextflow import train_tokenizer


WORLD = World()
DRAWING_SHARE = 0.5
EMPTY_PROMPT_SHARE = 0.1
# How many things are asked of a drawing, and of a picture after the first question; how many of them are descriptions.
TURNS_AFTER_DRAWING, TURNS_AFTER_QUESTION = (0, 1, 2), (2, 3, 4)
DESCRIPTION_SHARE = 0.25
BATCH = 250
TEXT_VOCABULARY = 512


def plain(text: str, rng: np.random.Generator) -> str:
    """Prompts as people type them: some without their first article."""
    return text[2:] if text.startswith("a ") and rng.random() < 0.15 else text


def turn(question: str, answer: str, picture_first: bool = False) -> list[dict]:
    content = [{"type": "image"}] * picture_first + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def ask(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A question about the scene or a request to describe it, and the answer."""
    if rng.random() < DESCRIPTION_SHARE:
        request, describe = list(DESCRIPTIONS.values())[int(rng.integers(len(DESCRIPTIONS)))]
        return request, describe(scene, WORLD)
    return question_about(rng, WORLD, scene)


def sample(rng: np.random.Generator):
    """(messages, scene) of one conversation."""
    if rng.random() < DRAWING_SHARE:
        prompt, scene = drawing_example(rng, WORLD)
        prompt = "" if rng.random() < EMPTY_PROMPT_SHARE else plain(prompt, rng)
        messages = [
            {"role": "user", "content": [{"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ]
        turns = rng.choice(TURNS_AFTER_DRAWING)
    else:
        scene, question, answer = question_example(rng, WORLD)
        messages = turn(question, answer, picture_first=True)
        turns = rng.choice(TURNS_AFTER_QUESTION)
    return messages + [part for _ in range(turns) for part in turn(*ask(rng, scene))], scene


def texts(count: int, seed: int):
    """Texts of all kinds, for the tokenizer."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        for message in sample(rng)[0]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def make_processor(vq_model: NextFlowVQModel, read_last_scale: bool = False) -> NextFlowProcessor:
    config = vq_model.config
    image_processor = NextFlowImageProcessorPil(
        scales=list(config.scales), patch_size=config.patch_size, levels=config.levels
    )
    tokenizer = train_tokenizer(texts(20_000, seed=0), TEXT_VOCABULARY, lowercase=True)
    return NextFlowProcessor(image_processor, tokenizer, read_last_scale=read_last_scale)


@torch.no_grad()
def rows(tokenizer: str, count: int, seed: int, shards: list[int], correction: SelfCorrection | None):
    """`count` rows for each shard; a shard is a seed."""
    torch.set_num_threads(1)
    model = NextFlowVQModel.from_pretrained(tokenizer).eval()
    for shard in shards:
        rng = np.random.default_rng((seed, shard))
        generator = torch.Generator().manual_seed(seed * 1000 + shard)
        for _ in range(count // BATCH):
            samples = [sample(rng) for _ in range(BATCH)]
            pixels = torch.from_numpy(np.stack([render(scene, WORLD) for _, scene in samples]))
            pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
            codes = model.encode(pixels, correction, generator)
            grid = model.schedule_of(pixels).final_grid
            for (messages, _), tokens, labels in zip(samples, codes.image_tokens, codes.image_labels):
                drawn = messages[1]["content"][0]["type"] == "image"
                words = [word for m in messages for p in m["content"] for word in p.get("text", "").split()]
                yield {
                    # `None` fields are what Arrow makes of parts of different kinds: write them out.
                    "messages": [
                        {
                            "role": m["role"],
                            "content": [{"type": p["type"], "text": p.get("text", "")} for p in m["content"]],
                        }
                        for m in messages
                    ],
                    "image_tokens": [(tokens if drawn else labels).tolist()],
                    "image_labels": [labels.tolist()],
                    "image_grids": [list(grid)],
                    "length": len(tokens) + len(words) + 5 * len(messages),
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of the trained vision tokenizer")
    parser.add_argument("--output", required=True)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--correction_share", type=float, default=0.0, help="share of tokens drawn for self-correction")
    parser.add_argument("--correction_top_k", type=int, default=4)
    arguments = parser.parse_args()
    correction = None
    if arguments.correction_share:
        correction = SelfCorrection(top_k=arguments.correction_top_k, token_share=arguments.correction_share)
    shards = 4 * arguments.processes
    dataset = Dataset.from_generator(
        rows,
        gen_kwargs={
            "tokenizer": arguments.tokenizer,
            "count": arguments.samples // shards,
            "seed": arguments.seed,
            "shards": list(range(shards)),
            "correction": correction,
        },
        num_proc=arguments.processes,
        cache_dir=str(Path(arguments.output).with_suffix(".cache")),
    )
    dataset.save_to_disk(arguments.output)
    make_processor(NextFlowVQModel.from_pretrained(arguments.tokenizer)).save_pretrained(
        Path(arguments.output) / "processor"
    )


if __name__ == "__main__":
    main()
