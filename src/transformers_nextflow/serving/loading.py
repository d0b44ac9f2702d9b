"""How commands and servers load a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..utils.devices import on_device
from ..utils.short_repr import short_path


if TYPE_CHECKING:
    from ..pipeline_nextflow import NextFlowPipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_pipeline(
    model: str, device: str | None = None, dtype: str = "auto", diffusion_decoder: str | None = None
) -> NextFlowPipeline:
    """Load a pipeline and bring it to its device.

    Args:
        model: folder of a model or a pipeline, or a repository of the Hub.
        device: as "cpu" or "cuda:0"; default: a GPU where there is one.
        dtype: one of `DTYPES`; "auto": as the weights are stored.
        diffusion_decoder: its folder or repository; default: a pipeline folder's own if it has one.

    Raises:
        ImportError: without diffusers.
        OSError: if nothing can be loaded from there.
        ValueError: for another dtype, and a device that cannot be used.
    """
    from ..pipeline_nextflow import NextFlowPipeline  # its error names the extra

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
    logging.disable_progress_bar()
    try:
        pipeline = NextFlowPipeline.from_pretrained(model, dtype=dtype, diffusion_decoder=diffusion_decoder)
    except (OSError, ValueError) as error:
        beside = "" if diffusion_decoder is None else f" with the diffusion decoder {short_path(diffusion_decoder)}"
        raise OSError(f"No model can be loaded from {short_path(model)}{beside}: {error}") from error
    return on_device(pipeline, device)


def check_loadable(model: str, device: str | None = None, dtype: str = "auto"):
    """Raises the errors of `load_pipeline`; nothing stays loaded, and the device holds no weights."""
    if device is not None:
        on_device(torch.empty(0), device)
    load_pipeline(model, "cpu", dtype)
