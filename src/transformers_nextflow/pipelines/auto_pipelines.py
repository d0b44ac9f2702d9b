"""Makes `from_pipe` of diffusers' `AutoPipelineForText2Image`, `…Image2Image` and `…Inpainting` accept our pipeline."""

from __future__ import annotations

import sys


TABLES = ("AUTO_TEXT2IMAGE_PIPELINES_MAPPING", "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING", "AUTO_INPAINT_PIPELINES_MAPPING")


class AutoPipelinesMixin:
    """A pipeline for the tasks of all three auto pipelines; their `from_pipe` accepts it.

    Their `from_pretrained` finds only classes of diffusers itself.
    """

    @property
    def config(self) -> dict:
        # `from_pipe` reads this property first. Importing the module with the tables imports every pipeline of
        # diffusers, which takes a second and gives warnings; when `from_pipe` runs it was imported already.
        if module := sys.modules.get("diffusers.pipelines.auto_pipeline"):
            for table in TABLES:
                getattr(module, table)["nextflow"] = type(self)
        return super().config
