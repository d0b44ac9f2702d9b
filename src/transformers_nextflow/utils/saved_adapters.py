"""Saves adapters of PEFT beside the full weights of their model, so that one folder holds both.

    model.safetensors, config.json, …   the model itself, without adapters
    adapters/adapters.json              their names, weights, which of them are chosen, and whether these act
    adapters/NAME/                      one folder for each, in PEFT's format

This is needed since transformers saves adapters in place of their model, and diffusers cannot save PEFT's wrapper.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from .atomic_files import atomic_write, check_path
from .checkpoint_checks import FLOATS, is_finite, read_json
from .offloading import check_holds_weights
from .short_repr import short_repr
from .typed_values import check_finite, check_types


if TYPE_CHECKING:
    from peft import PeftConfig


FOLDER, INDEX = "adapters", "adapters.json"
# The prefix of PEFT's own names of an adapter's weights.
PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_config.json")
# The names under which PEFT's wrappers of layers hold the layers themselves.
WRAPPED = ("base_layer", "original_module", "token_adapter")
INSTALL = "pip install transformers-nextflow[peft]"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's wrapper, in which adapters act.

    Raises:
        ValueError: for prompt learning, which acts in the wrapper and not in the model.
    """
    if not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise ValueError(
                f"The adapter {name!r} is of type {config.peft_type.value}, which is not supported for drawing; "
                "use LoRA."
            )
    return model.get_base_model()


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has wrapped layers of an unwrapped model; the wrappers stay when an adapter is deleted."""
    return any(part in WRAPPED for name, _ in model.named_modules() for part in name.split("."))


def with_adapters_beside(model: nn.Module) -> nn.Module:
    """A view of an unwrapped model that saves the model itself, and its adapters beside it; its weights are the same
    tensors.

    Raises:
        ValueError: for adapters that are merged into the weights, and for quantised or offloaded weights.
    """
    check_holds_weights(model, "saving")
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
    # "active" are those that act: none where adapters are switched off, as "chosen" then tells.
    index = {"names": names, "active": active_adapters(model), "chosen": _chosen_adapters(model)}
    index["weights"] = {name: weight_of(model, name) for name in names}
    with atomic_write(folder / FOLDER / INDEX) as partial_file:
        partial_file.write_text(json.dumps(index, indent=2) + "\n")


def save_adapter(model: nn.Module, name: str, folder: Path):
    """Write one adapter of an unwrapped model in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = {
        PREFIX + key: _padded_to_rank(model, name, key, value).contiguous()
        for key, value in _weights(model, name).items()
    }
    save_file(state_dict, folder / FILES[0], metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(folder)


def add_saved_adapter(model: nn.Module, name: str, path, subfolder: str = "", rank: int | None = None, **hub_options):
    """Put an adapter in PEFT's format, from a folder or a repository of the Hub, into an unwrapped model, and make it
    the active one.

    Args:
        rank: which its matrices are padded to, so that adapters up to it can take its place (`swap_adapter`).

    Raises:
        OSError: if there is no adapter.
        ValueError: if peft is missing, the model's weights are offloaded, or the adapter does not fit; then the model
            does not change.
    """
    check_adapter_name(name)
    check_holds_weights(model, "an adapter that is loaded")
    config, weights = _read_adapter(path, subfolder, **hub_options)
    if rank is not None and config.peft_type != "LORA":
        raise ValueError(f"{path} holds an adapter of the kind {config.peft_type.value}; only LoRAs are hot-swapped.")
    if rank is not None and (own := max([config.r, *config.rank_pattern.values()])) > rank:
        raise ValueError(f"The adapter {name!r} has rank {own}, and enable_lora_hotswap made room for {rank}.")
    from peft import inject_adapter_in_model

    # transformers 5.17 loads no rows of new tokens and no whole modules by its own `load_adapter`, and `add_adapter`
    # refuses one beside another that holds a module whole.
    before = active_adapters(model) if getattr(model, "peft_config", None) else None
    config.base_model_name_or_path = vars(model).get("name_or_path")
    try:
        with warnings.catch_warnings():
            # A second adapter is asked for.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, name)
        model._hf_peft_config_loaded = True
        _load_adapter_weights(model, name, weights)
        if rank is not None:
            from peft.utils.hotswap import prepare_model_for_compiled_hotswap

            prepare_model_for_compiled_hotswap(model, target_rank=rank)
    except Exception:
        if before is None:
            without_adapters(model)
        else:
            if name in model.peft_config:
                delete_adapters(model, [name])
            set_active_adapters(model, before)
        raise
    set_active_adapters(model, [name])


def swap_adapter(model: nn.Module, name: str, path, subfolder: str = "", **hub_options):
    """Put a saved adapter into the tensors of one that an unwrapped model has. Layers that the new one leaves out are
    then as without it.

    Raises:
        OSError: if there is no saved one.
        ValueError: for one of another kind, of more layers or of a higher rank, and where the old one is merged or
            offloaded; the model is then as it was.
    """
    check_holds_weights(model, "an adapter that is loaded")
    config, saved = _read_adapter(path, subfolder, **hub_options)
    from peft.utils.hotswap import check_hotswap_configs_compatible

    if any(name in getattr(part, "merged_adapters", ()) for part in adapted_parts(model)):
        raise ValueError(f"The adapter {name!r} is fused; call unfuse_lora() before another takes its place.")
    old = model.peft_config[name]
    check_hotswap_configs_compatible(old, config)
    own = _weights(model, name)
    saved = _without_ignored_parts(model, own, saved)
    odd = (saved.keys() - own.keys()) | {key for key in own.keys() - saved.keys() if _rank_axis(key) is None}
    refused = f"{path} cannot take the place of the adapter {name!r}: "
    if odd or old.trainable_token_indices != config.trainable_token_indices:
        raise ValueError(f"{refused}only one of them has {min(odd, default='these tokens')}; load it without hotswap.")
    if large := [key for key in saved if not _has_room(key, own[key], saved[key])]:
        raise ValueError(
            f"{refused}{large[0]} has the shape {tuple(saved[large[0]].shape)}, and there is room for "
            f"{tuple(own[large[0]].shape)}; call enable_lora_hotswap(target_rank=…) before the first adapter is loaded."
        )
    if wide := [key for key in saved if torch.promote_types(saved[key].dtype, own[key].dtype) != own[key].dtype]:
        raise ValueError(
            f"{refused}{wide[0]} is in {saved[wide[0]].dtype}, which {own[wide[0]].dtype} does not hold; load it "
            "without hotswap."
        )
    for key, value in own.items():
        value.data.zero_()
        if key in saved:
            value.data[tuple(map(slice, saved[key].shape))].copy_(saved[key])
    old.r, old.lora_alpha, old.rank_pattern = config.r, config.lora_alpha, config.rank_pattern  # its layers stay
    from peft.utils.other import get_pattern_key

    for place, layer in model.named_modules():
        if name in getattr(layer, "lora_alpha", ()):
            ranks, alphas = config.rank_pattern, config.alpha_pattern
            layer.r[name] = ranks.get(get_pattern_key(ranks.keys(), place), config.r)
            layer.lora_alpha[name] = alphas.get(get_pattern_key(alphas.keys(), place), config.lora_alpha)
            set_scale(layer, name, 1.0)


def set_scale(layer: nn.Module, name: str, scale: float):
    """Say how much an adapter counts in a layer of LoRA. A tensor, which recordings read, stays the same one."""
    held = layer.scaling.get(name)
    layer.set_scale(name, scale)
    if torch.is_tensor(held):
        layer.scaling[name] = held.fill_(layer.scaling[name])


def weight_of(model: nn.Module, name: str) -> float:
    """How much an adapter counts, as `set_scale` set it: 1 as it was trained, also for one without LoRA's scales."""
    for layer in adapted_parts(model):
        if name in getattr(layer, "scaling", ()) and hasattr(layer, "set_scale"):
            # A copy, since another thread may be drawing with the layer.
            as_trained = copy.copy(layer)
            as_trained.scaling = dict(layer.scaling)
            as_trained.set_scale(name, 1.0)
            if trained := float(as_trained.scaling[name]):
                return float(layer.scaling[name]) / trained
    return 1.0


def adapted_parts(model: nn.Module) -> Iterator[nn.Module]:
    """What PEFT has put into an unwrapped model: around layers, and around modules that an adapter holds whole."""
    if getattr(model, "peft_config", None):
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        yield from (part for part in model.modules() if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)))


