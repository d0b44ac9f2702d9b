"""Measure tokens a second in training, and their share of the machine's measured matrix rate.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --model random-1b --device cuda --dtype bfloat16 --level 1024 --images 2

A step is the forward and backward pass and the optimizer's step (Muon with AdamW; with `--lora` AdamW over adapters),
on prompts of 16 tokens with one image of the level each, in padded rows and packed into one row, with each attention.
Seconds are the least of several turns in which these ways alternate. Operations are those of the model's products and
of the pairs of query and key that the scales let attend; each counts once forward and twice backward, however often it
is computed. The rate is that of a large product. The tokenizer's step is the forward and backward pass of a
convolutional tokenizer with the paper's resampling. Writes `results/training_speed.json`: `tokens_per_second`,
`share_of_rate`, `maskless_speedup`, `images_per_second`.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path

import torch
from backbone import PRESETS, RANDOM_BACKBONES, RESULTS, load_model
from drawing_on_gpu import ceilings
from measured_steps import least_seconds, make_tokenizer, tokenizer_step
from resampling import scenes, transformer_batch

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.scale_schedule import SQUARE_SIDES
from transformers_nextflow.sequence.scale_sdpa import SCALE_SDPA
from transformers_nextflow.trainers import MuonWithAdamW
from transformers_nextflow.trainers.device_settings import compile_layers


PACKINGS = ("padded", "packed")
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}


def packed(batch: dict) -> dict:
    """Returns the rows of a batch as the samples of one row."""
    count, length = batch["input_ids"].shape
    samples = torch.arange(count, device=batch["input_ids"].device).repeat_interleave(length)[None]
    return batch | {name: batch[name].reshape(1, -1) for name in ("input_ids", "labels")} | {"seq_idx": samples}


def operations(model: NextFlowForConditionalGeneration, batch: dict) -> int:
    """Returns the operations of a step, forward and backward; a multiplication and an addition count as two."""
    config, text = model.config, model.config.text_config
    schedule = config.vq_config.scale_schedules.build()
    count = len(batch["image_grids"])
    positions, prompt = batch["input_ids"].numel() // count, batch["input_ids"].numel() // count
    prompt -= schedule.num_slots(config.read_last_scale)
    pairs, end = prompt * (prompt + 1) // 2, prompt
    for height, width in schedule.slot_grids(config.read_last_scale):
        end += height * width
        pairs += height * width * end
    layers = sum(p.numel() for name, p in model.model.language_model.layers.named_parameters() if p.ndim == 2)
    head = config.vocab_size * text.hidden_size * schedule.num_tokens
    attention = 2 * text.num_hidden_layers * text.hidden_size * pairs
    return 3 * 2 * count * (layers * positions + head + attention)


def trained(model: NextFlowForConditionalGeneration, lora: bool, dtype: torch.dtype):
    """Returns the model and the optimizer of its trained parameters."""
    if lora:
        from peft import LoraConfig

        model.requires_grad_(False)
        model.add_adapter(LoraConfig(target_modules=r".*language_model\.layers\.\d+\..*_proj", r=16))
        model.enable_input_require_grads()
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=None)
    return MuonWithAdamW(model, lr=1e-4, orthogonalize_dtype=dtype)


def transformer_steps(arguments, device: str, dtype: torch.dtype):
    """Returns the steps by packing and attention, the model, and the batches of each packing."""
    sides = tuple(side for side in SQUARE_SIDES if side <= arguments.level // 16)
    # Under adapters the weights are frozen, so they may have half precision.
    model = load_model(arguments.model, sides, sides[-1:], device, dtype if arguments.lora else torch.float32).train()
    model.vq_model.requires_grad_(False)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = trained(model, arguments.lora, dtype)
    if arguments.compile:
        compile_layers(model)
    batch = transformer_batch(model, arguments.images, device)
    batch.pop("attention_mask", None)
    batches = {"padded": batch, "packed": packed(batch)}
    half = dtype != torch.float32

    def step(implementation: str, batch: dict):
        model.set_attn_implementation({"": implementation, "text_config": implementation})
        with torch.autocast(device, dtype) if half else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {
        f"{packing} {name}": partial(step, name, batches[packing])
        for packing in PACKINGS
        for name in arguments.attention
    }
    return steps, model, batches


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help=f"a checkpoint, or one of {list(RANDOM_BACKBONES)}")
    parser.add_argument("--level", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=4, help="number of images in a batch")
    parser.add_argument(
        "--attention",
        nargs="+",
        help="attention implementations; default: scale_sdpa and sdpa, on CUDA also flex_attention",
    )
    parser.add_argument("--lora", action="store_true", help="train only adapters")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing: keep no activations of layers"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the layers; default: on CUDA")
    parser.add_argument("--tokenizer_batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    if arguments.model in PRESETS:
        parser.error(f"{arguments.model} keeps its own schedule; give a checkpoint")
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    on_cuda = torch.device(device).type == "cuda"
    arguments.attention = arguments.attention or [SCALE_SDPA, "sdpa", *(["flex_attention"] if on_cuda else [])]
    arguments.compile = on_cuda if arguments.compile is None else arguments.compile

    rate, _ = ceilings(device, dtype, MATRIX_SIDE["cuda" if on_cuda else "cpu"], arguments.repeats)
    steps, model, batches = transformer_steps(arguments, device, dtype)
    seconds = least_seconds(steps, arguments.repeats, device)
    tokens, work = batches["padded"]["input_ids"].numel(), operations(model, batches["padded"])
    pixels, tokenizer = scenes(arguments.tokenizer_batch, device), make_tokenizer().to(device).train()

    def train_tokenizer():
        with torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext():
            tokenizer_step(tokenizer, pixels)

    of_tokenizer = least_seconds({"step": train_tokenizer}, arguments.repeats, device)["step"]
    figures = {
        name: {"tokens_per_second": tokens / value, "share_of_rate": work / value / rate, "seconds": value}
        for name, value in seconds.items()
    }
    for name, values in figures.items():
        print(f"{name:<22} {values['tokens_per_second']:>10,.0f} tokens/s, {values['share_of_rate']:.0%} of the rate")
    best = max(figures.values(), key=lambda values: values["tokens_per_second"])
    maskless = {
        packing: round(seconds[f"{packing} sdpa"] / seconds[f"{packing} {SCALE_SDPA}"], 2)
        for packing in PACKINGS
        if {"sdpa", SCALE_SDPA} <= set(arguments.attention)
    }
    print(f"without masks over with them: {maskless}; tokenizer {len(pixels) / of_tokenizer:.1f} images/s")
    values = {
        "tokens_per_second": best["tokens_per_second"],
        "share_of_rate": best["share_of_rate"],
        "maskless_speedup": maskless,
        "images_per_second": len(pixels) / of_tokenizer,
        "ways": figures,
        "parameters": model.num_parameters(),
        "operations_per_second": rate,
    }
    print("written:", write_result(Path(arguments.results) / "training_speed.json", values, device))


if __name__ == "__main__":
    main()
