"""One image from a large model on a GPU: seconds and memory, beside the least that the card could take.

    python benchmarks/drawing_on_gpu.py

Batch 1 with guidance: two rows in each forward pass, a prompt of 16 tokens in each. The weights are random: the time
does not depend on them. What the card can do is measured first, by a large matrix product and a large copy. The floor
is the sum over the passes of whichever takes longer, their operations at that rate or their bytes at that bandwidth.
Writes `results/drawing_on_gpu.json`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from backbone import PRESET_7B, RANDOM_BACKBONES, RESULTS, load_model, random_prompt
from raster_vs_scale import PROMPT_LENGTH, drawing_costs, seconds_of
from rl_cost import PeakMemory

from transformers_nextflow import ImageSampling
from transformers_nextflow.evaluation.results import write_result


MATRIX_SIDE = 8192


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of several runs, after one to warm up."""
    run()
    return statistics.median(seconds_of(run, device) for _ in range(repeats))


def ceilings(device: str, dtype: torch.dtype, side: int, repeats: int) -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes a second, read and written, of a copy."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    rate = 2 * side**3 / median_seconds(lambda: torch.matmul(a, b, out=product), device, repeats)
    source = torch.randn(16 * side, side, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return rate, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)


def measure(name: str, size: int, device: str, dtype: torch.dtype, repeats: int, matrix_side: int) -> dict:
    rate, bandwidth = ceilings(device, dtype, matrix_side, repeats)
    model = load_model(name, device=device, dtype=dtype)
    config, ids = model.config, random_prompt(model.config, PROMPT_LENGTH, device)
    schedule = config.vq_config.scale_schedules.for_size(size, size)
    sampling = ImageSampling(guidance_scale=5.0)

    def draw() -> torch.Tensor:
        output = model.generate_images(ids, image_sizes=[(size, size)], negative_input_ids=ids, sampling=sampling)
        return output.image_tokens

    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    with PeakMemory(device) as memory:
        codes = draw()
        grids = torch.tensor([schedule.final_grid], device=device)
        seconds = median_seconds(draw, device, repeats)
        decoding = median_seconds(lambda: model.model.decode_image_tokens(codes, grids), device, repeats)
    costs = drawing_costs(config, PROMPT_LENGTH, schedule.tokens_per_scale[1:], dtype.itemsize, batch=2)
    floor = sum(max(cost.operations / rate, cost.bytes / bandwidth) for cost in costs)
    return {
        "seconds": seconds + decoding,
        "codes_seconds": seconds,
        "decoding_seconds": decoding,
        "peak_gib": (weights + memory.bytes) / 2**30,
        "weights_gib": weights / 2**30,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "passes": len(costs),
        "operations": sum(cost.operations for cost in costs),
        "bytes": sum(cost.bytes for cost in costs),
        "operations_per_second": rate,
        "bytes_per_second": bandwidth,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [PRESET_7B, *RANDOM_BACKBONES]
    parser.add_argument("--model", default=PRESET_7B, help=f"a checkpoint, or one of {models}")
    parser.add_argument("--size", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=5, help="drawings of which the median counts")
    parser.add_argument("--matrix_side", type=int, default=MATRIX_SIDE, help="of the product that shows the rate")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype)
    figures = measure(
        arguments.model, arguments.size, arguments.device, dtype, arguments.repeats, arguments.matrix_side
    )
    for name, value in figures.items():
        print(f"{name:>22}  {value:,.4g}")
    values = figures | {"model": arguments.model, "size": arguments.size, "dtype": arguments.dtype}
    print("written:", write_result(Path(arguments.results) / "drawing_on_gpu.json", values, arguments.device))


if __name__ == "__main__":
    main()
