"""Text and pictures to the model's inputs, and its outputs back to pictures and text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from .tokenization_nextflow import CHAT_TEMPLATE, add_image_tokens


class NextFlowProcessor(ProcessorMixin):
    r"""Tokenizer, image processor and chat template in one.

    Args:
        image_processor ([`NextFlowImageProcessorPil`]): brings pictures to the sizes of the scale schedules.
        tokenizer: any tokenizer with `<|im_start|>` and `<|im_end|>`; one without `<boi>`, `<eoi>` or `<|image_pad|>`
            (Qwen2.5-VL's) is given them.
        chat_template: Jinja; default: Qwen's format without a system message.
        read_last_scale: whether the model reads the last scale too (`NextFlowConfig.read_last_scale`); if so a picture
            has one more grid of slots.
    """

    text_kwargs = {"padding": False, "padding_side": "left"}

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None, read_last_scale: bool = False):
        add_image_tokens(tokenizer)
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.boi_token, self.boi_token_id = tokenizer.boi_token, tokenizer.boi_token_id
        self.eoi_token, self.eoi_token_id = tokenizer.eoi_token, tokenizer.eoi_token_id
        self.read_last_scale = read_last_scale
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(self, text=None, images=None, **kwargs: Unpack[ProcessingKwargs]) -> BatchFeature:
        """
        Args:
            text: one text or a list. Each `<|image_pad|>` in it stands for one picture and becomes `<boi>`, as many
                `<|image_pad|>` as the picture has slots (paper, figure 5), `<eoi>`.
            images: the pictures in order of appearance, flat or as one list per text; see
                [`NextFlowImageProcessorPil`].

        Returns:
            `input_ids` and `attention_mask` (batch, length), `pixel_values` (num_images, 3, height, width) and
            `image_grids` (num_images, 2); tensors with `return_tensors="pt"`, which takes `padding=True` for texts of
            different length.

        Raises:
            ValueError: if placeholders and pictures differ in number, or a picture is not usable.
        """
        return super().__call__(images=images, text=text, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            placeholders = [sample.count(self.image_token) for sample in texts]
            rows = images if isinstance(images, list | tuple) else [] if images is None else [images]
            nested = bool(rows) and all(isinstance(row, list | tuple) for row in rows)
            pictures = [len(row) for row in rows] if nested else len(rows)
            # Not left to transformers: 5.17 cuts the surplus silently.
            if placeholders != pictures if nested else sum(placeholders) != pictures:
                raise ValueError(
                    f"The texts hold {placeholders} {self.image_token} each, but were given {pictures} images; "
                    f"give every text as many images as it has placeholders."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        schedule = self.image_processor.schedule_for_grid(*image_inputs["image_grids"][image_idx])
        return self.boi_token + self.image_token * schedule.num_slots(self.read_last_scale) + self.eoi_token

    def apply_image_prompt(
        self, prompts: str | Sequence[str], allow_empty: bool = False, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Prompts for drawing: a chat with one user turn each, and `<boi>` as the start of the answer.

        Special tokens that a prompt spells out are read as plain text.

        Args:
            prompts: one prompt or several.
            allow_empty: let a prompt be empty, as the unconditional half of guidance is.

        Returns:
            `input_ids` and `attention_mask` (num_prompts, length), padded on the left, `<boi>` last.

        Raises:
            ValueError: for no prompts, a prompt that is no string, and an empty one (white space alone included).
        """
        rows = self.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in check_prompts(prompts, allow_empty)],
            add_generation_prompt=True,
            tokenize=True,
            sanitize_control_tokens=True,
            return_tensors=None,
        )
        return pad_left([[*row, self.boi_token_id] for row in rows], self.tokenizer.pad_token_id, return_tensors)

    def post_process_images(self, images, output_type: str = "pil") -> list:
        """Decoded pictures, (3, height, width) in [-1, 1] each, as "pil", "np" or "pt"; see the image processor."""
        return self.image_processor.postprocess(images, output_type=output_type)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]


def check_prompts(prompts: str | Sequence[str], allow_empty: bool) -> Sequence[str]:
    """Prompts as a list. Raises `ValueError` for none, for one that is no string, and for an empty one."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompts must be a string or a list of strings, got {prompts!r}.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Prompt {index} must be a string, got {prompt!r} of type {type(prompt).__name__}.")
        if not prompt.strip() and not allow_empty:
            raise ValueError(f"Prompt {index} is empty ({prompt!r}); say what is to be drawn.")
    return prompts


def pad_left(rows: Sequence[list[int]], pad_token_id: int, return_tensors: str | None) -> BatchFeature:
    """Rows of token ids as `input_ids` and `attention_mask` (rows, length), padded on the left."""
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    data = {
        "input_ids": [[pad_token_id] * pad + row for pad, row in zip(padding, rows)],
        "attention_mask": [[0] * pad + [1] * len(row) for pad, row in zip(padding, rows)],
    }
    return BatchFeature(data, tensor_type=return_tensors)
