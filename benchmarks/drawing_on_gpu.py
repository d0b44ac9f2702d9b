"""Time a large model that draws on a GPU, plain and compiled, and compare with the least time that the card needs.

    python benchmarks/drawing_on_gpu.py
    python benchmarks/drawing_on_gpu.py --model random --device cpu --dtype float32 --sizes 64 --batches 1 4

Each size and batch is drawn with guidance, with the plain code and with `compile_drawing`. Prompt and negative prompt
have 16 tokens each, or 60 and 8 tokens, which is the usual case. The weights are random, since the time does not depend
on them.

The floor is the least time that the card needs. A large matrix product and a large copy give its rate and its
bandwidth; the floor is the sum over the passes of the longer of two times, that of their operations at this rate and
that of their bytes at this bandwidth. In the same run a diffusion transformer of diffusers (SD3's kind), of the same
width and about the same number of parameters, takes 18 steps with guidance on latents of 8 pixels a cell, plain and, on
CUDA, under `torch.compile`. Writes `results/drawing_on_gpu.json`, or `results/drawing_on_cpu.json` on a CPU: `cases`,
and for the largest size at batch 1 the ratios `compiled_speedup`, `unequal_over_equal` and `speedup_over_diffusion`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from backbone import PRESET_7B, PRESETS, RANDOM_BACKBONES, RESULTS, load_model, random_prompt
from raster_vs_scale import PROMPT_LENGTH, drawing_costs, seconds_of
from rl_cost import PeakMemory

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result


MATRIX_SIDE = 8192
# Numbers of tokens of prompt and negative prompt.
PROMPTS = {"equal": (PROMPT_LENGTH, PROMPT_LENGTH), "unequal": (60, 8)}
DIFFUSION_STEPS = 18
# The diffusion transformer: its tokens of text, the side of a latent cell in pixels, and the channels of its latents.
TEXT_LENGTH, LATENT_CELL, LATENT_CHANNELS = 64, 8, 16


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Returns the median of several runs after a warm-up."""
    run()
    return statistics.median(seconds_of(run, device) for _ in range(repeats))


