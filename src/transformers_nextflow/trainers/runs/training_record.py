"""The training record: a file in a checkpoint with all on which the result depends, besides weights and states."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import is_peft_model
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from ...data.rows import ROW_ROOT
from .trained_weights import local_shard


RECORD_FILE = "training_record.json"
# The number of rows of the data that are compared, evenly spaced.
NUM_ROWS = 64
# How many values of each weight are compared.
NUM_WEIGHTS = 64

# Files in a checkpoint that are not needed to resume.
NOT_STATES = {".json", ".jinja", ".md", ".py", ".txt"}

# Arguments that do not affect later steps. All others do, or may.
HARMLESS = {
    "output_dir", "disable_tqdm", "report_to", "run_name", "project", "push_to_hub", "skip_memory_metrics", "do_train",
    "do_eval", "do_predict", "torch_empty_cache_steps", "include_num_input_tokens_seen", "ddp_timeout", "debug",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
    "num_completions_to_print", "max_nonfinite_steps", "use_cpu", "reward_timeout",
}  # fmt: skip
HARMLESS_FAMILIES = ("logging_", "log_", "save_", "hub_", "trackio_")
# Arguments of the resuming itself, and of the process.
NOT_RECORDED = {"resume_from_checkpoint", "resume_with_changes", "local_rank"}
# Entries that transformers and diffusers add to a config or set in it, which do not affect the training of a loaded
# model.
NOT_OF_CONFIG = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "trained_on", "_attn_implementation", "_attn_implementation_internal",
    "_use_default_values", "_class_name", "_diffusers_version",
}  # fmt: skip


def training_record(trainer, extras: dict[str, Any]) -> dict[str, Any]:
    """The record of a trainer that is ready to train, as it is read back from a file.

    Args:
        extras: other things on which the result depends, by name: modules that are not trained, functions, numbers.
    """
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    if is_peft_model(model):
        # A checkpoint holds only the adapter.
        extras = extras | {"base model": [p for p in model.parameters() if not p.requires_grad]}
        adapters = {name: config.to_dict() for name, config in model.peft_config.items()}
        model = model.get_base_model()
    else:
        adapters = {}
    record = {
        "arguments": {name: value for name, value in args.to_dict().items() if name not in NOT_RECORDED},
        "trainer": type(trainer).__name__,
        "processes": args.world_size,
        "devices": f"{args.device.type} x {max(args.n_gpu, 1)}",
        "dataset": _dataset(trainer.train_dataset, args),
        "collator": _named(trainer.data_collator) | getattr(trainer.data_collator, "settings", {}),
        "processor": _processor(trainer.processing_class),
        "model": _config(model.config),
        "attention": getattr(model.config, "_attn_implementation", None),
        "adapters": adapters,
        "trained weights": _trained(trainer.model),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    record |= {name: _extra(value) for name, value in extras.items()}
    return _json_round_trip(record)


def write_record(record: dict, checkpoint: Path):
    """Write the record with the names of the files of weights and states that are in the checkpoint."""
    found = [path for path in checkpoint.rglob("*") if path.is_file() and path.suffix not in NOT_STATES]
    files = sorted(str(path.relative_to(checkpoint)) for path in found if path.name != TRAINING_ARGS_NAME)
    (checkpoint / RECORD_FILE).write_text(json.dumps(record | {"files": files}, indent=2))


def changes_since(checkpoint: Path, record: dict) -> tuple[list[str], list[str]]:
    """Differences from the training that wrote the checkpoint, in words: those that change the result, and the
    others.
    """
    try:
        old = json.loads((checkpoint / RECORD_FILE).read_text())
    except (OSError, ValueError):
        return [f"it holds no {RECORD_FILE} to compare with"], []
    decisive = [f"{name} is missing" for name in old.pop("files") if not (checkpoint / name).is_file()]
    if old["arguments"].get("save_only_model"):
        decisive.append("it was saved with save_only_model, without states of optimizer, learning rate and chance")
    harmless = []
    for path, before, now in _differences(old, record):
        name = ".".join(path[1:] if path[0] == "arguments" else path)
        (harmless if _is_harmless(path) else decisive).append(f"{name} was {_short(before)} and is {_short(now)}")
    return decisive, harmless


def _is_harmless(path: tuple[str, ...]) -> bool:
    if path[0] == "arguments":
        return path[1] in HARMLESS or path[1].startswith(HARMLESS_FAMILIES)
    return path[0] == "versions"


def _differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name), new.get(name), (*path, name))
    elif old != new:
        yield path, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# The parts of a record ------------------------------------------------------------------------------------------------


def _dataset(rows: Any, args: TrainingArguments) -> dict[str, Any]:
    """Name, length and a digest of some rows; of a stream, of the first ones, and how many workers divide it."""
    described, inner = _named(rows), rows
    while inner is not None:
        described |= getattr(inner, "settings", {})
        inner = getattr(inner, "rows", None)
    with seeded_random_states(args.seed):
        if hasattr(rows, "__len__"):
            numbers = np.unique(np.linspace(0, len(rows) - 1, NUM_ROWS).round().astype(int)) if len(rows) else []
            return described | {"rows": len(rows), "content": digest([_row(rows, int(number)) for number in numbers])}
        described["workers"] = max(args.dataloader_num_workers, 1)
        source = getattr(rows, "rows", rows)
        if rows is None or iter(source) is iter(source):  # no rows, or a stream that can be read only once
            return described
        return described | {"content": digest([_without_root(row) for row in islice(iter(source), NUM_ROWS)])}


def _without_root(row: Any) -> Any:
    """The row without the folder to which its paths are relative."""
    return {name: value for name, value in row.items() if name != ROW_ROOT} if isinstance(row, dict) else row


def _row(rows: Any, number: int) -> Any:
    try:
        return rows[number]
    except Exception as error:  # an error follows when the row is trained on
        return f"{type(error).__name__}: {error}"


def processor_differences(some: Any, other: Any) -> list[str]:
    """The names of settings in which two processors differ."""
    records = [_json_round_trip(_processor(processor)) for processor in (some, other)]
    return [".".join(path) for path, _, _ in _differences(*records)]


def _processor(processor: Any) -> dict[str, Any]:
    if not isinstance(processor, ProcessorMixin):
        return _named(processor)
    settings = _config(processor.to_dict())
    words = getattr(getattr(processor, "tokenizer", None), "get_vocab", dict)()
    return settings | {"chat_template": digest(processor.chat_template), "vocabulary": digest(words)}


def _config(config: PreTrainedConfig | dict) -> dict[str, Any]:
    values = config if isinstance(config, dict) else config.to_dict()
    return {
        name: _config(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in NOT_OF_CONFIG
    }


def _trained(model: nn.Module) -> str:
    trained = {name: [list(p.shape), str(p.dtype)] for name, p in model.named_parameters() if p.requires_grad}
    kinds = ", ".join(sorted({dtype for _, dtype in trained.values()}))
    return f"{len(trained)} of {kinds} ({digest(trained)})"


def _named(value: Any) -> dict[str, str | None]:
    inner = getattr(value, "func", value)  # the function inside of a partial
    return {"class": None if value is None else getattr(inner, "__qualname__", type(inner).__qualname__)}


def _extra(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return digest([*value.state_dict().values()], sampled=True)
    if isinstance(value, list) and all(isinstance(item, torch.Tensor) for item in value):
        return digest(value, sampled=True)
    return _named(value)["class"] if callable(value) else value


def _json_round_trip(record: dict) -> dict:
    """The record as it is read from its file."""
    return json.loads(json.dumps(record, default=_plain))


def _plain(value: Any) -> Any:
    """A value for JSON, without addresses in memory."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else type(value).__qualname__


@contextmanager
def seeded_random_states(seed: int) -> Iterator[None]:
    """During the block the random states of Python, numpy and torch start from the seed; afterwards they are
    restored.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def digest(value: Any, sampled: bool = False) -> str:
    """16 hexadecimal digits that differ if values differ; with `sampled` only some values of tensors count."""
    hasher = hashlib.sha256()
    _update(hasher, value, sampled)
    return hasher.hexdigest()[:16]


def _update(hasher, value: Any, sampled: bool):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = local_shard(value)
        hasher.update(f"{value.dtype}{list(value.shape)}".encode())
        value = value.flatten()[:: max(1, value.numel() // NUM_WEIGHTS)] if sampled else value
        hasher.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        hasher.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        hasher.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            _update(hasher, value[key], sampled)
    elif isinstance(value, list | tuple):
        hasher.update(f"[{len(value)}".encode())
        for item in value:
            _update(hasher, item, sampled)
    elif isinstance(value, bytes):
        hasher.update(value)
    else:
        plain = isinstance(value, str | int | float | bool | None)
        hasher.update((repr(value) if plain else type(value).__qualname__).encode())
