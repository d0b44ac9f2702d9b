"""Lists the tensors of a file of weights and compares them with those of a NextFlow."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.folder_parts import local_part
from .checkpoints import State, config_errors, open_checkpoint, read_json, read_layout


# Training checkpoints hold their settings beside the tensors; a namespace runs no code.
SETTINGS = (argparse.Namespace,)
# The script for each model type of a source folder.
CONVERTERS = {
    "qwen2_5_vl": "convert_qwen2_5_vl.py",
    "siglip": "convert_siglip2.py",
    "siglip2": "convert_siglip2.py",
    "llava_llama": "convert_tokenflow_t2i.py",
    "onecat": "convert_onecat.py",
}
MATCHES, OTHER_SHAPE, UNKNOWN, MISSING = "matches", "other shape", "not NextFlow's", "missing"


def report(path: Path | str, config: NextFlowConfig | NextFlowVQConfig | None = None) -> str:
    """A line for each tensor: whether it matches, key, shape, dtype; then NextFlow's keys that are missing, and counts.

    Args:
        path: a file of weights, or the folder of a model or a pipeline.
        config: config of the NextFlow to compare with; default: the config beside the file if it is one of ours, else
            that of the 7B preset.

    Raises:
        ValueError: if the file is damaged, holds no tensors, or is a pickle with code in it.
    """
    path = local_part("model", path)
    found = layout_of(path)
    config = config or _config_beside(path)
    expected, tied = expected_layout(config)
    rows = [(_verdict(key, tensor, expected), key, _described(tensor)) for key, tensor in found.items()]
    rows += [
        (MISSING, key, _described(tensor)) for key, tensor in expected.items() if key not in found and key not in tied
    ]
    width = max((len(key) for _, key, _ in rows), default=0)
    lines = [f"{verdict:<15} {key:<{width}} {described}" for verdict, key, described in rows]
    counts = Counter(verdict for verdict, *_ in rows)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (MATCHES, OTHER_SHAPE, UNKNOWN, MISSING))
    lines.append(f"{len(found)} tensors against {type(config).__name__}: {summary}")
    if converter := CONVERTERS.get(_model_type_beside(path)):
        lines.append(f"It is the source of a conversion: python conversion/{converter}")
    return "\n".join(lines)


def layout_of(path: Path | str) -> State:
    """Meta tensors of all tensors in a file of weights or the folder of a model.

    Raises:
        ValueError: if it is damaged, holds no tensors, or is a pickle with code in it.
    """
    path = Path(path)
    found = open_checkpoint(path).layout if path.is_dir() else read_layout(path, allowed=SETTINGS)
    if not found:
        raise ValueError(f"{path} holds no named tensors; is it a file of weights?")
    return found


def expected_layout(config: NextFlowConfig | NextFlowVQConfig) -> tuple[State, set[str]]:
    """Meta tensors of a NextFlow, or of its tokenizer, and the names that may be missing since they are tied."""
    model_class = NextFlowVQModel if isinstance(config, NextFlowVQConfig) else NextFlowForConditionalGeneration
    with torch.device("meta"):
        model = model_class(config)
    return model.state_dict(), set(model.all_tied_weights_keys)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _model_type_beside(path: Path) -> str | None:
    file = _folder(path) / "config.json"
    return read_json(file).get("model_type") if file.is_file() else None


def _config_beside(path: Path) -> NextFlowConfig | NextFlowVQConfig:
    for config_class in (NextFlowConfig, NextFlowVQConfig):
        if _model_type_beside(path) == config_class.model_type:
            with config_errors(_folder(path)):
                return config_class.from_pretrained(_folder(path))
    return NextFlowConfig.nextflow_7b()


def _verdict(key: str, tensor: torch.Tensor, expected: State) -> str:
    if key not in expected:
        return UNKNOWN
    return MATCHES if tensor.shape == expected[key].shape else OTHER_SHAPE


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
