"""LoRA with the method names of diffusers. The adapters are PEFT's layers inside of the pipeline's model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..utils.atomic_files import atomic_folder_write
from ..utils.checkpoint_checks import loading_errors
from ..utils.known_names import check_names, checks_names
from ..utils.offloading import check_holds_weights
from ..utils.saved_adapters import (
    HUB_OPTIONS,
    active_adapters,
    adapted_parts,
    add_saved_adapter,
    delete_adapters,
    save_adapter,
    set_active_adapters,
    set_scale,
    swap_adapter,
    without_adapters,
)
from ..utils.short_repr import short_repr
from ..utils.typed_values import check_finite, check_types


class LoraMixin:
    """Loads, switches, mixes, merges and removes adapters of a [`NextFlowPipeline`]'s model."""

    # Of all adapters that `enable_lora_hotswap` made room for.
    _lora_rank: int | None = None

    def load_lora_weights(
        self,
        pretrained_model_name_or_path,
        adapter_name: str | None = None,
        subfolder: str = "",
        hotswap: bool = False,
        **kwargs,
    ):
        """Load a saved adapter into the model and make it the active one, also where adapters were switched off; those
        that were there stay loaded.

        Args:
            pretrained_model_name_or_path: a folder in PEFT's format, as `save_lora_weights`, trainers and
                `PeftModel.save_pretrained` write it, or a repository of the Hub.
            adapter_name: default: "default_0", "default_1", …; with `hotswap` the only one.
            subfolder: the place of the adapter in it.
            hotswap: take the place of the adapter of this name, in its own tensors, with a weight of 1; which ones are
                active stays. `enable_lora_hotswap` makes room for higher ranks.
            kwargs: options of the Hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            OSError: if there is no such adapter.
            ValueError: for a name that is taken, or with `hotswap` for one that is not; for an adapter that does not
                fit the model, or the one in whose place it shall be; and while adapters are fused.
        """
        check_names(kwargs, HUB_OPTIONS, "load_lora_weights")
        path, names = pretrained_model_name_or_path, self.get_list_adapters()["model"]
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"load_lora_weights takes a folder or a repository of the Hub, got {short_repr(path)}.")
        if hotswap:
            name = self._named_or_only(adapter_name)
            with loading_errors(path):
                swap_adapter(self.unwrapped_model, name, path, subfolder, **kwargs)
            if self._lora_rank is None:  # else what was recorded reads the same tensors
                self._discard_recordings()
            return
        if adapter_name is None:
            numbers = range(len(names) + 1)
            adapter_name = next(name for name in (f"default_{number}" for number in numbers) if name not in names)
        if adapter_name in names:
            raise ValueError(f"There is an adapter {adapter_name!r} already; use another name, or delete it first.")
        self._check_not_fused("load_lora_weights")
        with loading_errors(path):
            add_saved_adapter(self.unwrapped_model, adapter_name, path, subfolder, self._lora_rank, **kwargs)
        self.unwrapped_model.eval()
        self.enable_lora()

    def enable_lora_hotswap(self, target_rank: int = 128):
        """Make room in adapters that are loaded from now on, so that others up to a rank take their place by
        `load_lora_weights(…, hotswap=True)`, and scales that `compile_drawing` recorded are kept.

        Raises:
            ValueError: for a rank below 1, and where an adapter is loaded already.
        """
        check_types({"target_rank": target_rank}, {"target_rank": int}, "enable_lora_hotswap")
        if target_rank < 1:
            raise ValueError(f"target_rank must be 1 or more, got {target_rank}.")
        if names := self.get_list_adapters()["model"]:
            raise ValueError(
                f"The model has the adapters {names}; call enable_lora_hotswap before the first is loaded."
            )
        self._lora_rank = target_rank

    @checks_names
    def save_lora_weights(self, save_directory, adapter_name: str | None = None):
        """Write an adapter in PEFT's format, from which `load_lora_weights` takes it.

        Args:
            adapter_name: default: the only one.

        Raises:
            ValueError: for a name that is none of an adapter, and where the model's weights are offloaded.
        """
        check_holds_weights(self.unwrapped_model, "saving")
        name = self._named_or_only(adapter_name)
        with atomic_folder_write(save_directory) as folder:
            save_adapter(self.unwrapped_model, name, folder)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None):
        """Make adapters the active ones, and set their weights.

        Args:
            adapter_weights: one for all or one for each; 1 (the default) is as it was trained, 0 is without it. Modules
                that an adapter holds whole have no weight: they are its own, or the model's where it is not active.

        Raises:
            ValueError: for a name that is there twice, for two adapters that hold the same module whole, and while
                adapters are fused.
        """
        _check(adapter_names=adapter_names, adapter_weights=adapter_weights)
        names = _as_list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        weights = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapters came with {len(weights)} weights; give one for each.")
        self._check_adapters(names)
        self._check_not_fused("set_adapters")
        set_active_adapters(self.unwrapped_model, names)
        for layer in self._lora_layers():
            for name, weight in zip(names, weights):
                set_scale(layer, name, weight)
        self.unwrapped_model.requires_grad_(False)
        self.enable_lora()

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None, safe_fusing: bool = False):
        """Merge adapters into the weights of the model, so that they cost no time in drawing.

        Args:
            lora_scale: a factor for the weights of the adapters; 1 changes nothing.
            adapter_names: default: the active ones.
            safe_fusing: refuse weights that would not be finite; nothing is then fused.

        Raises:
            ValueError: where adapters are fused already, or switched off, or the model's weights are offloaded.
        """
        check_holds_weights(self.unwrapped_model, "fuse_lora")
        given = {} if adapter_names is None else {"adapter_names": adapter_names}
        _check(lora_scale=lora_scale, safe_fusing=safe_fusing, **given)
        names = self.get_active_adapters() if adapter_names is None else _as_list(adapter_names)
        self._check_adapters(names)
        self._check_not_fused("fuse_lora")
        if any(part.disable_adapters for part in adapted_parts(self.unwrapped_model)):
            raise ValueError("The adapters are switched off; call enable_lora before fuse_lora.")
        fused = {
            part: [name for name in names if _has_adapter(part, name)] for part in adapted_parts(self.unwrapped_model)
        }
        if any(len(own) > 1 for part, own in fused.items() if _is_module_to_save(part)):
            raise ValueError(f"Two of the adapters {names} replace the same module; fuse one of them.")
        for layer in self._lora_layers():
            layer.scaling_before_fusing = {name: float(scaling) for name, scaling in layer.scaling.items()}
            for name in (name for name in names if name in layer.scaling):
                layer.scaling[name] = layer.scaling[name] * lora_scale
        try:
            for part, own in fused.items():
                if _is_module_to_save(part):
                    part.merged_adapters, part.active_before_fusing = own, list(part.active_adapters)
                    part.set_adapter(own)
                elif hasattr(part, "merge"):
                    part.merge(safe_merge=safe_fusing, adapter_names=own)
        except ValueError:
            self.unfuse_lora()
            raise
        self._discard_recordings()

    def unfuse_lora(self):
        """Take adapters out of the weights again. Raises `ValueError` where the model's weights are offloaded."""
        check_holds_weights(self.unwrapped_model, "unfuse_lora")
        for part in adapted_parts(self.unwrapped_model):
            if _is_module_to_save(part) and part.merged_adapters:
                part.set_adapter(part.active_before_fusing)
                part.merged_adapters = []
            elif getattr(part, "merged", False):
                part.unmerge()
            for name, scaling in vars(part).pop("scaling_before_fusing", {}).items():
                held = part.scaling[name]
                part.scaling[name] = held.fill_(scaling) if torch.is_tensor(held) else scaling
        self._discard_recordings()

    def unload_lora_weights(self):
        """Remove all adapters; the model is the plain one again. Merged adapters stay in the weights."""
        self.register_modules(model=without_adapters(self.unwrapped_model))
        self._discard_recordings()

    def delete_adapters(self, adapter_names: str | Sequence[str]):
        """Remove some adapters. Raises `ValueError` while adapters are fused."""
        _check(adapter_names=adapter_names)
        names = _as_list(adapter_names)
        self._check_adapters(names)
        self._check_not_fused("delete_adapters")
        if set(names) == set(self.get_list_adapters()["model"]):
            self.unload_lora_weights()
        else:
            delete_adapters(self.unwrapped_model, names)
            self.unwrapped_model.requires_grad_(False)
            self._discard_recordings()

    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int):
        """Move adapters to another device, as those that are not in use to the CPU. Those that are active must be where
        the model is.
        """
        _check(adapter_names=adapter_names)
        names = _as_list(adapter_names)
        self._check_adapters(names)
        for part in adapted_parts(self.unwrapped_model):
            for held in (getattr(part, kind) for kind in (*part.adapter_layer_names, *part.other_param_names)):
                for name in names:
                    if name in held and hasattr(held[name], "to"):
                        held[name] = held[name].to(device)

    def _place_scales(self):
        """Bring adapters' scales to their layers; PEFT keeps them where `to` does not find them."""
        for layer in self._lora_layers():
            for name, scale in layer.scaling.items():
                if torch.is_tensor(scale):
                    layer.scaling[name] = scale.to(layer.get_base_layer().weight.device)

    def enable_lora(self):
        """Switch the active adapters on (again)."""
        self._set_enabled(True)

    def disable_lora(self):
        """Switch all adapters off; they stay loaded. Raises `ValueError` while adapters are fused."""
        self._check_not_fused("disable_lora")
        self._set_enabled(False)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return active_adapters(self.unwrapped_model)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters by component; the only component is "model"."""
        return {"model": list(getattr(self.unwrapped_model, "peft_config", {}))}

    def _set_enabled(self, on: bool):
        for part in adapted_parts(self.unwrapped_model):
            part.enable_adapters(on)
        self.unwrapped_model.requires_grad_(False)
        self._discard_recordings()

    def _check_adapters(self, names: Sequence[str]):
        known = self.get_list_adapters()["model"]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"There is no adapter {unknown[0]!r}; the model has {known or 'none'}.")
        if len(set(names)) < len(names):
            raise ValueError(f"An adapter must be named only once, got {short_repr(list(names))}.")

    def _check_not_fused(self, what: str):
        """Raises `ValueError` while adapters are fused: no others act beside them, and with another strength or without
        their own matrices they could not be taken out again.
        """
        if any(getattr(part, "merged_adapters", ()) for part in adapted_parts(self.unwrapped_model)):
            raise ValueError(f"Adapters are fused into the weights; call unfuse_lora before {what}.")

    def _named_or_only(self, adapter_name: str | None) -> str:
        names = self.get_list_adapters()["model"]
        if adapter_name is None and len(names) != 1:
            raise ValueError(f"The model has {names or 'no adapters'}; name the one that is meant.")
        name = adapter_name or names[0]
        self._check_adapters([name])
        return name

    def _lora_layers(self) -> Iterator[nn.Module]:
        return (part for part in adapted_parts(self.unwrapped_model) if hasattr(part, "set_scale"))

    def _discard_recordings(self):
        """Discard recorded scales, which hold the layers as they were before."""
        compiled = getattr(self.unwrapped_model, "compiled_drawing", None)
        if compiled is not None:
            self.unwrapped_model.compile_drawing(fuse=compiled.fuse)


def _check(**given):
    """Raises `ValueError` for names that are not strings, and for weights that are not finite numbers."""
    hints = {
        "adapter_names": str | Sequence[str],
        "adapter_weights": float | Sequence[float] | None,
        "lora_scale": float,
        "safe_fusing": bool,
    }
    check_types(given, hints, "adapters")
    check_finite(given)


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _has_adapter(part: nn.Module, name: str) -> bool:
    return any(name in getattr(part, kind, ()) for kind in part.adapter_layer_names)


def _is_module_to_save(part: nn.Module) -> bool:
    """Whether a part is one that adapters hold whole."""
    return "modules_to_save" in part.adapter_layer_names
