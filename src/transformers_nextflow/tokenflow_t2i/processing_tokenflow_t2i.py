"""Prompts to TokenFlow-t2i's inputs, and its images back to pixels."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from ..processing_nextflow import DrawingInputsMixin, check_prompts
from ..sequence.padding import pad_left
from ..utils.atomic_files import atomic_save


class TokenFlowT2IProcessor(DrawingInputsMixin, ProcessorMixin):
    r"""Tokenizer and image processor in one. A prompt is `<s>` and the plain text, with nothing after it.

    Args:
        image_processor ([`NextFlowImageProcessor`]): turns pixel values into images.
        tokenizer: a tokenizer that begins every text with a special token, as Llama's does, and has a padding token.
        max_text_tokens: the longest prompt, `<s>` included; the released model was trained with 128.

    Raises:
        ValueError: for a tokenizer without these tokens.
    """

    def __init__(self, image_processor, tokenizer, max_text_tokens: int = 128):
        begin, text = tokenizer("").input_ids, tokenizer("a").input_ids
        if len(begin) != 1 or text[:1] != begin:
            raise ValueError(
                f"The tokenizer reads an empty text as {begin} and 'a' as {text}; use one that begins texts with <s> "
                "and adds nothing behind."
            )
        if tokenizer.pad_token_id is None:
            raise ValueError('The tokenizer has no pad_token; add one: tokenizer.add_special_tokens({"pad_token": …}).')
        self.max_text_tokens = max_text_tokens
        super().__init__(image_processor, tokenizer)

    save_pretrained = atomic_save(ProcessorMixin.save_pretrained)
    # The model reads no images and writes no text.
    think_prefix = None

    def apply_image_prompt(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Sequence] | None = None,
        allow_empty: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prompts for drawing.

        Special tokens that a prompt spells out are read as plain text.

        Args:
            prompts: one prompt or several.
            images: must be empty, since the model draws only from text.
            allow_empty: allow empty prompts, such as the unconditional prompt of guidance.

        Returns:
            `input_ids` and `attention_mask` (num_prompts, length), padded on the left.

        Raises:
            ValueError: for no prompts, one that is no string, an empty one, one that is too long, and for images.
        """
        if images is not None:
            raise ValueError("TokenFlow-t2i draws only from text; leave image out.")
        prompts = check_prompts(prompts, allow_empty)
        rows = self.tokenizer(prompts, split_special_tokens=True).input_ids
        for prompt, row in zip(prompts, rows):
            if len(row) > self.max_text_tokens:
                raise ValueError(
                    f"The prompt {prompt[:30]!r}… has {len(row)} tokens, more than the {self.max_text_tokens} that the "
                    "model knows; shorten it."
                )
        return BatchFeature(pad_left(rows, self.tokenizer.pad_token_id), tensor_type=return_tensors)

    def post_process_images(self, images, output_type: str = "pil") -> list:
        """Decoded images, (3, height, width) in [-1, 1] each, as "pil", "np" or "pt"; see the image processor."""
        return self.image_processor.postprocess(images, output_type=output_type)
