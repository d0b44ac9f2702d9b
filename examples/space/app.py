"""A Space of Hugging Face with the page of `transformers-nextflow demo`, for the model that its settings name."""

import os

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.demo.page import launch


if __name__ == "__main__":
    model = os.environ["TRANSFORMERS_NEXTFLOW_MODEL"]
    launch(NextFlowPipeline.from_pretrained(model, device_map="auto"))
