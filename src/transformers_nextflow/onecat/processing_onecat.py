"""Prompts and conversations to OneCAT's inputs, and its images back to pixels."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from ..image_processing_nextflow import flatten_images
from ..processing_nextflow import DrawingInputsMixin, check_prompts
from ..sequence.chat_encoding import check_text, check_texts, encode_chats, template_errors
from ..sequence.messages import IMAGE_NAMES, check_conversation
from ..sequence.padding import pad_left
from ..utils.atomic_files import atomic_save
from ..utils.short_repr import short_repr
from .configuration_onecat import OneCatConfig
from .image_processing_onecat import THUMBNAIL, num_tokens, size_of_chat, size_of_reference


# The system prompt of the training; it says that the model reads, draws and edits images.
SYSTEM = "<|im_start|>system\\n你是一个同时能够支持图像理解、图像生成、图像编辑的多模态大语言模型。<|im_end|>"
IMAGE, REFERENCE = "<IMG_CONTEXT>", "<REEF_GEN_CONTEXT>"  # with the spelling of the release
# Texts that must each be a single token.
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<img>", "</img>", IMAGE, "<img_gen>", "<ref_gen>", "</ref_gen>", REFERENCE,
)  # fmt: skip
# Tokens around a drawn image, if the tokenizer has them; no prompt may hold them.
DRAWN_MARKERS = ("</img_gen>", "<IMG_GEN_CONTEXT>")
PARTS = """
{%- macro render(content, image) -%}
    {%- for part in ([{"type": "text", "text": content}] if content is string else content) -%}
        {%- if part.type == "image" -%}{{- image -}}
        {%- elif part.type == "text" -%}{{- part.text -}}
        {%- else -%}{{- raise_exception("A content part is of type text or image, got " ~ part.type) -}}{%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
"""
# There is no line break after <|im_end|> in prompts for images, and one in chats.
DRAWING_TEMPLATE = (
    (
        PARTS
        + """
{{- "SYSTEM<|im_start|>user\\n" -}}
{{- render(messages[0].content, "<ref_gen>REFERENCE</ref_gen>") -}}
{{- "<|im_end|><|im_start|>assistant\\n<img_gen>" -}}
"""
    )
    .replace("SYSTEM", SYSTEM)
    .replace("REFERENCE", REFERENCE)
)
# The unconditional prompt of edits; only here there is no line break after the role.
EMPTY_TEMPLATE = '{{- "SYSTEM<|im_start|>user<|im_end|><|im_start|>assistant\\n<img_gen>" -}}'.replace("SYSTEM", SYSTEM)
CHAT_TEMPLATE = (
    (
        PARTS
        + """
{%- if messages[0].role != "system" -%}{{- "SYSTEM\\n" -}}{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {{- render(message.content, "<img>IMAGE</img>\\n") ~ "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""
    )
    .replace("SYSTEM", SYSTEM)
    .replace("IMAGE", IMAGE)
)


class OneCatProcessor(DrawingInputsMixin, ProcessorMixin):
    r"""Tokenizer, image processor and the model's formats of prompts.

    Args:
        image_processor ([`OneCatImageProcessor`]): turns images into pixel values, and pixel values into images.
        tokenizer: the released one, which has the tokens of `MARKERS`.
        chat_template: Jinja; default: the released format.

    Raises:
        ValueError: for a tokenizer that lacks one of them.
    """

    save_pretrained = atomic_save(ProcessorMixin.save_pretrained)
    # `None`, since the model was not trained to reason before it draws.
    think_prefix = None
    caption_request = "Describe the image."

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None):
        known = tokenizer.get_vocab()
        if missing := [token for token in MARKERS if token not in known]:
            raise ValueError(f"The tokenizer lacks {', '.join(missing)}; use the one that was released with OneCAT.")
        # Made special tokens if the released file does not, so that no prompt can spell them out.
        own = [AddedToken(t, special=True, normalized=False) for t in (*MARKERS, *DRAWN_MARKERS) if t in known]
        tokenizer.add_tokens(own, special_tokens=True)
        self.image_token_id, self.reference_token_id = known[IMAGE], known[REFERENCE]
        self.end_token_id = known["<|im_end|>"]
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def check_fits(self, config: OneCatConfig):
        """Raises `ValueError` naming the settings in which the processor differs from a model of this config."""
        images, vq_config = self.image_processor, config.vq_config
        pairs = {
            "patch_size": (images.patch_size, vq_config.patch_size),
            "levels": (images.scale_schedules.levels, vq_config.scale_schedules.levels),
            "image_token_id": (self.image_token_id, config.image_token_id),
            "reference_token_id": (self.reference_token_id, config.reference_token_id),
        }
        differing = [f"{name} {own} and {models}" for name, (own, models) in pairs.items() if own != models]
        if len(self.tokenizer) > config.text_config.vocab_size:
            differing.append(f"{len(self.tokenizer)} tokens and a vocabulary of {config.text_config.vocab_size}")
        if differing:
            raise ValueError(
                f"Processor and model do not fit together: {', '.join(differing)}. Load both from one checkpoint."
            )

    def __call__(self, text=None, images=None, *, return_tensors: str | None = None, padding: bool = True, **other):
        """Encode texts from `apply_chat_template` with `tokenize=False`; all special tokens in them are read as such.

        Args:
            text: one text or a list. Each `<IMG_CONTEXT>` in it stands for one image.
            images: the images in order of appearance, flat or as one list per text.

        Returns:
            As `apply_chat_template` with `return_dict`.

        Raises:
            ValueError: if placeholders and images differ in number, for an image that cannot be read, and for videos,
                audio and settings of tokenizers, which are not supported.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts) or not texts:
            raise ValueError(f"text must be a string or a list of strings, got {short_repr(text)}.")
        for number, one in enumerate(texts):
            check_text(one, f"Text {number}")
        _check_settings(other | {"padding": padding})
        rows = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        rows, read = self._with_images(rows, [] if images is None else flatten_images(images))
        return self._features(rows, read, return_tensors)

    def apply_image_prompt(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Sequence] | None = None,
        allow_empty: bool = False,
        levels: Sequence[int] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prompts for drawing, or with images for edits.

        Special tokens that a prompt spells out are read as plain text.

        Args:
            prompts: one prompt or several.
            images: for each prompt a list of one image, which it edits.
            allow_empty: allow empty prompts, such as the unconditional prompt of guidance.
            levels: the resolution at which each image is drawn; default: the largest.

        Returns:
            `input_ids` and `attention_mask` (num_prompts, length), padded on the left; with images `pixel_values` and
            `pixel_sizes` too.

        Raises:
            ValueError: for no prompts, one that is no string, an empty one, more images than one for a prompt, and
                images that cannot be read or are more elongated than 1:200.
        """
        prompts = check_prompts(prompts, allow_empty)
        images = [[]] * len(prompts) if images is None else images
        if len(images) != len(prompts) or any(len(row) > 1 for row in images):
            raise ValueError("OneCAT edits one image for each prompt; give a list with one, or several prompts.")
        rgb = iter(self.image_processor.to_rgb([image for row in images for image in row]))
        images = [[next(rgb) for _ in row] for row in images]
        levels = [max(self.image_processor.scale_schedules.resolutions)] * len(prompts) if levels is None else levels
        chats = [_user_turn(prompt, len(row)) for prompt, row in zip(prompts, images)]
        rows = [chat.ids for chat in encode_chats(self.tokenizer, chats, DRAWING_TEMPLATE)]
        read = [
            (image, size_of_reference(image.height, image.width, level))
            for row, level in zip(images, levels, strict=True)
            for image in row
        ]
        counts = iter([num_tokens(size) for _, size in read])
        rows = [self._expanded(row, self.reference_token_id, counts) for row in rows]
        return self._features(rows, read, return_tensors)

    def drawing_inputs(self, prompts, negative_prompts, images, contexts, schedules, **options) -> dict:
        """As in [`DrawingInputsMixin`]: edits compare with the instruction without its image, then with an empty
        prompt.
        """
        levels = [self.image_processor.scale_schedules.level_of(schedule) for schedule in schedules]
        inputs = dict(self.apply_image_prompt(prompts, images, levels=levels, **options))
        if images is None:
            parts = {name: self.apply_image_prompt(negative_prompts, allow_empty=True) for name in contexts}
        else:
            parts = {"negative": self.apply_image_prompt(prompts), "unconditional": self._nothing(negative_prompts)}
        return inputs | {
            f"{name}_{part}": parts[name][part] for name in contexts for part in ("input_ids", "attention_mask")
        }

    def _nothing(self, negative_prompts: Sequence[str]) -> BatchFeature:
        """The unconditional prompts of edits: negative prompts, or an empty turn in the format of the training."""
        empty, *_ = encode_chats(self.tokenizer, [_user_turn("", 0)], EMPTY_TEMPLATE)
        said = [prompt for prompt in negative_prompts if prompt.strip()]
        encoded = iter(encode_chats(self.tokenizer, [_user_turn(p, 0) for p in said], DRAWING_TEMPLATE) if said else [])
        rows = [next(encoded).ids if prompt.strip() else empty.ids for prompt in negative_prompts]
        return self._features(rows, [], "pt")

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict | None = None,
    ):
        """Turn one conversation or several into `input_ids`, `attention_mask`, `pixel_values` and `pixel_sizes`, padded
        on the left (with `tokenize` and `return_dict`), into ids, or into text.

        The model reads each image at about its own size, and then a view of it of 448 x 448 pixels. Special tokens that
        messages spell out are read as plain text; in the text that `tokenize=False` gives they are not marked.

        Raises:
            ValueError: for an invalid conversation, one that the template refuses, images that cannot be read or are
                more elongated than 1:200, and settings of tokenizers.
        """
        if not isinstance(conversation, list | tuple) or not conversation:
            raise ValueError(
                f"A conversation is a list of messages with role and content, got {short_repr(conversation)}."
            )
        is_one = not isinstance(conversation[0], list | tuple)
        chats = [conversation] if is_one else list(conversation)
        _check_settings(processor_kwargs or {})
        options = {
            "chat_template": chat_template or self.chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if not tokenize:
            check_texts(chats)
            with template_errors():
                texts, _ = render_jinja_template(conversations=chats, **options)
            return texts[0] if is_one else texts
        for number, chat in enumerate(chats):
            check_conversation(chat, "messages" if is_one else f"messages[{number}]")
        encoded = [chat.ids for chat in encode_chats(self.tokenizer, chats, **options)]
        rows, read = self._with_images(encoded, [image for chat in chats for image in _images_of(chat)])
        if not return_dict:
            return rows[0] if is_one else rows
        return self._features(rows, read, return_tensors)

    def _with_images(self, rows: list[list[int]], images: list) -> tuple[list[list[int]], list]:
        """Rows with as many placeholders as each image has tokens, and the views of images with their sizes."""
        if (count := sum(row.count(self.image_token_id) for row in rows)) != len(images):
            raise ValueError(f"The texts hold {count} {IMAGE}, but were given {len(images)} images; give each its own.")
        images = self.image_processor.to_rgb(images)
        sizes = [size_of_chat(image.height, image.width) for image in images]
        counts = iter([num_tokens(size) + num_tokens(THUMBNAIL) for size in sizes])
        rows = [self._expanded(row, self.image_token_id, counts) for row in rows]
        return rows, [view for image, size in zip(images, sizes) for view in ((image, size), (image, THUMBNAIL))]

    def _expanded(self, row: list[int], placeholder: int, counts) -> list[int]:
        return [token for i in row for token in ([i] * next(counts) if i == placeholder else [i])]

    def _features(self, rows: list[list[int]], read: list, return_tensors: str | None) -> BatchFeature:
        pad = self.end_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        data = pad_left(rows, pad)
        if read:
            data |= self.image_processor.read(*zip(*read))
        return BatchFeature(data, tensor_type=return_tensors)

    def post_process_images(self, images, output_type: str = "pil") -> list:
        """Decoded images, (3, height, width) in [-1, 1] each, as "pil", "np" or "pt"; see the image processor."""
        return self.image_processor.postprocess(images, output_type=output_type)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_sizes"]


def _user_turn(prompt: str, num_images: int) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]}]


def _images_of(chat: list[dict]) -> list:
    parts = [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]
    return [next(p[n] for n in IMAGE_NAMES if p.get(n) is not None) for p in parts if p["type"] == "image"]


def _check_settings(settings: dict):
    """Raises `ValueError` for a setting that would be ignored: rows are always padded on the left."""
    for name, value in settings.items():
        if value is not None and not (name == "padding" and value in (True, "longest")):
            raise ValueError(f"OneCAT's processor does not take {name}={short_repr(value)}; leave it out.")
