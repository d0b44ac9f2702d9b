"""The measurements of `before_and_after.py`, with the code that is on the path; they use only what both codes have.

python -P measured_steps.py NAME
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from backbone import random_config, random_prompt, with_sides
from rl_cost import PeakMemory

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration, NextFlowVQConfig, NextFlowVQModel
from transformers_nextflow.scale_schedule import SQUARE_SIDES


SIDES = tuple(side for side in SQUARE_SIDES if side <= 16)  # of the 256 level
PATCH_SIZE, CODES = 8, 4096
BATCH, REPEATS = 8, 5


def least_seconds(ways: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Returns the least seconds of each way, measured in turns after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def make_tokenizer() -> NextFlowVQModel:
    """Makes a convolutional tokenizer with the paper's resampling and its 256 level's grids, at 8 pixels a cell."""
    tower = random_config().vq_config.semantic_config.to_dict() | {"patch_size": PATCH_SIZE, "image_size": 128}
    config = NextFlowVQConfig(
        semantic_config=tower, patch_size=PATCH_SIZE, scales=SIDES, codebook_size=CODES, upsample="bicubic",
        pixel_channels=16, pixel_channel_multipliers=(1, 1, 2, 2), pixel_num_res_blocks=1, pixel_latent_dim=32,
        pixel_decoder_channels=16, pixel_decoder_num_res_blocks=1, semantic_decoder_depth=1, semantic_decoder_heads=1,
        semantic_decoder_hidden_size=16, semantic_target_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return NextFlowVQModel(config)


def tokenizer_step(tokenizer: NextFlowVQModel, pixels: torch.Tensor):
    """A forward and backward pass."""
    output = tokenizer(pixels)
    (F.mse_loss(output.reconstruction, pixels) + output.codebook_loss + output.commitment_loss).backward()
    tokenizer.zero_grad()


def transformer_step(model: NextFlowForConditionalGeneration, batch: dict):
    """A forward and backward pass."""
    model(**batch).loss.backward()
    model.zero_grad()


def seconds_of(run: Callable[[], object]) -> float:
    return least_seconds({"": run}, REPEATS, "cpu")[""]


def measure_tokenizer() -> dict[str, float]:
    side = PATCH_SIZE * SIDES[-1]
    tokenizer, pixels = make_tokenizer().train().requires_grad_(True), torch.rand(BATCH, 3, side, side) * 2 - 1
    return {"seconds": seconds_of(lambda: tokenizer_step(tokenizer, pixels))}


def make_model() -> NextFlowForConditionalGeneration:
    config = with_sides(random_config(), SIDES, (SIDES[-1],))
    config.vq_config.upsample = "bicubic"
    return NextFlowForConditionalGeneration(config)


def measure_transformer() -> dict[str, float]:
    model = make_model().train()
    config = model.config
    schedule = config.vq_config.scale_schedules.build()
    slots = torch.full((1, schedule.num_slots(config.read_last_scale)), config.image_token_id)
    rows, masks = [], []
    for row in range(BATCH):
        prompt = random_prompt(config, 4 + 4 * row)
        padding = 4 + 4 * BATCH - prompt.shape[1]
        row = torch.cat([prompt, slots, torch.full((1, 1 + padding), config.eoi_token_id)], 1)
        masks.append((torch.arange(row.shape[1]) < row.shape[1] - padding).long()[None])
        rows.append(row)
    ids, mask = torch.cat(rows), torch.cat(masks)
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(mask == 0, -100),
        "attention_mask": mask,
        "image_tokens": torch.randint(config.vq_config.codebook_size, (BATCH, schedule.num_tokens)),
        "image_grids": torch.tensor([schedule.final_grid] * BATCH),
    }

    with PeakMemory("cpu") as memory:
        transformer_step(model, batch)
    return {"seconds": seconds_of(lambda: transformer_step(model, batch)), "bytes": memory.bytes}


def measure_drawing(batch: int) -> dict[str, float]:
    model = make_model().eval()
    size = (SIDES[-1] * model.config.vq_config.patch_size,) * 2
    prompt, negative = (random_prompt(model.config, length).expand(batch, -1) for length in (24, 4))
    sampling = ImageSampling(guidance_scale=3.0)

    def draw():
        model.generate_images(prompt, image_sizes=[size] * batch, negative_input_ids=negative, sampling=sampling)

    with PeakMemory("cpu") as memory:
        draw()
    return {"seconds": seconds_of(draw), "bytes": memory.bytes}


MEASUREMENTS = {
    "tokenizer step": measure_tokenizer,
    "transformer step": measure_transformer,
    "drawing of one": lambda: measure_drawing(1),
    "drawing of four": lambda: measure_drawing(4),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(MEASUREMENTS[sys.argv[1]]()))
