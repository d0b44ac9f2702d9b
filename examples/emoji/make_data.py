"""Make the transformer's training data: conversations about scenes with the codes of images; and the untrained model.

    python examples/emoji/make_data.py --tokenizer runs/emoji/tokenizer/final --side 64 --output runs/emoji/data-64 \
        --samples 1000000 --processes 14 --start runs/emoji/start

`MIXTURES` has the shares of the abilities with which conversations begin. Some continue with questions about their last
image. Held-out cases never occur. `--start` also writes an untrained model and its processor, from which the first
recipe starts.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Features, List, Value
from sizes import SIZES, Size, text_config, world_of
from transformers import PreTrainedTokenizerFast

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQModel,
    SelfCorrection,
)
from transformers_nextflow.data import EncodedImage, code_fields, encoded_images, tokenizer_fingerprint
from transformers_nextflow.tokenization_nextflow import THINK_PREFIX, train_tokenizer
from transformers_nextflow.worlds.conversations import Exchange, images_of, texts_of, to_messages
from transformers_nextflow.worlds.emoji import CAPTION_REQUEST, Scene, World, render, training_case
from transformers_nextflow.worlds.emoji.questions import further_question
from transformers_nextflow.worlds.emoji.scene import draw_share
from transformers_nextflow.worlds.generated_rows import write_generated_rows


# Shares of the conversations by the ability with which they begin; the paper has 25% of text (section 3.2).
MIXTURES = {
    "full": {
        "text": 0.08,
        "drawing": 0.42,
        "caption": 0.05,
        "question": 0.1,
        "style": 0.12,
        "editing": 0.08,
        "subject": 0.03,
        "in_context": 0.05,
        "thinking": 0.05,
        "story": 0.02,
    },
    # Each has one image, so that rows have about the same length and little is padded.
    "medium": {"drawing": 0.84, "caption": 0.06, "question": 0.1},
    "small": {"drawing": 0.84, "caption": 0.06, "question": 0.1},
}
# The equally likely numbers of questions that follow. An image's slots are most of a sequence, answers are few words.
FURTHER_QUESTIONS = {
    "full": {"drawing": (0, 0, 1), "caption": (1, 2), "question": (2, 3, 4)},
    "medium": {},
    "small": {},
}
BATCH = 250
PART = {"type": Value("string"), "text": Value("string")}
CODES = List(List(Value("int32")))
FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": List(PART)}),
        "image_tokens": CODES,
        "image_labels": CODES,
        "image_clean_tokens": CODES,
        "image_grids": CODES,
        "tokenizer_fingerprint": Value("string"),
    }
)


def sample(rng: np.random.Generator, world: World, size: str, ability: str | None = None) -> list[Exchange]:
    """Makes a conversation of a size's mixture, or one that begins with a given ability; its images are scenes."""
    ability = ability or draw_share(rng, MIXTURES[size])
    exchanges = [training_case(rng, world, ability).exchange]
    for _ in range(int(rng.choice(FURTHER_QUESTIONS[size].get(ability, (0,))))):
        scene = images_of(exchanges[0].asked + exchanges[0].answer)[-1]
        exchanges.append(further_question(rng, scene, world).exchange)
    return exchanges


