"""Make the transformer's training data: conversations about shapes, with the images' codes.

    python examples/shapes/make_data.py --tokenizer runs/tokenizer/final --output runs/data --processes 2

`MIXTURE` has the shares of the abilities with which conversations begin. Most conversations ask several things about
their image, since the slots of an image are most of a sequence and an answer is only a few words. Some prompts are left
out, which guidance needs. Cases that are kept for evaluation and held-out pairs of shape and colour never occur.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Features, List, Value

from transformers_nextflow import NextFlowImageProcessor, NextFlowProcessor, NextFlowVQModel, SelfCorrection
from transformers_nextflow.data import EncodedImage, code_fields, encoded_images
from transformers_nextflow.tokenization_nextflow import THINK_PREFIX, train_tokenizer
from transformers_nextflow.worlds.generated_rows import write_generated_rows
from transformers_nextflow.worlds.shapes import (
    CAPTION_REQUEST,
    DESCRIPTIONS,
    Exchange,
    Scene,
    World,
    answering,
    follow_up_edit,
    images_of,
    is_reserved,
    may_be_trained_on,
    question_about,
    render,
    texts_of,
    think_first,
    to_messages,
    training_case,
)
from transformers_nextflow.worlds.shapes.cases import key_of


WORLD = World()
# Shares of the conversations by the ability with which they begin. In the paper 25% are only text, and one drawing in
# ten becomes a caption (section 3.2). The bundled checkpoint saw such shares first. The shares below, of its last
# training, favour what it had learnt least.
MIXTURE = {
    "text": 0.1,
    "drawing": 0.3,
    "caption": 0.02,
    "question": 0.12,
    "editing": 0.15,
    "thinking": 0.14,
    "subject": 0.04,
    "in_context": 0.05,
    "story": 0.02,
    "video": 0.03,
    "video_question": 0.03,
}
# The equally likely numbers of exchanges after the first: more texts, or questions on and captions of the last image.
FURTHER_EXCHANGES = {
    "text": (2, 3, 4),
    "drawing": (0, 1, 2),
    "caption": (2, 3),
    "question": (3, 4, 5),
    "editing": (0, 1),
}
# The share of plain captions that have a thought too, so that thinking does no harm where it is not needed.
THOUGHT_SHARE = 0.15
DESCRIPTION_SHARE = 0.25
SECOND_EDIT_SHARE = 0.3
# The share of prompts that are left out if the answer is only an image, as guidance needs it.
EMPTY_PROMPT_SHARE = {"drawing": 0.1, "editing": 0.1, "subject": 0.1}
BATCH = 250
TEXT_VOCABULARY = 512
PART = {"type": Value("string"), "text": Value("string")}
CODES = List(List(Value("int32")))
FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": List(PART)}),
        "image_tokens": CODES,
        "image_labels": CODES,
        "image_clean_tokens": CODES,
        "image_grids": CODES,
        "length": Value("int32"),
    }
)


def prompted(ability: str, exchange: Exchange, rng: np.random.Generator) -> Exchange:
    """Leaves out the first article of some prompts, as people do, and some prompts as a whole, as guidance needs it."""
    *images, text = exchange.asked
    if rng.random() < EMPTY_PROMPT_SHARE.get(ability, 0.0):
        text = ""
    elif ability == "drawing" and text.startswith("a ") and rng.random() < 0.15:
        text = text[2:]
    return Exchange((*images, text), exchange.answer)


def ask(rng: np.random.Generator, scene: Scene) -> Exchange:
    """Makes a question about a scene or a request to describe it, with the answer; none that is kept for evaluation."""
    while True:
        if rng.random() < DESCRIPTION_SHARE:
            request, describe = list(DESCRIPTIONS.values())[int(rng.integers(len(DESCRIPTIONS)))]
            answer = describe(scene, WORLD)
            texts = (answer,)  # images are drawn from descriptions too
        else:
            (request, answer), texts = question_about(rng, WORLD, scene), ()
        if not any(map(is_reserved, (key_of((scene, request), WORLD), *texts))):
            return answering(request, answer)


def sample(rng: np.random.Generator, abilities: Sequence[str] = tuple(MIXTURE)) -> list[Exchange]:
    """Makes a conversation that begins with one of the abilities; its images are scenes."""
    shares = np.array([MIXTURE[ability] for ability in abilities])
    ability = abilities[int(rng.choice(len(abilities), p=shares / shares.sum()))]
    case = training_case(rng, WORLD, ability)
    if ability == "drawing" and rng.random() < THOUGHT_SHARE:
        thoughtful = think_first(case, WORLD)
        case = thoughtful if may_be_trained_on(thoughtful, WORLD) else case
    exchanges = [prompted(ability, case.exchange, rng)]
    if ability == "editing" and rng.random() < SECOND_EDIT_SHARE:
        edit = follow_up_edit(rng, WORLD, case.after)
        if edit is not None and may_be_trained_on(edit, WORLD):
            exchanges.append(edit.exchange)
    for _ in range(int(rng.choice(FURTHER_EXCHANGES.get(ability, (0,))))):
        scenes = [image for exchange in exchanges for image in images_of(exchange.asked + exchange.answer)]
        exchanges.append(ask(rng, scenes[-1]) if scenes else training_case(rng, WORLD, ability).exchange)
    return exchanges


def texts(count: int, seed: int):
    """Yields texts of all kinds, for the text tokenizer."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        for exchange in sample(rng):
            yield from texts_of(exchange.asked + exchange.answer)


