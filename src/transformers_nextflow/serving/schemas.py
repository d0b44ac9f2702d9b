"""Bodies of requests: the supported fields of OpenAI's API, and the sampling settings of this model.

Unknown fields are refused, and so are values that the server would not follow; fields that do not affect the answer are
accepted and ignored.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ..sequence.chat_encoding import text_fault
from ..utils.image_files import read_image


MAX_SEEDS = 2**32
MAX_CHARACTERS = 32_000
# The largest number of characters of all texts of a conversation.
MAX_CHAT_CHARACTERS = 400_000
# The largest number of images that a request may hold.
MAX_DRAWN, MAX_IMAGES = 1024, 16
# The largest number of pixels of all images of a request, however small the files are; and the accepted formats, by
# PIL's names: some formats of PIL run other programs.
MAX_PIXELS = 2**26
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")

# Of texts at which an answer ends.
MAX_STOPS, LONGEST_STOP = 16, 100
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Body(BaseModel):
    """The base of all requests' bodies."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    seed: Annotated[int, Field(ge=0, lt=MAX_SEEDS)] = Field(default_factory=lambda: secrets.randbelow(MAX_SEEDS))
    stream: bool = False
    # For the client's own bookkeeping; ignored.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict | None = None

    @field_validator("partial_images", check_fields=False)
    @classmethod
    def _is_shown(cls, count: int, info: ValidationInfo) -> int:
        if count and not info.data.get("stream"):
            raise ValueError("only a streamed answer shows them; give stream: true")
        return count


