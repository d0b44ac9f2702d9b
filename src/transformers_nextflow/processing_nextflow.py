"""Text and images to the model's inputs, and its outputs back to images and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers import BatchFeature, ImageProcessingMixin, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .configuration_nextflow import NextFlowConfig
from .image_processing_nextflow import IMAGE_SETTINGS, flatten_images
from .scale_schedule import ScaleSchedule
from .sequence.chat_encoding import (
    check_has_no_special_tokens,
    check_rendered,
    check_text,
    check_texts,
    encode_chats,
    encode_text,
    gather_special_tokens,
    template_errors,
)
from .sequence.padding import pad_left
from .tokenization_nextflow import CHAT_TEMPLATE, add_image_tokens
from .utils.atomic_files import atomic_save
from .utils.known_names import check_names
from .utils.older_transformers import SANITIZES_CONTROL_TOKENS
from .utils.short_repr import short_repr
from .utils.typed_values import check_types
from .video_processing_nextflow import expand_videos


PROCESSOR_TYPES = {
    "image_processor": ImageProcessingMixin,
    "tokenizer": PreTrainedTokenizerBase,
    "chat_template": str | dict | None,
    "read_last_scale": bool,
    "think_prefix": str | None,
    "caption_request": str,
}
# Keyword arguments of a call, given one by one or grouped.
TEXT_NAMES = [*get_type_hints(TextKwargs), "return_tensors"]
GROUPS = {"text_kwargs": TEXT_NAMES, "images_kwargs": IMAGE_SETTINGS, "common_kwargs": ["return_tensors"]}
# The library passes `videos` and `audio` too, without a value.
CALL_NAMES = ["text", "images", "videos", "audio", *TEXT_NAMES, *IMAGE_SETTINGS, *GROUPS]
CALL_NAMES += get_type_hints(ProcessingKwargs)


class DrawingInputsMixin:
    """Turns the arguments of a pipeline's call into those of `generate_images`."""

    def drawing_inputs(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        images: Sequence[Sequence] | None,
        contexts: Sequence[str],
        schedules: Sequence[ScaleSchedule],
        **options,
    ) -> dict:
        """Arguments of `generate_images` as tensors on the CPU.

        Args:
            prompts, negative_prompts: (B) texts; a negative prompt may be empty.
            images: for each prompt the images that it refers to; `None` for none.
            contexts: the names of the contexts that guidance compares with, from `ImageSampling.contexts`: "negative"
                is the negative prompt with the prompt's images, "unconditional" the same without images.
            schedules: schedules of the images to draw.
            options: options of `apply_image_prompt` for the prompts.
        """
        inputs = dict(self.apply_image_prompt(prompts, images, **options))
        for name in contexts:
            shown = images if name == "negative" else None
            compared = self.apply_image_prompt(negative_prompts, shown, allow_empty=True)
            inputs |= {f"{name}_{part}": compared[part] for part in ("input_ids", "attention_mask")}
        return inputs


