# The package must be installed: pip install transformers-nextflow[pipelines]
from transformers_nextflow.pipeline_nextflow import NextFlowPipeline  # noqa: F401
