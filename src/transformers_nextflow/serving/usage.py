"""How many tokens a request and its answer have, as OpenAI's answers tell it."""

from __future__ import annotations

from collections.abc import Sequence

from ..processing_nextflow import NextFlowProcessor
from .jobs import ChatJob, Finished, ImageJob


def image_usage(processor: NextFlowProcessor, job: ImageJob, finished: Sequence[Finished]) -> dict:
    """`usage` of drawn images: tokens of the prompt, and codes."""
    text_tokens, image_tokens = _count(processor, job.prompt), sum(image.num_tokens for image in finished)
    details = {"text_tokens": text_tokens, "image_tokens": 0}
    return {
        "input_tokens": text_tokens,
        "output_tokens": image_tokens,
        "total_tokens": text_tokens + image_tokens,
        "input_tokens_details": details,
    }


def chat_usage(processor: NextFlowProcessor, job: ChatJob, text: str, finished: Sequence[Finished]) -> dict:
    """`usage` of a chat: tokens of the conversation with its images' slots; those of the answer's text, and codes."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    read = len(processor.apply_chat_template([job.messages], **options)["input_ids"][0])
    written = _count(processor, text) + sum(image.num_tokens for image in finished)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _count(processor: NextFlowProcessor, text: str) -> int:
    return len(processor.tokenizer(text)["input_ids"])
