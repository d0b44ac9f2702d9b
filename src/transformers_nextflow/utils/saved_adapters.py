"""Saves adapters of PEFT beside the full weights of their model, so that one folder holds both.

    model.safetensors, config.json, …   the model itself, without adapters
    adapters/adapters.json              their names, and which of them are active
    adapters/NAME/                      one folder for each, in PEFT's format

This is needed since transformers saves adapters in place of their model, and diffusers cannot save PEFT's wrapper.
"""

from __future__ import annotations

import copy
import json
import re
from functools import wraps
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from .atomic_files import write_whole


FOLDER, INDEX = "adapters", "adapters.json"
# The prefix of PEFT's own names of an adapter's weights.
PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_config.json")
# The names under which PEFT's wrappers of layers hold the layers themselves.
WRAPPED = ("base_layer", "original_module", "token_adapter")
INSTALL = "pip install transformers-nextflow[peft]"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's wrapper, in which adapters act.

    Raises:
        ValueError: for prompt learning, which acts in the wrapper and not in the model.
    """
    if not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise ValueError(f"The adapter {name!r} is of type {config.peft_type.value}, which cannot draw; take LoRA.")
    return model.get_base_model()


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has wrapped layers of an unwrapped model; the wrappers stay when an adapter is deleted."""
    return any(part in WRAPPED for name, _ in model.named_modules() for part in name.split("."))


def with_adapters_beside(model: nn.Module) -> nn.Module:
    """A view of an unwrapped model that saves the model itself, and its adapters beside it; its weights are the same
    tensors.

    Raises:
        ValueError: for adapters that are merged into the weights, and for quantised weights.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "A quantised model is not saved together with its adapters; save the adapters by model.save_pretrained."
        )
    if merged := [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]:
        raise ValueError(
            f"Adapters are merged into {merged[0]} and may be taken out again; call unmerge_adapter() to save them "
            "apart, or merge_and_unload() to save one model."
        )
    with torch.device("meta"):
        own_names = type(model)(model.config).state_dict().keys()
    weights = {
        ".".join(part for part in name.split(".") if part not in WRAPPED): weight
        for name, weight in model.state_dict().items()
    }
    state_dict = {name: weights[name] for name in own_names}
    plain = copy.copy(model)
    plain._hf_peft_config_loaded = False

    @wraps(model.save_pretrained)  # diffusers looks up which options it takes
    def save_pretrained(folder, *args, **kwargs):
        # The present names of the weights: loading an adapter has left a renaming on the model, which must not apply.
        options = {"state_dict": state_dict, "save_original_format": False}
        type(model).save_pretrained(plain, folder, *args, **(kwargs | options))
        _save_adapters(model, Path(folder))

    plain.save_pretrained = save_pretrained
    return plain


def _save_adapters(model: nn.Module, folder: Path):
    names = list(getattr(model, "peft_config", {}))
    if not names:
        return
    for name in names:
        save_adapter(model, name, folder / FOLDER / name)
    with write_whole(folder / FOLDER / INDEX) as partial_file:
        partial_file.write_text(json.dumps({"names": names, "active": _active_adapters(model)}, indent=2) + "\n")


def save_adapter(model: nn.Module, name: str, folder: Path):
    """Write one adapter of an unwrapped model in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = {PREFIX + key: value.contiguous() for key, value in _weights(model, name).items()}
    save_file(state_dict, folder / FILES[0], metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(folder)


def add_saved_adapter(model: nn.Module, name: str, path, subfolder: str = "", **hub_options):
    """Load an adapter in PEFT's format, from a folder or a repository of the Hub, into an unwrapped model.

    Raises:
        OSError: if there is no adapter.
        ValueError: if peft is missing, or the adapter does not fit; then the model does not change.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(f"{path} holds an adapter, which needs peft: {INSTALL}.") from error
    weights, config = (cached_file(path, file, subfolder=subfolder, **hub_options) for file in FILES)
    # `load_adapter` of transformers 5.17 loads no rows of new tokens and no modules that were trained whole.
    before = _active_adapters(model) if getattr(model, "peft_config", None) else None
    model.add_adapter(PeftConfig.from_pretrained(Path(config).parent), name)
    try:
        _fill(model, name, {key.removeprefix(PREFIX): value for key, value in load_file(weights).items()})
    except ValueError:
        if before is None:
            without_adapters(model)
        else:
            model.delete_adapter(name)
            model.set_adapter(before)
        raise


def without_adapters(model: nn.Module) -> nn.Module:
    """The unwrapped model with its own layers in place of PEFT's wrappers; weights do not change."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            inner = getattr(child, "token_adapter", child)  # rows of new tokens are inside of another wrapper
            own = getattr(inner, "base_layer", getattr(child, "original_module", None))
            if own is not None:
                setattr(parent, name, own)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
    return model


def load_adapters(model: nn.Module, path, subfolder: str = "", **kwargs):
    """Load the adapters, if there are any, beside the model's weights (`with_adapters_beside`).

    Args:
        path, subfolder: a folder or a repository of the Hub, and the folder in it.
        kwargs: arguments of `from_pretrained`, of which the Hub's options are used.
    """
    options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
    place = f"{subfolder}/{FOLDER}".lstrip("/")
    index = cached_file(path, INDEX, subfolder=place, _raise_exceptions_for_missing_entries=False, **options)
    if index is None or hasattr(model, "peft_config"):
        # If the folder of a single active adapter was loaded, transformers has loaded that adapter already.
        return
    saved = json.loads(Path(index).read_text())
    for name in saved["names"]:
        add_saved_adapter(model, name, path, f"{place}/{name}", **options)
    model.eval().requires_grad_(False)
    if saved["active"]:
        model.set_adapter(saved["active"])
    else:
        model.disable_adapters()


def _weights(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # Extended embeddings are among the model's own weights, so they are not saved again.
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _fill(model: nn.Module, name: str, saved: dict[str, torch.Tensor]):
    """Replace an adapter's weights by saved ones, in the saved dtype, which may be wider than that of the adapted
    weights.
    """
    own = _weights(model, name)
    # A model without some parts, such as OneCAT with `drawing_only`, ignores an adapter's weights for these parts.
    left_out = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()) or "(?!)")
    saved = {key: value for key, value in saved.items() if key in own or not left_out.search(key)}
    if odd := sorted(own.keys() ^ saved.keys()):
        raise ValueError(
            f"The adapter {name!r} does not fit {type(model).__name__}: only one of them has {odd[0]}; load the model "
            "that was saved."
        )
    if other := [key for key in own if own[key].shape != saved[key].shape]:
        raise ValueError(
            f"The adapter {name!r} does not fit {type(model).__name__}: {other[0]} has the shape "
            f"{tuple(saved[other[0]].shape)}, and the model takes {tuple(own[other[0]].shape)}."
        )
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    for key, value in own.items():
        tensors[value.data_ptr()].data = saved[key].to(value.device)


def _active_adapters(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return [] if layer.disable_adapters else list(layer.active_adapters)