def set_active_adapters(model: nn.Module, names: Sequence[str]):
    """Make adapters of an unwrapped model the active ones.

    Raises:
        ValueError: for two that hold the same module, or rows of the same table, whole.
    """
    names, chosen = list(names), []
    for part in adapted_parts(model):
        own = names
        if _is_module_to_save(part):
            try:
                name = part.check_set_adapter(names) if names else None
            except ValueError as error:
                raise ValueError(f"Two of the adapters {names} replace the same module; use one of them.") from error
            own = [] if name is None else [name]
        chosen.append((part, own))
    for part, own in chosen:
        part.set_adapter(own)


def delete_adapters(model: nn.Module, names: Sequence[str]):
    """Take adapters, but not all of them, out of an unwrapped model; of those that are left the active ones, or else
    the first, are active.
    """
    from peft.functional import delete_adapter

    kept = [name for name in model.peft_config if name not in names]
    active = [name for name in _chosen_adapters(model) if name in kept]
    set_active_adapters(model, kept[:1])  # PEFT warns where it has to choose
    for name in names:
        delete_adapter(model, name, prefix=f"{model.peft_config[name].peft_type.value.lower()}_")
        del model.peft_config[name]
    set_active_adapters(model, active or kept[:1])


def check_adapter_name(name: object):
    """Raises `ValueError` for a name that names no module and no folder."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise ValueError(f"An adapter's name is of letters, digits, _ and -, got {short_repr(name)}.")


def without_adapters(model: nn.Module) -> nn.Module:
    """The unwrapped model with its own layers in the places of PEFT's; weights are left as they are, and a module that
    a merged adapter holds whole stays.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            inner = getattr(child, "token_adapter", child)  # rows of new tokens are inside of another wrapper
            own = getattr(inner, "base_layer", getattr(child, "original_module", None))
            if merged := [name for name in getattr(child, "modules_to_save", ()) if name in child.merged_adapters]:
                own = child.modules_to_save[merged[0]]
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
    saved = _read_index(index)
    for name in saved["names"]:
        add_saved_adapter(model, name, path, f"{place}/{name}", **options)
    model.eval().requires_grad_(False)
    if chosen := saved["active"] or saved.get("chosen"):
        set_active_adapters(model, chosen)
    for part in adapted_parts(model):
        if hasattr(part, "set_scale"):
            for name, weight in saved.get("weights", {}).items():
                set_scale(part, name, weight)
        if not saved["active"]:
            part.enable_adapters(False)


