"""What a pipeline's repository carries for `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.

The package itself must be installed: pip install transformers-nextflow[pipelines]
"""

from transformers_nextflow.pipeline_nextflow import NextFlowPipeline


__all__ = ["NextFlowPipeline"]