class NextFlowProcessor(DrawingInputsMixin, ProcessorMixin):
    r"""Tokenizer, image processor and chat template in one.

    Args:
        image_processor ([`NextFlowImageProcessor`]): resizes images to sizes of the scale schedules.
        tokenizer: any tokenizer with `<|im_start|>` and `<|im_end|>`; `<boi>`, `<eoi>` and `<|image_pad|>` are added if
            it does not have them (as Qwen2.5-VL's).
        chat_template: Jinja; default: Qwen's format without a system message.
        read_last_scale: whether the model reads the last scale too (`NextFlowConfig.read_last_scale`); if so an image
            has one more grid of slots.
        think_prefix: the text with which an answer begins if the model is to reason before it draws; `None` for a model
            that was not trained to (paper, section 6.4).
        caption_request: the request to describe an image with which the model was trained.
    """

    save_pretrained = atomic_save(ProcessorMixin.save_pretrained)
    text_kwargs = {"padding_side": "left"}

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template: str | None = None,
        read_last_scale: bool = False,
        think_prefix: str | None = None,
        caption_request: str = "describe the picture.",
        **unknown,
    ):
        check_names(unknown, PROCESSOR_TYPES, type(self).__name__)
        given = {"read_last_scale": read_last_scale, "think_prefix": think_prefix, "caption_request": caption_request}
        given |= {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": chat_template}
        check_types(given, PROCESSOR_TYPES, type(self).__name__)
        add_image_tokens(tokenizer)
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.boi_token, self.boi_token_id = tokenizer.boi_token, tokenizer.boi_token_id
        self.eoi_token, self.eoi_token_id = tokenizer.eoi_token, tokenizer.eoi_token_id
        self.read_last_scale = read_last_scale
        self.think_prefix, self.caption_request = think_prefix, caption_request
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(self, text=None, images=None, **kwargs: Unpack[ProcessingKwargs]) -> BatchFeature:
        """
        Args:
            text: one text or a list. Each `<|image_pad|>` in it stands for one image and becomes `<boi>`, as many
                `<|image_pad|>` as the image has slots (paper, figure 5), `<eoi>`.
            images: the images in order of appearance, flat or as one list per text; see
                [`NextFlowImageProcessor`].

        Returns:
            `input_ids` and `attention_mask` (batch, length), `pixel_values` (num_images, 3, height, width) and
            `image_grids` (num_images, 2); tensors with `return_tensors="pt"`, which takes `padding=True` for texts of
            different length.

        Raises:
            ValueError: if placeholders and images differ in number, or an image is not usable.
        """
        check_names(kwargs, CALL_NAMES, type(self).__name__)
        for group, names in GROUPS.items():
            check_names(kwargs.get(group) or (), names, group)
        try:
            return super().__call__(images=images, text=text, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *args,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        **kwargs,
    ):
        """As [`~transformers.ProcessorMixin.apply_chat_template`].

        A part `{"type": "video", "video": video}` stands for the frames of a video, see `read_frames`; a file that has
        more than the image processor's `max_frames` is sampled. With `tokenize=True` special tokens that messages spell
        out are read as plain text. With `tokenize=False` the result is text; if the processor is called on it, as on
        any text, special tokens that messages spell out are read as special tokens.
        """
        check_texts(conversation)
        conversation = expand_videos(conversation, self.image_processor.max_frames)
        if tokenize:
            conversation = gather_special_tokens(self.tokenizer, conversation)
        with template_errors():
            rendered = super().apply_chat_template(conversation, chat_template, *args, tokenize=False, **kwargs)
        is_one = isinstance(rendered, str)
        check_rendered([conversation] if is_one else conversation, [rendered] if is_one else rendered, self.image_token)
        if not tokenize:
            return rendered
        if SANITIZES_CONTROL_TOKENS:
            kwargs.setdefault("sanitize_control_tokens", True)
        else:
            check_has_no_special_tokens(self.tokenizer, conversation)
        with template_errors():
            output = super().apply_chat_template(
                conversation, chat_template, *args, tokenize=tokenize, return_dict=return_dict, **kwargs
            )
        if return_assistant_tokens_mask and return_dict:
            chats = [conversation] if isinstance(conversation[0], dict) else conversation
            output["assistant_masks"] = self._answer_masks(chats, output, chat_template or self.chat_template)
            tensor_type = kwargs.get("return_tensors") or kwargs.get("processor_kwargs", {}).get("return_tensors")
            output = output.convert_to_tensors(tensor_type=tensor_type)
        return output

    def _answer_masks(self, chats: list, output: BatchFeature, chat_template: str) -> list[list[int]]:
        """For encoded conversations 1 at the tokens that the assistant wrote, its images included, and 0 elsewhere."""
        grids, masks = iter(output.get("image_grids", ())), []
        encoded = encode_chats(self.tokenizer, chats, chat_template, with_answers=True)
        for chat, occupied in zip(encoded, output["attention_mask"], strict=True):
            lengths = [
                len(self.image_placeholder_ids(*next(grids))) if i == self.image_token_id else 1 for i in chat.ids
            ]
            expanded = [int(flag) for flag, length in zip(chat.is_answer, lengths) for _ in range(length)]
            kept = int(sum(occupied))
            expanded = expanded[:kept] if self.tokenizer.truncation_side == "right" else expanded[-kept:]
            remaining = iter(expanded)
            masks.append([next(remaining) if present else 0 for present in occupied])
        return masks

    def validate_inputs(self, images=None, text=None, **kwargs):
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
                raise ValueError(f"text must be a string or a list of strings, got {short_repr(text)}.")
            for index, one in enumerate(texts):
                check_text(one, f"Text {index}")
            placeholders = [sample.count(self.image_token) for sample in texts]
            rows = images if isinstance(images, list | tuple) else [] if images is None else [images]
            nested = bool(rows) and all(isinstance(row, list | tuple) for row in rows)
            counts = [len(flatten_images(row)) for row in rows] if nested else len(flatten_images(rows))
            # Checked here, since transformers 5.17 silently drops surplus images.
            if placeholders != counts if nested else sum(placeholders) != counts:
                raise ValueError(
                    f"The texts hold {placeholders} {self.image_token} each, but were given {counts} images; "
                    f"give every text as many images as it has placeholders."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def check_fits(self, config: NextFlowConfig):
        """Raises `ValueError` if the processor does not fit a model of this config, which would then read its prompts
        or images wrongly; the message names what differs.
        """
        images, vq_config = self.image_processor, config.vq_config
        pairs = {
            "scales": (list(images.scales), list(vq_config.scales)),
            "patch_size": (images.patch_size, vq_config.patch_size),
            "levels": (images.scale_schedules.levels, vq_config.scale_schedules.levels),
            "range of pixel values": (images.pixel_range, (-1.0, 1.0)),
        }
        for name in ("read_last_scale", "boi_token_id", "eoi_token_id", "image_token_id"):
            pairs[name] = (getattr(self, name), getattr(config, name))
        differing = [f"{name} {own} and {models}" for name, (own, models) in pairs.items() if own != models]
        if len(self.tokenizer) > config.text_config.vocab_size:
            differing.append(f"{len(self.tokenizer)} tokens and a vocabulary of {config.text_config.vocab_size}")
        if differing:
            raise ValueError(
                f"Processor and model do not fit together: {', '.join(differing)}. Load both from one checkpoint."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return "".join(
            self.tokenizer.convert_ids_to_tokens(self.image_placeholder_ids(*image_inputs["image_grids"][image_idx]))
        )

    def image_placeholder_ids(self, height: int, width: int) -> list[int]:
        """The token ids of an image with the final grid (height, width) in a sequence: `<boi>`, its slots, `<eoi>`."""
        slots = self.image_processor.schedule_for_grid(height, width).num_slots(self.read_last_scale)
        return [self.boi_token_id] + [self.image_token_id] * slots + [self.eoi_token_id]

    def apply_image_prompt(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Sequence] | None = None,
        allow_empty: bool = False,
        answer: str | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prompts for drawing: a chat with one user turn each, and `<boi>` as the start of the answer.

        Special tokens that a prompt spells out are read as plain text.

        Args:
            prompts: one prompt or several.
            images: a list of images for each prompt; they stand before its text.
            allow_empty: allow empty prompts, such as the unconditional prompt of guidance.
            answer: a text with which the answer starts in place of `<boi>`.

        Returns:
            `input_ids` and `attention_mask` (num_prompts, length), padded on the left, `<boi>` last; with images
            `pixel_values` and `image_grids` too.

        Raises:
            ValueError: for no prompts, a prompt that is no string, an empty prompt (also one of only white space), and
                another number of lists of images than of prompts.
        """
        pixels: dict = {}
        grids = None
        if images is not None and any(images):
            pixels = dict(self.image_processor([image for row in images for image in row], return_tensors=None))
            remaining = iter(pixels["image_grids"])
            grids = [[next(remaining) for _ in row] for row in images]
        start = [self.boi_token_id] if answer is None else encode_text(self.tokenizer, answer)
        rows = [[*row, *start] for row in self.prompt_ids(prompts, grids, allow_empty)]
        padded = pad_left(rows, self.tokenizer.pad_token_id)
        return BatchFeature(padded | pixels, tensor_type=return_tensors)

    def prompt_ids(
        self,
        prompts: str | Sequence[str],
        image_grids: Sequence[Sequence] | None = None,
        allow_empty: bool = False,
    ) -> list[list[int]]:
        """Token ids of a chat with one user turn for each prompt, up to the start of the answer.

        `image_grids` are the final grids (height, width) of the images before each prompt's text; the other arguments
        are those of `apply_image_prompt`.
        """
        prompts = check_prompts(prompts, allow_empty)
        image_grids = [[]] * len(prompts) if image_grids is None else image_grids
        if len(image_grids) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(image_grids)} lists of images; give each its own.")
        chats = [
            [{"role": "user", "content": [{"type": "image"}] * len(grids) + [{"type": "text", "text": prompt}]}]
            for prompt, grids in zip(prompts, image_grids)
        ]
        encoded = encode_chats(
            self.tokenizer, chats, self.chat_template, image_token=self.image_token, add_generation_prompt=True
        )
        rows = [chat.ids for chat in encoded]
        expanded = []
        for row, grids in zip(rows, image_grids):
            images = iter(grids)
            parts = [self.image_placeholder_ids(*next(images)) if i == self.image_token_id else [i] for i in row]
            expanded.append([token for part in parts for token in part])
        return expanded

    def post_process_images(self, images, output_type: str = "pil") -> list:
        """Decoded images, (3, height, width) in [-1, 1] each, as "pil", "np" or "pt"; see the image processor."""
        return self.image_processor.postprocess(images, output_type=output_type)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list:
        """Texts from token ids, or with `generation_mode="image"` PIL images from the output of
        `decode_image_tokens`.
        """
        if generation_mode == "image":
            return self.post_process_images(generated_outputs)
        return super().post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]


def check_prompts(prompts: str | Sequence[str], allow_empty: bool = False) -> list[str]:
    """One prompt or several as a list. Raises `ValueError` for none, one that is no string, and an empty one."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompts must be a string or a list of strings, got {short_repr(prompts)}.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"Prompt {index} must be a string, got {short_repr(prompt)} of type {type(prompt).__name__}."
            )
        if not prompt.strip() and not allow_empty:
            raise ValueError(f"Prompt {index} is empty ({prompt!r}); say what is to be drawn.")
        check_text(prompt, f"Prompt {index}")
    return list(prompts)