def encode_scenes(
    model: NextFlowVQModel,
    scenes: list[Scene],
    world: World,
    correction: SelfCorrection | None,
    generator: torch.Generator,
) -> list[EncodedImage]:
    """Returns the codes of each scene; scenes of one size are encoded together."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, scene in enumerate(scenes):
        by_size[world.size(scene.ratio)].append(index)
    found: dict[int, EncodedImage] = {}
    for indices in by_size.values():
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            pixels = torch.from_numpy(np.stack([render(scenes[i], world) for i in part])).to(model.device)
            codes = model.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1, correction, generator)
            found.update(zip(part, encoded_images(codes)))
    return [found[index] for index in range(len(scenes))]


def images_in(exchanges: list[Exchange]) -> list[tuple[Scene, bool]]:
    """Returns the images of a conversation in order, and whether the model draws them."""
    turns = [(parts, is_answer) for exchange in exchanges for is_answer, parts in enumerate(exchange)]
    return [(scene, bool(is_answer)) for parts, is_answer in turns for scene in images_of(parts)]


def row(exchanges: list[Exchange], codes: list[EncodedImage], world: World, fingerprint: str) -> dict:
    """Makes a row in the data format (docs/data.md)."""
    messages = to_messages(exchanges)
    for part in (part for turn in messages for part in turn["content"]):
        part.setdefault("text", "")  # Arrow would write None
    images = images_in(exchanges)
    sizes = [world.size(scene.ratio) for scene, _ in images]
    return {
        "messages": messages,
        **code_fields(codes, [drawn for _, drawn in images]),
        "image_grids": [[height // world.patch_size, width // world.patch_size] for height, width in sizes],
        "tokenizer_fingerprint": fingerprint,
    }


@torch.no_grad()
def rows(
    tokenizer: str,
    size: str,
    art: str,
    side: int,
    count: int,
    seed: int,
    shards: list[int],
    correction: SelfCorrection | None,
) -> Iterator[dict]:
    """Yields `count` rows for each shard; a shard is a seed."""
    torch.set_num_threads(1)
    model, world = NextFlowVQModel.from_pretrained(tokenizer).eval(), _world(size, art, side)
    fingerprint = tokenizer_fingerprint(model)
    for shard in shards:
        rng = np.random.default_rng((seed, shard))
        generator = torch.Generator().manual_seed(seed * 1000 + shard)
        for start in range(0, count, BATCH):
            samples = [sample(rng, world, size) for _ in range(min(BATCH, count - start))]
            scenes = [scene for exchanges in samples for scene, _ in images_in(exchanges)]
            codes = iter(encode_scenes(model, scenes, world, correction, generator))
            for exchanges in samples:
                yield row(exchanges, [next(codes) for _ in images_in(exchanges)], world, fingerprint)


@lru_cache(maxsize=2)
def _world(size: str, art: str, side: int) -> World:
    return world_of(SIZES[size], art, side)


def text_tokenizer(world: World, size: Size, count: int = 20_000) -> PreTrainedTokenizerFast:
    """Trains a text tokenizer on conversations."""
    rng = np.random.default_rng(0)
    conversations = (sample(rng, world, size.name) for _ in range(count))
    texts = (text for exchanges in conversations for e in exchanges for text in texts_of(e.asked + e.answer))
    return train_tokenizer(texts, size.vocabulary, lowercase=True)


def write_start(tokenizer: str, size: Size, world: World, output: Path, count: int = 20_000, seed: int = 0):
    """Writes the untrained model with a vision tokenizer, and its processor."""
    vq_model = NextFlowVQModel.from_pretrained(tokenizer, dtype=torch.float32)
    config = vq_model.config
    processor = NextFlowProcessor(
        NextFlowImageProcessor(scales=list(config.scales), patch_size=config.patch_size, levels=config.levels),
        text_tokenizer(world, size, count),
        think_prefix=THINK_PREFIX,
        caption_request=CAPTION_REQUEST,
    )
    torch.manual_seed(seed)
    model = NextFlowForConditionalGeneration(
        NextFlowConfig(
            text_config=text_config(size, processor.tokenizer),
            vq_config=config,
            boi_token_id=processor.boi_token_id,
            eoi_token_id=processor.eoi_token_id,
            image_token_id=processor.image_token_id,
            rope_range=16.0,
            tie_word_embeddings=True,
        )
    )
    model.load_vision_tokenizer(vq_model)
    model.save_pretrained(output)
    processor.save_pretrained(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--art", default="runs/emoji/art.zip")
    parser.add_argument("--tokenizer", required=True, help="folder of the trained vision tokenizer")
    parser.add_argument("--side", type=int, help="side of square images in pixels; default: the size's largest")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--correction_share", type=float, default=0.3, help="share of the tokens of drawn images that are sampled"
    )
    parser.add_argument("--correction_top_k", type=int, default=10)
    parser.add_argument("--start", type=Path, help="folder for the untrained model")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    side = arguments.side or size.sides[-1]
    if arguments.start:
        world = world_of(size, arguments.art, side)
        write_start(arguments.tokenizer, size, world, arguments.start, min(20_000, arguments.samples), arguments.seed)
    correction = None
    if arguments.correction_share:
        correction = SelfCorrection(arguments.correction_top_k, arguments.correction_share)
    shards = 4 * arguments.processes
    write_generated_rows(
        rows,
        arguments.output,
        FEATURES,
        arguments.processes,
        shards=list(range(shards)),
        tokenizer=arguments.tokenizer,
        size=arguments.size,
        art=arguments.art,
        side=side,
        count=arguments.samples // shards,
        seed=arguments.seed,
        correction=correction,
    )


if __name__ == "__main__":
    main()
