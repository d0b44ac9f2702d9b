"""Compare two ways to draw the same final grid with the same backbone: by scales, and one token at a time
(raster-scan).

    python benchmarks/raster_vs_scale.py --grids 16 32 64

Both ways draw a batch of one, without guidance, and only the codes, since the decoder is the same for both. Writes
`results/raster_vs_scale.json`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from backbone import CHECKPOINT, RANDOM_BACKBONES, RESULTS, load_model, random_prompt
from tqdm import tqdm
from transformers import DynamicCache

from transformers_nextflow import ImageSampling, NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.generation.sampling import sample_codes
from transformers_nextflow.scale_schedule import SQUARE_SIDES
from transformers_nextflow.utils.older_transformers import CACHE_KEYWORD


GRIDS = (16, 32, 64)
PROMPT_LENGTH = 16


@dataclass(frozen=True)
class Cost:
    """The cost of the forward passes of one image.

    Args:
        passes: number of forward passes, including that over the prompt.
        operations: number of operations; a multiplication and an addition count as two.
        bytes: bytes of weights and of cached keys and values, each read once a pass.
    """

    passes: int = 0
    operations: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.passes + other.passes, self.operations + other.operations, self.bytes + other.bytes)


def pass_cost(config: NextFlowConfig, queries: int, past: int, itemsize: int, batch: int = 1) -> Cost:
    """Returns the cost of one pass over `queries` positions of `batch` rows with `past` positions in the cache.

    Products and attention are counted; norms, rotations, activations and biases are left out. Queries are counted
    against all keys of their pass. The first pass (`past` 0) reads the prompt without the connector, and has the head
    only on its last position.
    """
    text, codes, code_dim = config.text_config, config.vq_config.codebook_size, config.vq_config.code_dim
    hidden, head_dim = text.hidden_size, text.hidden_size // text.num_attention_heads
    key_values = 2 * text.num_key_value_heads * head_dim
    layer = 2 * hidden * hidden + hidden * key_values + 3 * hidden * text.intermediate_size
    backbone, head, connector = layer * text.num_hidden_layers, hidden * codes, (code_dim + hidden) * hidden
    keys, is_prompt = past + queries, past == 0
    products = queries * backbone + (1 if is_prompt else queries) * head + (0 if is_prompt else queries) * connector
    attention = 2 * queries * keys * hidden * text.num_hidden_layers
    weights = backbone + head + (0 if is_prompt else connector)
    cached = batch * keys * key_values * text.num_hidden_layers
    return Cost(1, 2 * batch * (products + attention), itemsize * (weights + cached))


def drawing_costs(
    config: NextFlowConfig, prompt_length: int, queries: Sequence[int], itemsize: int, batch: int = 1
) -> list[Cost]:
    """Returns the cost of the prompt, whose pass gives the first code, and of passes over the given positions."""
    pasts = [0, *itertools.accumulate(queries, initial=prompt_length)]
    return [pass_cost(config, *counts, itemsize, batch) for counts in zip([prompt_length, *queries], pasts)]


@torch.no_grad()
def draw_raster(
    model: NextFlowForConditionalGeneration,
    input_ids: torch.Tensor,
    num_tokens: int,
    generator: torch.Generator | None = None,
    callback: Callable[[torch.Tensor], None] = lambda logits: None,
) -> torch.Tensor:
    """Draws codes (num_tokens,) behind a prompt (1, L), each with a forward pass; `callback` gets its logits (1, V).

    A code takes one position of the sequence and is read through the connector of the slots. No masks are prepared,
    since one query sees all keys. This is the leanest form of such a loop on transformers' cache.
    """
    backbone, visual = model.model.language_model, model.model.visual_embedding
    cache = DynamicCache(config=model.config.text_config)
    embeds, codes = backbone.embed_tokens(input_ids), []
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, 1, -1)
    for _ in range(num_tokens):
        hidden_states = backbone(
            inputs_embeds=embeds,
            attention_mask={"full_attention": None},
            position_ids=position_ids,
            **{CACHE_KEYWORD: cache},
            use_cache=True,
        ).last_hidden_state
        logits = model.visual_head(hidden_states[:, -1])
        codes.append(sample_codes(logits, generator=generator))
        callback(logits)
        embeds = visual.connector(visual.codes(codes[-1]))[None]
        position_ids = position_ids[..., -1:] + 1
    return torch.cat(codes)


def draw_scales(
    model: NextFlowForConditionalGeneration, input_ids: torch.Tensor, side: int, callback=None
) -> torch.Tensor:
    """Draws codes (N,) of all scales up to side x side."""
    size = side * model.config.vq_config.patch_size
    sampling = ImageSampling(guidance_scale=1.0)
    output = model.generate_images(input_ids, image_sizes=[(size, size)], sampling=sampling, callback=callback)
    return output.image_tokens[0]


def seconds_of(draw: Callable[[], object], device: str) -> float:
    def now() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    draw()
    return now() - start


def raster_seconds(
    model: NextFlowForConditionalGeneration,
    input_ids: torch.Tensor,
    num_tokens: int,
    passes: int,
    callback: Callable[[torch.Tensor], None],
) -> float:
    """Returns the seconds of a raster drawing of `num_tokens`, estimated from the first and the last `passes` / 2
    passes.

    Each pass attends to one key more than the one before, so the mean of both halves is the mean of all.
    """
    half, device = passes // 2, str(model.device)
    late = random_prompt(model.config, input_ids.shape[1] + num_tokens - half - 1, device)

    def seconds_to_draw(count: int, prompt: torch.Tensor) -> float:
        return seconds_of(lambda: draw_raster(model, prompt, count, callback=callback), device)

    def seconds_a_pass(prompt: torch.Tensor) -> float:
        # The time leaves out the pass over the prompt, which gives the first code.
        return (seconds_to_draw(half + 1, prompt) - seconds_to_draw(1, prompt)) / half

    return num_tokens * (seconds_a_pass(input_ids) + seconds_a_pass(late)) / 2


def compare(
    model: NextFlowForConditionalGeneration, side: int, repeats: int, raster_passes: int | None, progress: tqdm
) -> dict:
    """Returns the measured and the counted figures of one grid."""
    config, device, itemsize = model.config, str(model.device), model.dtype.itemsize
    input_ids = random_prompt(config, PROMPT_LENGTH, device)
    counts = [n * n for n in SQUARE_SIDES[: SQUARE_SIDES.index(side) + 1]]

    def by_scales():
        draw_scales(model, input_ids, side, callback=lambda *_: progress.update())

    def count_pass(logits):
        progress.update()

    def raster() -> float:
        if raster_passes is not None:
            return raster_seconds(model, input_ids, side * side, raster_passes, count_pass)
        return seconds_of(lambda: draw_raster(model, input_ids, side * side, callback=count_pass), device)

    by_scales()
    draw_raster(model, input_ids, 8)
    # The longest raster drawing takes minutes, and its thousands of passes average out.
    times = {
        "by_scales": [seconds_of(by_scales, device) for _ in range(repeats)],
        "raster": [raster() for _ in range(raster_repeats(side, repeats))],
    }
    costs = {
        "by_scales": sum(drawing_costs(config, PROMPT_LENGTH, counts[1:], itemsize), Cost()),
        "raster": sum(drawing_costs(config, PROMPT_LENGTH, [1] * (side * side - 1), itemsize), Cost()),
    }
    figures = {way: {"seconds": statistics.median(times[way])} | asdict(costs[way]) for way in costs}
    for name, quantity in (("speedup", "seconds"), ("operations_ratio", "operations"), ("bytes_ratio", "bytes")):
        figures[name] = figures["raster"][quantity] / figures["by_scales"][quantity]
    return figures


def raster_repeats(side: int, repeats: int) -> int:
    return repeats if side < 64 else 1


def passes_of_raster(side: int, timed: int | None) -> int:
    """Returns the number of timed passes of a raster drawing, with those over the prompt if only a part is timed."""
    return side * side if timed is None else 2 * (timed // 2 + 2)


def print_table(figures: dict[int, dict]):
    print(f"{'grid':>7}  {'drawn':<10} {'seconds':>9} {'passes':>7} {'GFLOP':>10} {'GB read':>9}")
    for side, grid in figures.items():
        for way in ("by_scales", "raster"):
            row = grid[way]
            print(
                f"{f'{side}x{side}':>7}  {way:<10} {row['seconds']:>9.3f} {row['passes']:>7} "
                f"{row['operations'] / 1e9:>10.2f} {row['bytes'] / 1e9:>9.3f}"
            )
        print(
            f"{'':>7}  by scales is {grid['speedup']:.1f} times faster; the operations predict "
            f"{grid['operations_ratio']:.2f}, the bandwidth predicts {grid['bytes_ratio']:.1f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=CHECKPOINT, help=f"a checkpoint, or one of {list(RANDOM_BACKBONES)}")
    parser.add_argument("--grids", type=int, nargs="+", default=GRIDS, choices=SQUARE_SIDES[1:], metavar="SIDE")
    parser.add_argument(
        "--repeats", type=int, default=5, help="number of drawings; their median is reported (64x64 raster: 1)"
    )
    parser.add_argument(
        "--raster_passes", type=int, help="time only this many raster passes: half of them the first, half the last"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    if arguments.raster_passes is not None and not 2 <= arguments.raster_passes <= min(arguments.grids) ** 2:
        parser.error(f"--raster_passes {arguments.raster_passes}: from 2 to all {min(arguments.grids) ** 2} passes")

    dtype = getattr(torch, arguments.dtype)
    grids = tuple(sorted(arguments.grids))
    model = load_model(arguments.model, SQUARE_SIDES, grids, arguments.device, dtype)
    passes = sum(
        (arguments.repeats + 1) * (SQUARE_SIDES.index(side) + 1)
        + raster_repeats(side, arguments.repeats) * passes_of_raster(side, arguments.raster_passes)
        for side in grids
    )
    with tqdm(total=passes, unit="pass", desc="drawing") as progress:
        figures = {side: compare(model, side, arguments.repeats, arguments.raster_passes, progress) for side in grids}
    print_table(figures)
    values = {
        "speedup": {f"{side}x{side}": round(grid["speedup"], 2) for side, grid in figures.items()},
        "model": arguments.model,
        "dtype": arguments.dtype,
        "raster_passes": arguments.raster_passes,
        "grids": {f"{side}x{side}": grid for side, grid in figures.items()},
    }
    print("written:", write_result(Path(arguments.results) / "raster_vs_scale.json", values, arguments.device))


if __name__ == "__main__":
    main()
