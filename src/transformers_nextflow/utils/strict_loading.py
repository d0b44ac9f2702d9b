"""Strict loading of models: errors for weights that transformers would fill in, cast or accept."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from .checkpoint_checks import (
    check_complete,
    check_floats,
    check_index,
    check_settings,
    check_shapes,
    check_weights,
    loading_errors,
)
from .folder_parts import pipeline_errors


class StrictLoadingMixin:
    """Raises errors for checkpoints with missing tensors, which transformers fills with random values and a warning,
    and for those with NaN, infinity or integers.
    """

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers. Raises `ValueError` naming tensors that are missing, or that are no finite floats."""
        if "torch_dtype" in kwargs:  # diffusers says so, and transformers warns of its own older name
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        with loading_errors(path), pipeline_errors(path, kwargs):
            if path is not None and os.path.isdir(folder := os.path.join(path, kwargs.get("subfolder") or "")):
                check_index(folder)
                check_settings(folder)
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_complete(info["missing_keys"])
        check_weights(model)
        return (model, info) if output_loading_info else model

    def load_adapter(self, *args, **kwargs):
        """As in transformers. Raises `ValueError` as `from_pretrained` does."""
        info = super().load_adapter(*args, **kwargs)
        check_complete(info.missing_keys)
        check_weights(self)
        return info

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs):
        if load_config.hf_quantizer is None and not (state_dict or load_config.ignore_mismatched_sizes):
            check_shapes(model, checkpoint_files or ())
        info, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, **kwargs
        )
        if load_config.hf_quantizer is None and (stored := state_dict or checkpoint_files):
            # transformers would cast integers.
            check_floats(stored, info.unexpected_keys)
        return info, offloaded

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        # For an adapter's folder transformers reports only tensors that the adapter lacks, not those of its base.
        check_complete(info.missing_keys)
        return info