def make_processor(
    vq_model: NextFlowVQModel, read_last_scale: bool = False, tokenizer_of: str | None = None
) -> NextFlowProcessor:
    """Makes a processor, with the text tokenizer of the processor in the folder `tokenizer_of` or a new one."""
    config = vq_model.config
    image_processor = NextFlowImageProcessor(
        scales=list(config.scales), patch_size=config.patch_size, levels=config.levels
    )
    if tokenizer_of is not None:
        tokenizer = NextFlowProcessor.from_pretrained(tokenizer_of).tokenizer
    else:
        tokenizer = train_tokenizer(texts(20_000, seed=0), TEXT_VOCABULARY, lowercase=True)
    return NextFlowProcessor(
        image_processor,
        tokenizer,
        read_last_scale=read_last_scale,
        think_prefix=THINK_PREFIX,
        caption_request=CAPTION_REQUEST,
    )


def encode_scenes(
    model: NextFlowVQModel, scenes: list[Scene], correction: SelfCorrection | None, generator: torch.Generator
) -> Iterator[EncodedImage]:
    """Returns the codes of each scene, which are encoded in batches."""
    for start in range(0, len(scenes), BATCH):
        pixels = torch.from_numpy(np.stack([render(scene, WORLD) for scene in scenes[start : start + BATCH]]))
        codes = model.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1, correction, generator)
        yield from encoded_images(codes)


@torch.no_grad()
def rows(
    tokenizer: str,
    count: int,
    seed: int,
    shards: list[int],
    correction: SelfCorrection | None,
    read_last_scale: bool,
    abilities: tuple[str, ...],
):
    """Yields `count` rows for each shard; a shard is a seed."""
    torch.set_num_threads(1)
    model = NextFlowVQModel.from_pretrained(tokenizer).eval()
    schedule = model.config.scale_schedules.for_size(WORLD.canvas, WORLD.canvas)
    slots = schedule.num_slots(read_last_scale) + 2
    for shard in shards:
        rng = np.random.default_rng((seed, shard))
        generator = torch.Generator().manual_seed(seed * 1000 + shard)
        for start in range(0, count, BATCH):
            samples = [sample(rng, abilities) for _ in range(min(BATCH, count - start))]
            scenes = [scene for exchanges in samples for scene, _ in images_in(exchanges)]
            codes = encode_scenes(model, scenes, correction, generator)
            for exchanges in samples:
                yield row(exchanges, codes, list(schedule.final_grid), slots)


def images_in(exchanges: list[Exchange]) -> list[tuple[Scene, bool]]:
    """Returns the images of a conversation in order, and whether the model draws them."""
    turns = [(parts, is_answer) for exchange in exchanges for is_answer, parts in enumerate(exchange)]
    return [(scene, bool(is_answer)) for parts, is_answer in turns for scene in images_of(parts)]


def row(exchanges: list[Exchange], codes: Iterator[EncodedImage], grid: list[int], slots: int) -> dict:
    """Makes a row; takes the codes of its images from `codes`. Only drawn images have sampled codes to read."""
    messages = to_messages(exchanges)
    for part in (part for turn in messages for part in turn["content"]):
        part.setdefault("text", "")  # Arrow would write None
    words = sum(len(part["text"].split()) for turn in messages for part in turn["content"])
    drawn = [is_answer for _, is_answer in images_in(exchanges)]
    own = list(itertools.islice(codes, len(drawn)))
    return {
        "messages": messages,
        **code_fields(own, drawn),
        "image_grids": [grid] * len(drawn),
        "length": slots * len(drawn) + words + 5 * len(messages),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of the trained vision tokenizer")
    parser.add_argument("--output", required=True)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--correction_share",
        type=float,
        default=0.0,
        help="share of the tokens of drawn images that are sampled for self-correction",
    )
    parser.add_argument("--correction_top_k", type=int, default=4)
    parser.add_argument(
        "--abilities", nargs="+", choices=MIXTURE, default=list(MIXTURE), help="abilities in the data; default: all"
    )
    parser.add_argument(
        "--processor", help="folder of a processor whose text tokenizer is kept, to train a model further"
    )
    parser.add_argument(
        "--read_last_scale", action="store_true", help="make data for a model that also reads the last scale"
    )
    arguments = parser.parse_args()
    correction = None
    if arguments.correction_share:
        correction = SelfCorrection(top_k=arguments.correction_top_k, token_share=arguments.correction_share)
    shards = 4 * arguments.processes
    write_generated_rows(
        rows,
        Path(arguments.output),
        FEATURES,
        arguments.processes,
        shards=list(range(shards)),
        tokenizer=arguments.tokenizer,
        count=arguments.samples // shards,
        seed=arguments.seed,
        correction=correction,
        read_last_scale=arguments.read_last_scale,
        abilities=tuple(arguments.abilities),
    )
    vq_model = NextFlowVQModel.from_pretrained(arguments.tokenizer)
    processor = make_processor(vq_model, arguments.read_last_scale, arguments.processor)
    processor.save_pretrained(Path(arguments.output) / "processor")


if __name__ == "__main__":
    main()
