"""Compute how much GPU memory drawing takes, for presets, kinds of weights and sizes of images, and which cards
suffice.

    python benchmarks/memory_tiers.py
    python benchmarks/memory_tiers.py --measure nextflow-7b 1024 24

The figures are computed for one image with guidance, from parameters on the meta device. They are the sum of the
weights (the vision tokenizer's encoders in float32 and everything else in bfloat16; int8 and 4 bits apply to the linear
layers of the backbone), the keys and values of two rows behind prompts of 64 tokens, the logits of the last scale, and
the memory of CUDA and its allocator. `--measure` draws with random bfloat16 weights on a GPU whose memory is limited in
the process to the given GiB, and prints the peak. OneCAT-3B is counted in bfloat16, at the sizes that we take its
released config to have. Writes `results/memory_tiers.json`: `tiers`, `onecat`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from backbone import PRESETS, RESULTS, load_model, random_prompt
from rl_cost import PeakMemory

from transformers_nextflow import (
    ImageSampling,
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    OneCatConfig,
    OneCatForConditionalGeneration,
)
from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.modeling_nextflow_vq import CODE_PARTS, TENSORS_AT_ONCE


# The share of a card's memory that is free.
FREE_SHARE = 0.95
CARDS, SIZES = (8, 12, 16, 24, 48, 80), (256, 512, 1024)
# Bytes of a parameter of a quantised layer, with its scales: a float32 a row, or a float32 for 64 parameters.
KINDS = {"bf16": 2.0, "int8": 1.0, "4 bits": 0.5 + 4 / 64}
PROMPT_LENGTH, ROWS = 64, 2
# The context, the kernels and the memory that the allocator cannot reuse.
OVERHEAD = 2**30
# Bytes of a logit: each row has it in bfloat16 and in float32, and there is the guided one. With keys and values this
# gives 3.1 GiB for the 7B model at 1024²; 2.9 were measured on an H100 (`results/drawing_on_gpu.json`).
LOGIT_BYTES = ROWS * (2 + 4) + 4


def weights(config: NextFlowConfig) -> dict[str, int]:
    """Returns the bytes of the weights by kind."""
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config)
    tokenizer, layers = model.model.vq_model, model.model.language_model.layers
    linear = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    exact = sum(p.numel() for part in CODE_PARTS for p in getattr(tokenizer, part).parameters())
    rest = sum(p.numel() for p in model.parameters()) - linear - exact
    return {kind: int(linear * each + exact * 4 + rest * 2) for kind, each in KINDS.items()}


def drawing(config: NextFlowConfig, size: int) -> int:
    """Returns the bytes that drawing an image takes in addition to the weights."""
    text, schedule = config.text_config, config.vq_config.scale_schedules.for_size(size, size)
    head_dim = text.hidden_size // text.num_attention_heads
    columns = PROMPT_LENGTH + schedule.num_slots(config.read_last_scale)
    cached = ROWS * columns * text.num_hidden_layers * 2 * text.num_key_value_heads * head_dim * 2
    logits = schedule.tokens_per_scale[-1] * config.vq_config.codebook_size * LOGIT_BYTES
    return cached + logits


def tiers() -> list[dict]:
    cases = []
    for name, preset in PRESETS.items():
        config = preset()
        by_kind = weights(config)
        for size in SIZES:
            beside = drawing(config, size)
            for kind, taken in by_kind.items():
                gib = (taken + beside + OVERHEAD) / 2**30
                cards = [card for card in CARDS if FREE_SHARE * card >= gib]
                cases.append({"preset": name, "size": size, "weights": kind, "gib": gib, "fits": cards[:1]})
    return cases


def onecat_tiers() -> list[dict]:
    """Returns the figures of OneCAT-3B: the whole model, drawing only, and with the text experts not on the card."""
    cases = []
    for name, drawing_only, is_mapped in (
        ("whole", False, False), ("drawing_only", True, False), ("drawing_only, drawing_device_map", True, True),
    ):  # fmt: skip
        config = OneCatConfig(drawing_only=drawing_only)
        with torch.device("meta"):
            model = OneCatForConditionalGeneration(config)
        places = model.drawing_device_map(config) if is_mapped else {}
        away = {name for name, place in places.items() if place == "cpu"}
        taken = largest = 0
        for module_name, module in model.named_modules():
            own = sum(p.numel() for p in module.parameters(recurse=False))
            size = own * (4 if module_name.startswith("vq_model.encoder") else 2)
            if any(module_name == part or module_name.startswith(f"{part}.") for part in away):
                largest = max(largest, size)  # brought to the card one by one
            else:
                taken += size
        text = config.text_config
        for side in (512, 1024):
            schedule = config.vq_config.scale_schedules.for_size(side, side)
            columns, slots = PROMPT_LENGTH + schedule.num_tokens, schedule.tokens_per_scale[-1]
            cached = ROWS * columns * text.num_hidden_layers * 2 * text.num_key_value_heads * config.head_dim * 2
            inner = ROWS * slots * text.intermediate_size * 2 * 3  # the outputs of gate and up, and their product
            decoding = TENSORS_AT_ONCE * config.vq_config.channels * side * side * 2
            beside = max(largest, cached + inner, decoding)
            gib = (taken + beside + OVERHEAD) / 2**30
            fits = [card for card in CARDS if FREE_SHARE * card >= gib][:1]
            cases.append({"loaded": name, "size": side, "weights_gib": taken / 2**30, "gib": gib, "fits": fits})
    return cases


def onecat_table(cases: list[dict]) -> str:
    lines = [
        "| OneCAT-3B, bf16 | weights on the card | 512² | 1024² | smallest card for 1024² |",
        "|---|---:|---:|---:|---|",
    ]
    for small, large in zip(cases[::2], cases[1::2]):
        figures = f"{large['weights_gib']:.1f} | {small['gib']:.1f} | {large['gib']:.1f}"
        lines.append(f"| {large['loaded']} | {figures} | {large['fits'][0]} GB |")
    return "\n".join(lines)


def table(cases: list[dict]) -> str:
    """Returns the GiB at each size for each preset and kind of weights, and the smallest card for the largest size."""
    lines = ["| preset | weights | " + " | ".join(f"{size}²" for size in SIZES) + " | smallest card for 1024² |"]
    lines.append("|---|---|" + "---:|" * (len(SIZES) + 1))
    for name in PRESETS:
        for kind in KINDS:
            own = [case for case in cases if (case["preset"], case["weights"]) == (name, kind)]
            figures = " | ".join(f"{case['gib']:.1f}" for case in own)
            card = own[-1]["fits"]
            lines.append(f"| {name} | {kind} | {figures} | {f'{card[0]} GB' if card else 'none'} |")
    return "\n".join(lines)


def measured(name: str, size: int, limit: float) -> float:
    """Returns the peak GiB of drawing an image on a GPU limited to `limit` GiB; raises an error if it is exceeded."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / total))
    with PeakMemory("cuda") as memory:
        model = load_model(name, device="cuda", dtype=torch.bfloat16)
        ids = random_prompt(model.config, PROMPT_LENGTH, "cuda")
        output = model.generate_images(
            ids, image_sizes=[(size, size)], negative_input_ids=ids, sampling=ImageSampling(guidance_scale=5.0)
        )
        model.decode_image_tokens(output.image_tokens, output.image_grids)
    return memory.bytes / 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=3, metavar=("PRESET", "SIZE", "GIB"), help="draw on a GPU under this limit")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    if arguments.measure:
        name, size, limit = arguments.measure
        print(f"{name} at {size}²: {measured(name, int(size), float(limit)):.2f} GiB of {limit}")
        return
    cases = tiers()
    print(table(cases))
    onecat = onecat_tiers()
    print(onecat_table(onecat))
    values = {"tiers": cases, "onecat": onecat, "computed": True}
    print("written:", write_result(Path(arguments.results) / "memory_tiers.json", values))


if __name__ == "__main__":
    main()