def _read_index(file) -> dict:
    """What `_save_adapters` wrote; the file of an earlier version has no weights and no chosen ones."""
    saved = read_json(file)
    hints = {"names": list[str], "active": list[str], "chosen": list[str], "weights": dict[str, float]}
    check_types(saved, hints, INDEX)
    check_finite(saved.get("weights", {}))
    for entry, how in (("active", " active"), ("chosen", " chosen"), ("weights", "'s weight")):
        if unknown := [name for name in saved.get(entry, ()) if name not in saved.get("names", ())]:
            raise ValueError(f"{file} has the adapter {unknown[0]!r}{how}, which is none of its names.")
    if missing := [name for name in ("names", "active") if name not in saved]:
        raise ValueError(f"{file} lacks {missing[0]}; save the model again.")
    return saved


def _read_adapter(path, subfolder: str, **hub_options) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Config and weights of a saved adapter; raises `ValueError` if peft is missing, or they are none of an adapter."""
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(f"{path} holds an adapter, which needs peft: {INSTALL}.") from error
    check_path(path)
    weights, file = (cached_file(path, file, subfolder=subfolder, **hub_options) for file in FILES)
    settings = read_json(file)
    if not isinstance(settings.get("peft_type"), str):
        raise ValueError(f"{file} has no peft_type; is it the config of an adapter?")
    check_finite(settings)
    saved = {key.removeprefix(PREFIX): value for key, value in load_file(weights).items()}
    if broken := [key for key, value in saved.items() if value.dtype not in FLOATS or not bool(is_finite(value))]:
        raise ValueError(f"{weights} holds {saved[broken[0]].dtype} that are not finite floats in {broken[0]}.")
    config = PeftConfig.from_pretrained(Path(file).parent)
    # What is made for it is made at random, before its weights come into it.
    largest = max((side for value in saved.values() for side in value.shape), default=0)
    if getattr(config, "r", 0) > largest:
        raise ValueError(
            f"{file} has r={config.r}, but no dimension of the adapter's weights is larger than {largest}."
        )
    return config, saved


def _rank_axis(key: str) -> int | None:
    """The axis of a weight that its rank is the size of; `None` for what has no rank."""
    return 0 if key.endswith(".lora_A.weight") else 1 if key.endswith(".lora_B.weight") else None


def _has_room(key: str, own: torch.Tensor, saved: torch.Tensor) -> bool:
    axis = _rank_axis(key)
    sizes = [(a, b) for number, (a, b) in enumerate(zip(own.shape, saved.shape)) if number != axis]
    is_low_enough = axis is None or saved.shape[axis] <= own.shape[axis]
    return own.dim() == saved.dim() and all(a == b for a, b in sizes) and is_low_enough


def _padded_to_rank(model: nn.Module, name: str, key: str, value: torch.Tensor) -> torch.Tensor:
    """An adapter's weight without what it was padded with; with zeros where a swapped one left out a layer of a lower
    rank.
    """
    axis = _rank_axis(key)
    if axis is None:
        return value
    rank = model.get_submodule(key.rsplit(".", 2)[0]).r[name]
    missing = max(0, rank - value.shape[axis])
    return F.pad(value, (0, missing) if axis == 1 else (0, 0, 0, missing)).narrow(axis, 0, rank)


def _weights(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # Extended embeddings are among the model's own weights, so they are not saved again.
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _without_ignored_parts(model: nn.Module, own, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The saved weights without those for parts that the model leaves out, such as OneCAT with `drawing_only`."""
    left_out = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()) or "(?!)")
    return {key: value for key, value in saved.items() if key in own or not left_out.search(key)}


def _load_adapter_weights(model: nn.Module, name: str, saved: dict[str, torch.Tensor]):
    """Replace an adapter's weights by saved ones, in the saved dtype, which may be wider than that of the adapted
    weights.
    """
    own = _weights(model, name)
    saved = _without_ignored_parts(model, own, saved)
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


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that act in an unwrapped model."""
    if not getattr(model, "peft_config", None) or _first_layer(model).disable_adapters:
        return []
    return _chosen_adapters(model)


def _chosen_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that act, or would if adapters were not switched off."""
    return list(_first_layer(model).active_adapters)


def _first_layer(model: nn.Module) -> nn.Module:
    return next(part for part in adapted_parts(model) if not _is_module_to_save(part))


def _is_module_to_save(part: nn.Module) -> bool:
    """Whether a part is PEFT's wrapper around a module that adapters hold whole, or rows of it."""
    return hasattr(part, "check_set_adapter")
