"""LoRA with the method names of diffusers. The adapters are PEFT's layers inside of the pipeline's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..utils.atomic_files import write_into
from ..utils.checkpoint_checks import loading_errors
from ..utils.finite_numbers import check_finite
from ..utils.known_names import check_names
from ..utils.saved_adapters import HUB_OPTIONS, add_saved_adapter, save_adapter, without_adapters
from ..utils.typed_values import check_types


class LoraMixin:
    """Loads, switches, mixes, merges and removes adapters of a [`NextFlowPipeline`]'s model."""

    def load_lora_weights(
        self, pretrained_model_name_or_path, adapter_name: str | None = None, subfolder: str = "", **kwargs
    ):
        """Load a saved adapter into the model and make it the active one; adapters that were there stay loaded.

        Args:
            pretrained_model_name_or_path: a folder in PEFT's format, as `save_lora_weights`, trainers and
                `PeftModel.save_pretrained` write it, or a repository of the Hub.
            adapter_name: default: "default_0", "default_1", …
            subfolder: the folder of the adapter in it.
            kwargs: options of the Hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            OSError: if there is no such adapter.
            ValueError: for a name that is already used, and for an adapter that does not fit the model.
        """
        check_names(kwargs, HUB_OPTIONS, "load_lora_weights")
        names = self.get_list_adapters()["model"]
        if adapter_name is None:
            numbers = range(len(names) + 1)
            adapter_name = next(name for name in (f"default_{number}" for number in numbers) if name not in names)
        if adapter_name in names:
            raise ValueError(f"There is an adapter {adapter_name!r} already; take another name, or delete it first.")
        with loading_errors(pretrained_model_name_or_path):
            add_saved_adapter(self.unwrapped_model, adapter_name, pretrained_model_name_or_path, subfolder, **kwargs)
        self.unwrapped_model.eval().requires_grad_(False)
        self._compile_again()

    def save_lora_weights(self, save_directory, adapter_name: str | None = None):
        """Write an adapter in PEFT's format, from which `load_lora_weights` takes it.

        Args:
            adapter_name: default: the only one.
        """
        names = self.get_list_adapters()["model"]
        if adapter_name is None and len(names) != 1:
            raise ValueError(f"The model has the adapters {names}; name the one that is saved.")
        self._check_adapters([adapter_name or names[0]])
        with write_into(save_directory) as folder:
            save_adapter(self.unwrapped_model, adapter_name or names[0], folder)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None):
        """Make adapters the active ones, and set their weights.

        Args:
            adapter_weights: one for all or one for each; with 1 (the default) an adapter acts as it was trained, with 0
                not at all.
        """
        _check(adapter_names=adapter_names, adapter_weights=adapter_weights)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        weights = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapters came with {len(weights)} weights; give one for each.")
        self._check_adapters(names)
        for layer in self._adapted_layers():
            layer.set_adapter(names)
            for name, weight in zip(names, weights):
                if hasattr(layer, "set_scale"):
                    layer.set_scale(name, weight)
        self.unwrapped_model.requires_grad_(False)
        self.enable_lora()

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None, safe_fusing: bool = False):
        """Merge adapters into the weights of the model, so that they cost no time in drawing.

        Args:
            lora_scale: a factor for the weights of the adapters; 1 changes nothing.
            adapter_names: default: the active ones.
            safe_fusing: raise an error for merged weights that are not finite.
        """
        _check(lora_scale=lora_scale)
        names = self.get_active_adapters() if adapter_names is None else list(adapter_names)
        self._check_adapters(names)
        for layer in self._adapted_layers():
            if hasattr(layer, "scale_layer"):
                layer.scaling_before_fusing = dict(layer.scaling)
                layer.scale_layer(lora_scale)
            layer.merge(safe_merge=safe_fusing, adapter_names=[name for name in names if _has(layer, name)])
        self._compile_again()

    def unfuse_lora(self):
        """Remove merged adapters from the weights again."""
        for layer in self._adapted_layers():
            if layer.merged:
                layer.unmerge()
                layer.scaling.update(getattr(layer, "scaling_before_fusing", {}))
        self._compile_again()

    def unload_lora_weights(self):
        """Remove all adapters; the model is the plain one again. Merged adapters stay in the weights."""
        self.register_modules(model=without_adapters(self.unwrapped_model))
        self._compile_again()

    def delete_adapters(self, adapter_names: str | Sequence[str]):
        """Remove some adapters."""
        _check(adapter_names=adapter_names)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_adapters(names)
        if set(names) == set(self.get_list_adapters()["model"]):
            self.unload_lora_weights()
        else:
            self.unwrapped_model.delete_adapter(names)
            self._compile_again()

    def enable_lora(self):
        """Switch the active adapters on (again)."""
        self._switch(True)

    def disable_lora(self):
        """Switch all adapters off; they stay loaded."""
        self._switch(False)

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        layer = next(self._adapted_layers(), None)
        return [] if layer is None or layer.disable_adapters else list(layer.active_adapters)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters by component; the only component is "model"."""
        return {"model": list(getattr(self.unwrapped_model, "peft_config", {}))}

    def _switch(self, on: bool):
        for layer in self._adapted_layers():
            layer.enable_adapters(enabled=on)
        self.unwrapped_model.requires_grad_(False)
        self._compile_again()

    def _check_adapters(self, names: Sequence[str]):
        known = self.get_list_adapters()["model"]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"There is no adapter {unknown[0]!r}; the model has {known or 'none'}.")

    def _adapted_layers(self) -> Iterator[nn.Module]:
        if self.get_list_adapters()["model"]:
            from peft.tuners.tuners_utils import BaseTunerLayer

            yield from (module for module in self.unwrapped_model.modules() if isinstance(module, BaseTunerLayer))

    def _compile_again(self):
        """Discard recorded scales, which hold the layers as they were before."""
        if getattr(self.unwrapped_model, "compiled_drawing", None) is not None:
            self.unwrapped_model.compile_drawing()


def _check(**given):
    """Raises `ValueError` for names that are not strings, and for weights that are not finite numbers."""
    hints = {
        "adapter_names": str | Sequence[str],
        "adapter_weights": float | Sequence[float] | None,
        "lora_scale": float,
    }
    check_types(given, hints, "adapters")
    check_finite(given)


def _has(layer: nn.Module, name: str) -> bool:
    return any(name in getattr(layer, part, ()) for part in layer.adapter_layer_names)