def ceilings(device: str, dtype: torch.dtype, side: int, repeats: int) -> tuple[float, float]:
    """Measures the operations a second of a matrix product, and the bytes a second, read and written, of a copy."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    rate = 2 * side**3 / median_seconds(lambda: torch.matmul(a, b, out=product), device, repeats)
    source = torch.randn(16 * side, side, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return rate, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)


def measure(
    model: NextFlowForConditionalGeneration, size: int, batch: int, prompts: str, compiled: bool, repeats: int
) -> dict:
    """Measures one case: seconds for codes and pixels of a batch, and peak memory in addition to the weights."""
    config, device = model.config, str(model.device)
    length, negative_length = PROMPTS[prompts]
    ids, negative = (random_prompt(config, count, device).expand(batch, -1) for count in (length, negative_length))
    schedule = config.vq_config.scale_schedules.for_size(size, size)
    sampling = ImageSampling(guidance_scale=5.0)
    model.compile_drawing(compiled)

    def draw() -> torch.Tensor:
        return model.generate_images(
            ids, image_sizes=[(size, size)] * batch, negative_input_ids=negative, sampling=sampling
        ).image_tokens

    with PeakMemory(device) as memory:
        codes = draw()
        seconds = median_seconds(draw, device, repeats)
        grids = torch.tensor([schedule.final_grid] * batch, device=device)
        decoding = median_seconds(lambda: model.decode_image_tokens(codes, grids), device, repeats)
    model.compile_drawing(False)
    return {
        "size": size,
        "batch": batch,
        "prompts": prompts,
        "compiled": compiled,
        "codes_seconds": seconds,
        "decoding_seconds": decoding,
        "peak_gib": memory.bytes / 2**30,
    }


def floor_of(model: NextFlowForConditionalGeneration, case: dict, rate: float, bandwidth: float) -> float:
    """Returns the least seconds that the card needs for the codes of a case; both prompts count as the longer one."""
    counts = model.config.vq_config.scale_schedules.for_size(case["size"], case["size"]).tokens_per_scale[1:]
    length = max(PROMPTS[case["prompts"]])
    costs = drawing_costs(model.config, length, counts, model.dtype.itemsize, batch=2 * case["batch"])
    return sum(max(cost.operations / rate, cost.bytes / bandwidth) for cost in costs)


@torch.no_grad()
def diffusion_seconds(model: NextFlowForConditionalGeneration, size: int, repeats: int, compiled: bool) -> float:
    """Times 18 guided steps of a diffusion transformer of the backbone's width and about its size."""
    from diffusers import SD3Transformer2DModel

    text, device, dtype = model.config.text_config, model.device, model.dtype
    head_dim = text.hidden_size // text.num_attention_heads
    wanted = sum(weight.numel() for weight in model.model.language_model.layers.parameters())

    def transformer(layers: int) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            sample_size=size // LATENT_CELL, in_channels=LATENT_CHANNELS, num_layers=layers,
            attention_head_dim=head_dim, num_attention_heads=text.num_attention_heads, joint_attention_dim=512,
            caption_projection_dim=text.hidden_size, pooled_projection_dim=512, out_channels=LATENT_CHANNELS,
            pos_embed_max_size=size // LATENT_CELL,
        )  # fmt: skip

    with torch.device("meta"):
        two, three = (sum(p.numel() for p in transformer(layers).parameters()) for layers in (2, 3))
    with torch.device(device):
        network = transformer(max(2, round(wanted / (three - two)))).to(dtype).eval()
        latents = torch.randn(2, LATENT_CHANNELS, size // LATENT_CELL, size // LATENT_CELL, dtype=dtype)
        words, pooled = torch.randn(2, TEXT_LENGTH, 512, dtype=dtype), torch.randn(2, 512, dtype=dtype)
        times = torch.linspace(1000, 1, DIFFUSION_STEPS)
    step = torch.compile(network) if compiled else network

    def draw() -> torch.Tensor:
        x = latents
        for time in times:
            conditional, unconditional = step(x, words, pooled, time.expand(2), return_dict=False)[0].chunk(2)
            x = x - (unconditional + 5 * (conditional - unconditional)) / DIFFUSION_STEPS
        return x

    return median_seconds(draw, str(device), repeats)


def found(cases: list[dict], size: int, **wanted) -> float:
    """Returns the seconds for the codes of one image."""
    wanted |= {"size": size, "batch": 1}
    return next(case["codes_seconds"] for case in cases if all(case[name] == value for name, value in wanted.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [*PRESETS, *RANDOM_BACKBONES]
    parser.add_argument("--model", default=PRESET_7B, help=f"a checkpoint, or one of {models}")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides of the images in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes; 1 must be among them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=5, help="number of drawings; their median is reported")
    parser.add_argument(
        "--matrix_side", type=int, default=MATRIX_SIDE, help="side of the matrices whose product gives the rate"
    )
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    if 1 not in arguments.batches:
        parser.error("--batches needs 1, of which the ratios are")

    device, dtype, repeats = arguments.device, getattr(torch, arguments.dtype), arguments.repeats
    rate, bandwidth = ceilings(device, dtype, arguments.matrix_side, repeats)
    model, cases = load_model(arguments.model, device=device, dtype=dtype), []
    for size in arguments.sizes:
        for batch in arguments.batches:
            for prompts in PROMPTS:
                for compiled in (False, True):
                    case = measure(model, size, batch, prompts, compiled, repeats)
                    case["share_of_floor"] = floor_of(model, case, rate, bandwidth) / case["codes_seconds"]
                    cases.append(case)
                    print(
                        f"{size:>5}² batch {batch}, {prompts:<7} prompts, {('plain', 'compiled')[compiled]:<8} "
                        f"{case['codes_seconds']:>7.3f} s codes, {case['decoding_seconds']:>7.3f} s pixels, "
                        f"{case['peak_gib']:>5.2f} GiB, {case['share_of_floor']:.0%} of the floor"
                    )
    largest, on_cuda = max(arguments.sizes), torch.device(device).type == "cuda"
    diffusion = {
        name: diffusion_seconds(model, largest, repeats, name == "compiled")
        for name in ("plain", *(["compiled"] if on_cuda else []))
    }
    ours = found(cases, largest, prompts="unequal", compiled=True)
    ratios = {
        "compiled_speedup": found(cases, largest, prompts="unequal", compiled=False) / ours,
        "unequal_over_equal": ours / found(cases, largest, prompts="equal", compiled=True),
        "speedup_over_diffusion": min(diffusion.values()) / ours,
    }
    print(f"diffusion, {DIFFUSION_STEPS} steps: {diffusion}", *(f"{n} {v:.2f}" for n, v in ratios.items()), sep="\n")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    values = ratios | {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "weights_gib": weights / 2**30,
        "operations_per_second": rate,
        "bytes_per_second": bandwidth,
        "diffusion_seconds": diffusion,
        "cases": cases,
    }
    name = "drawing_on_gpu.json" if on_cuda else "drawing_on_cpu.json"
    print("written:", write_result(Path(arguments.results) / name, values, device))


if __name__ == "__main__":
    main()
