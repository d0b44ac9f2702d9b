"""Compare a converted Qwen2.5-VL with the original: exact outputs, and unchanged weights after conversion back (CPU).

    python benchmarks/qwen_parity.py

The Qwen2.5-VL models are small, random, in float32 and saved by transformers: tied and untied, sharded and not, with
and without spare rows in the vocabulary. Logits are those of whole sentences, and texts those of `generate` on a padded
batch. The original may not generate the three tokens of an image, which a random model sometimes writes and a NextFlow
never writes as text. Writes `results/qwen_parity.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from backbone import RESULTS
from random_qwen import SENTENCES, save_qwen, small_vq_config
from transformers import AutoTokenizer

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.conversion.checkpoints import ShardedCheckpoint
from transformers_nextflow.conversion.qwen2_5_vl import convert_qwen2_5_vl, export_qwen2_5_vl
from transformers_nextflow.evaluation.results import write_result


@torch.no_grad()
def figures_of(folder: Path, tied: bool, spare_rows: int, max_shard_size: str) -> dict:
    """Converts a model there and back inside of `folder`, and compares it with the original."""
    qwen = save_qwen(folder / "qwen", tied, spare_rows, max_shard_size)
    settings = {"vq_config": small_vq_config(), "max_shard_size": max_shard_size}
    model = NextFlowForConditionalGeneration.from_pretrained(
        convert_qwen2_5_vl(folder / "qwen", folder / "nextflow", **settings)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "nextflow", padding_side="left")
    errors = []
    for text in SENTENCES:
        inputs = tokenizer(text, return_tensors="pt")
        expected = qwen(**inputs).logits
        errors.append((model(**inputs).logits[..., : expected.shape[-1]] - expected).abs().max())
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False}
    silent = [model.config.boi_token_id, model.config.eoi_token_id, model.config.image_token_id]
    expected = qwen.generate(**inputs, **options, suppress_tokens=silent)
    texts_equal = torch.equal(model.generate(**inputs, **options), expected)
    before = ShardedCheckpoint(folder / "qwen")
    after = ShardedCheckpoint(export_qwen2_5_vl(folder / "nextflow", folder / "qwen", folder / "back"))
    unchanged = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    return {
        "max_abs_error": float(max(errors)),
        "logits_equal": float(max(errors)) == 0.0,
        "texts_equal": texts_equal,
        "round_trip_equal": unchanged,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    cases = {}
    for tied in (False, True):
        for spare_rows in (0, 8):
            for max_shard_size in ("5GB", "20KB"):
                name = f"{'tied' if tied else 'untied'}, {spare_rows} spare rows, shards of {max_shard_size}"
                with TemporaryDirectory() as folder:
                    cases[name] = figures_of(Path(folder), tied, spare_rows, max_shard_size)
                print(name, cases[name])
    values = {
        "max_abs_error": max(case["max_abs_error"] for case in cases.values()),
        "all_equal": all(all(value for name, value in case.items() if "equal" in name) for case in cases.values()),
        "cases": cases,
    }
    print("\nwritten:", write_result(Path(arguments.results) / "qwen_parity.json", values))


if __name__ == "__main__":
    main()
