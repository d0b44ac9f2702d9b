"""Compare converted tokenizers of TokenFlow with the outputs of the original code.

    python benchmarks/tokenflow_parity.py FOLDER

FOLDER holds, for each checkpoint NAME, `NAME.pt` in the released layout, `NAME.json` with its settings, and
`NAME_outputs.safetensors` with what TokenFlow's own code computed with it from `input` (`pixel_recon`, `f_hat`, …).
Writes `results/tokenflow_parity.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from backbone import RESULTS
from safetensors.torch import load_file

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.conversion.tokenflow import convert_tokenflow
from transformers_nextflow.evaluation.results import write_result


TOLERANCE = 1e-4


def load_converted(path: Path) -> tuple[NextFlowVQModel, dict]:
    """Converts a checkpoint into a folder and loads it from there; returns the model and its settings."""
    settings = json.loads(path.with_suffix(".json").read_text())
    tower = settings["semantic_encoder"]
    with tempfile.TemporaryDirectory() as folder:
        convert_tokenflow(
            path,
            Path(folder) / "model",
            interpolate=settings["infer_interpolate"],
            semantic_heads=tower.get("heads") or tower.get("num_attention_heads"),
            semantic_decoder_heads=settings["semantic_decoder"]["num_heads"],
        )
        return NextFlowVQModel.from_pretrained(Path(folder) / "model").eval(), settings


@torch.no_grad()
def parity(path: Path) -> dict:
    """Returns whether all indices are equal, and the largest absolute difference of each output."""
    model, settings = load_converted(path)
    original = load_file(path.with_name(f"{path.stem}_outputs.safetensors"))
    pixels, semantic_dim = original["input"], model.config.semantic_code_dim
    schedule = model.schedule_of(pixels)
    latents = model.encode_latents(pixels)
    output = model.quantizer.encode(latents, schedule)
    tokens = output.image_tokens
    computed = {
        "semantic_features": latents[:, :semantic_dim].flatten(2).transpose(1, 2),
        "pixel_features": latents[:, semantic_dim:],
        "f_hat": output.features,
    }
    for prefix, num_scales in (("", -1), ("prefix_", settings["prefix_num_scales"])):
        features = model.quantizer.decode(tokens[:, : schedule.offsets[num_scales]], schedule)
        computed[f"{prefix}pixel_recon"] = model.decode_features(features)
        computed[f"{prefix}semantic_recon"] = model.decode_semantics(features).flatten(1, 2)
    errors = {name: float((value - original[name]).abs().max()) for name, value in computed.items()}
    return {
        "indices": tokens.numel(),
        "indices_equal": torch.equal(tokens, original["indices"]),
        "max_abs_error": max(errors.values()),
        "errors": errors,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    checkpoints = sorted(arguments.folder.glob("*.pt"))
    if not checkpoints:
        raise SystemExit(f"{arguments.folder} holds no checkpoint .pt.")
    cases = {}
    for path in checkpoints:
        cases[path.stem] = parity(path)
        print(path.stem, json.dumps(cases[path.stem], indent=2))
    values = {
        "indices_equal": all(case["indices_equal"] for case in cases.values()),
        "max_abs_error": max(case["max_abs_error"] for case in cases.values()),
        "checkpoints": cases,
    }
    print("written", write_result(arguments.results / "tokenflow_parity.json", values))
    if not values["indices_equal"] or values["max_abs_error"] > TOLERANCE:
        raise SystemExit(f"Codes differ, or a value differs by more than {TOLERANCE}.")


if __name__ == "__main__":
    main()