class StreamOptions(BaseModel):
    """What a streamed chat has beside its text and images."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    # Random padding of the chunks.
    include_obfuscation: Literal[False] = False


class ImageBody(Body):
    """Body of `/v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    negative_prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] = ""
    n: Annotated[int, Field(ge=1, le=MAX_DRAWN)] = 1
    size: str = "auto"
    partial_images: Annotated[int, Field(ge=0, le=16)] = 0
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    guidance_scale: Guidance | None = None
    guidance_ramp: bool | None = None
    num_unguided_scales: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # For other models; these values mean nothing here.
    response_format: Literal["b64_json"] | None = None
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"

    @field_validator("output_compression")
    @classmethod
    def _is_followed(cls, compression: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("output_format") == "png" and compression not in (None, 100):
            raise ValueError("PNG is lossless; use output_format webp or jpeg")
        return compression

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _is_text(cls, text: str) -> str:
        if fault := text_fault(text):
            raise ValueError(fault)
        return text

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        names = ("guidance_scale", "guidance_ramp", "num_unguided_scales", "temperature", "top_k", "top_p")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | size_of(self.size)

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + number) % MAX_SEEDS for number in range(self.n)]


class EditBody(ImageBody):
    """Fields of the form of `/v1/images/edits`, beside its files."""

    image_guidance_scale: Guidance | None = None
    paste_back: bool = False
    input_fidelity: Literal["low"] | None = None

    @property
    def options(self) -> dict[str, Any]:
        given = {} if self.image_guidance_scale is None else {"image_guidance_scale": self.image_guidance_scale}
        return super().options | given | ({"paste_back": True} if self.paste_back else {})


class ChatBody(Body):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[dict], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] = ["text", "image"]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_images: Annotated[int, Field(ge=0, le=MAX_IMAGES)] = 1
    size: str = "auto"
    partial_images: Annotated[int, Field(ge=0, le=16)] = 0
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    stream_options: StreamOptions | None = None

    @field_validator("modalities")
    @classmethod
    def _has_text(cls, modalities: list[str]) -> list[str]:
        if "text" not in modalities:
            raise ValueError("an answer has text; give text, or text and image")
        return modalities

    @field_validator("max_completion_tokens")
    @classmethod
    def _is_only_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("max_tokens") not in (None, limit):
            raise ValueError("max_tokens, its older name, has another value; give one of them")
        return limit

    @field_validator("stream_options")
    @classmethod
    def _is_streamed(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("only a streamed answer has them; give stream: true")
        return options

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("stop", mode="before")
    @classmethod
    def _are_stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if stop is not None and not (
            isinstance(stops, list)
            and 1 <= len(stops) <= MAX_STOPS
            and all(isinstance(one, str) and 1 <= len(one) <= LONGEST_STOP and not text_fault(one) for one in stops)
        ):
            raise ValueError(f"a text, or 1 to {MAX_STOPS} texts, of 1 to {LONGEST_STOP} characters each")
        return stop

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's `chat`."""
        limit = self.max_completion_tokens or self.max_tokens
        options: dict[str, Any] = {"max_images": self.max_images if "image" in self.modalities else 0}
        options |= {} if limit is None else {"max_new_tokens": limit}
        options |= {} if self.stop is None else {"stop_strings": self.stop}
        sampling = {"temperature": self.temperature or None, "top_p": self.top_p}
        sampling = {name: value for name, value in sampling.items() if value is not None}
        if sampling or self.temperature == 0:
            options |= sampling | {"do_sample": self.temperature != 0}
        return options | size_of(self.size)

    @property
    def conversation(self) -> list[dict]:
        """The messages as `NextFlowPipeline.chat` takes them, with images decoded.

        Raises:
            ValueError: naming the part, for messages that are not of text and images, and for images that are not sent
                with the request.
        """
        uploads = UploadedImages()
        return [_message(message, f"messages[{number}]", uploads) for number, message in enumerate(self.messages)]


def size_of(size: str) -> dict[str, int]:
    """`height` and `width` from "WIDTHxHEIGHT"; empty for "auto"."""
    if size == "auto":
        return {}
    width, x, height = size.partition("x")
    if not (x and all(side.isascii() and side.isdigit() and len(side) < 6 for side in (width, height))):
        raise ValueError(f"size must be auto, or WIDTHxHEIGHT as in 256x256, got {size[:40]!r}.")
    return {"height": int(height), "width": int(width)}


class UploadedImages:
    """Reads the images and counts the texts of one request, within the limits of a request.

    Args:
        max_images: the largest number of images.
    """

    def __init__(self, max_images: int = MAX_IMAGES):
        self.images_left, self.pixels_left, self.characters_left = max_images, MAX_PIXELS, MAX_CHAT_CHARACTERS

    def read(self, content: bytes | str, place: str) -> Image.Image:
        """The image in bytes or a `data:` URL. Raises `ValueError` naming `place`."""
        self.images_left -= 1
        if self.images_left < 0:
            raise ValueError(f"{place}: at most {MAX_IMAGES} images are read of a request.")
        try:
            image = read_image(content, self.pixels_left, FORMATS)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        self.pixels_left -= image.width * image.height
        return image

    def count(self, text: Any) -> Any:
        """Returns the text. Raises `ValueError` if all texts together are too long."""
        self.characters_left -= len(text) if isinstance(text, str) else 0
        if self.characters_left < 0:
            raise ValueError(f"messages have more than the {MAX_CHAT_CHARACTERS} characters that are read.")
        return text


def region_of(mask: Image.Image) -> Image.Image:
    """The pipeline's mask, light where the image is drawn anew, from OpenAI's, which is transparent there.

    A mask without an alpha channel is returned unchanged.
    """
    if mask.mode in ("RGBA", "LA", "PA") or "transparency" in mask.info:
        return mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha)
    return mask


def _message(message: dict, place: str, uploads: UploadedImages) -> dict:
    role = "system" if message.get("role") == "developer" else message.get("role")
    content = message.get("content")
    parts = [] if content is None else content
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list):
        raise ValueError(f"{place}.content must be a text or a list of parts.")
    shown = message.get("images") or []  # the form of this server's answers
    if not isinstance(shown, list):
        raise ValueError(f"{place}.images must be a list.")
    # Clients write empty fields of other models into answers that they send back.
    given = {name for name, value in message.items() if value is not None}
    unknown = sorted(given - {"role", "content", "images", "name", "refusal"})
    if unknown:
        raise ValueError(f"{place}.{unknown[0]} is not known; a message has role, content and images.")
    read = [_part(part, f"{place}.content[{number}]", uploads) for number, part in enumerate(parts)]
    read += [_part(part, f"{place}.images[{number}]", uploads) for number, part in enumerate(shown)]
    # The pipeline checks roles and texts, and its errors name their place.
    return {"role": role, "content": read}


def _check_keys(part: dict, known: tuple[str, ...], place: str):
    """Raises `ValueError` for what would be passed over."""
    if unknown := sorted(part.keys() - set(known)):
        raise ValueError(f"{place}.{unknown[0][:40]} is not known; there are {', '.join(known)}.")


def _part(part: Any, place: str, uploads: UploadedImages) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        _check_keys(part, ("type", "text"), place)
        return {"type": "text", "text": uploads.count(part.get("text"))}
    if kind != "image_url":
        raise ValueError(f"{place}.type must be text or image_url, got {str(kind)[:40]!r}.")
    # The answers of this server say of their previews which they are.
    _check_keys(part, ("type", "image_url", "partial_image_index"), place)
    holder = part.get("image_url")
    if isinstance(holder, dict):
        _check_keys(holder, ("url", "detail"), f"{place}.image_url")  # there is one level of detail
    url = holder.get("url") if isinstance(holder, dict) else None
    # The server opens neither files nor addresses for a client.
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"{place}.image_url.url must hold the image itself, data:image/png;base64,….")
    return {"type": "image", "image": uploads.read(url, f"{place}.image_url.url")}
