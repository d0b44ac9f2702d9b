"""diffusers' `AutoPipelineForText2Image`, `…Image2Image` and `…Inpainting`, which are to find our pipeline."""

from __future__ import annotations

import sys


TABLES = ("AUTO_TEXT2IMAGE_PIPELINES_MAPPING", "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING", "AUTO_INPAINT_PIPELINES_MAPPING")


class AutoPipelinesMixin:
    """A pipeline that does the tasks of all three; `from_pipe` of them takes it over.

    By `from_pretrained` they find only classes of diffusers itself.
    """

    @property
    def config(self) -> dict:
        # `from_pipe` reads it first. The module with the tables imports every pipeline of diffusers, which takes a
        # second and warns of what they lack: it is there by then, and nobody else needs it.
        if module := sys.modules.get("diffusers.pipelines.auto_pipeline"):
            for table in TABLES:
                getattr(module, table)["nextflow"] = type(self)
        return super().config
