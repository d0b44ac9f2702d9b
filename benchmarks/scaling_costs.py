"""Compute what a million and a billion images cost: extracting their codes, training on them, and drawing as many.

    python benchmarks/scaling_costs.py

Operations are counted for the 7B preset and its tokenizer. For codes they are those of one encoding of an image; for
training they are 6 times the backbone's parameters times the slots of a caption and of the image. Bytes are those of
three lists of codes in int16, as `extract-codes` writes them for an image that is trained on, before compression. Hours
of a card follow from the matrix rate that was measured on one (`results/drawing_on_gpu.json`), at the share of it that
drawing reached there. Nothing was run at this size.
Writes `results/scaling_costs.json`: `costs`; the table in `docs/scaling.md`.
"""

from __future__ import annotations

import json

import torch
from backbone import PRESET_7B, PRESETS, RESULTS
from torch.utils.flop_counter import FlopCounterMode

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowVQModel
from transformers_nextflow.evaluation.results import write_result


SIZES, COUNTS = (256, 512, 1024), (10**6, 10**9)
CAPTION, LISTS, CODE_BYTES = 60, 3, 2
MEASURED = RESULTS / "drawing_on_gpu.json"


def main():
    measured = json.loads(MEASURED.read_text())
    rate = measured["operations_per_second"] * measured["share_of_floor"]
    config = PRESETS[PRESET_7B]()
    with torch.device("meta"):
        model = NextFlowForConditionalGeneration(config).eval()
    # Encoding depends on values, so it is run, with random weights.
    tokenizer = NextFlowVQModel(config.vq_config).eval()
    parameters = sum(p.numel() for p in model.model.language_model.layers.parameters())
    costs = []
    for size in SIZES:
        schedule = config.vq_config.scale_schedules.for_size(size, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tokenizer.encode(torch.zeros(1, 3, size, size))
        slots = CAPTION + schedule.num_slots(config.read_last_scale)
        operations = {"codes": counter.get_total_flops(), "training": 6 * parameters * slots}
        for stage, each in operations.items():
            hours = {f"{count:.0e}": count * each / rate / 3600 for count in COUNTS}
            case = {"size": size, "stage": stage, "operations": each, "card_hours": hours}
            if stage == "codes":
                case["bytes"] = LISTS * CODE_BYTES * schedule.num_tokens
            costs.append(case)
    print("| size | stage | operations an image | bytes an image | card hours, 10⁶ images | 10⁹ images |")
    print("|---|---|---:|---:|---:|---:|")
    for case in costs:
        hours = case["card_hours"]
        held = f"{case['bytes']:,}" if "bytes" in case else ""
        print(
            f"| {case['size']}² | {case['stage']} | {case['operations']:.2e} | {held} | {hours['1e+06']:,.1f} | "
            f"{hours['1e+09']:,.0f} |"
        )
    write_result(RESULTS / "scaling_costs.json", {"costs": costs, "rate": rate, "gpu": measured["machine"]["gpu"]})


if __name__ == "__main__":
    main()
