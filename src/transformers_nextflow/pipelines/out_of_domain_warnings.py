"""Warnings of prompts and images that are unlike what a checkpoint says that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..evaluation.image_metrics import psnr
from ..utils.saved_adapters import is_adapted, unwrap_peft
from ..utils.training_domain import TrainingDomain
from ..utils.typed_values import read_typed
from ..utils.user_warnings import warn_user
from .requests import ImageRequest


# The largest number of unknown words that a warning names.
MAX_NAMED = 5


class OutOfDomainWarningsMixin:
    """Gives the user of a [`NextFlowPipeline`] one warning of each kind. There are none for checkpoints without a
    statement, and for models with adapters, which were trained on more.
    """

    def _warn_of_request(self, request: ImageRequest):
        patch_size = self.processor.image_processor.patch_size
        texts = [*request.prompts, *request.negative_prompts]
        self._warn_of_texts(texts, [schedule.image_size(patch_size) for schedule in request.schedules])

    def _warn_of_texts(self, texts: Iterable[str], sizes: Iterable[tuple[int, int]] = ()):
        """Warn of texts, and of sizes (height, width) of the images to draw."""
        stated, texts = self._trained_on(), list(texts)
        if stated is None:
            return
        if words := stated.unknown_words(texts):
            named = ", ".join(map(repr, words[:MAX_NAMED])) + (" and more" if len(words) > MAX_NAMED else "")
            self._warn_once(
                "words", f"The prompt has words that this checkpoint has never seen: {named}. {_known_domain(stated)}, "
                "and draws something of it whatever else is asked for.",
            )  # fmt: skip
        if phrases := stated.unseen_counts(texts):
            self._warn_once(
                "count", f"The prompt asks for {phrases[0]!r}, and this checkpoint has only ever "
                f"seen from 1 to {stated.most} of one kind; it will draw another number.",
            )  # fmt: skip
        if others := stated.unseen_sizes(sizes):
            own = " and ".join("x".join(map(str, size)) for size in stated.sizes)
            self._warn_once(
                "size", f"The image has {others[0]} pixels (height x width), and all those of its training "
                f"had {own}; what this checkpoint draws in other sizes may be wrong.",
            )  # fmt: skip

    def _warn_of_images(self, images: Sequence[torch.Tensor]):
        """Warn of input images (3, H, W) in [-1, 1] that the tokenizer cannot reconstruct well."""
        stated, vq_model = self._trained_on(), unwrap_peft(self.model).vq_model
        if stated is None or stated.lowest_psnr is None or "image" in self._warned_kinds:
            return
        for number, image in enumerate(images):
            pixels = image[None].to(vq_model.device, torch.float32)
            reached = psnr(vq_model.reconstruct(pixels) / 2 + 0.5, pixels / 2 + 0.5).item()
            if stated.is_out_of_domain(reached):
                self._warn_once(
                    "image", f"Image {number} is of another kind than those that this checkpoint was trained on: its "
                    f"own tokenizer reproduces it at {reached:.0f} dB, and its own images at {stated.lowest_psnr:.0f} "
                    f"and more. {_known_domain(stated)}, and reads nothing else.",
                )  # fmt: skip
                return

    def _images_of(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> list[torch.Tensor]:
        """Images (3, H, W) from a batch (num_images, 3, height, width) in which they are padded."""
        patch_size = unwrap_peft(self.model).config.vq_config.patch_size
        sizes = (image_grids * patch_size).tolist()
        return [image[:, :height, :width] for image, (height, width) in zip(pixel_values, sizes)]

    def _trained_on(self) -> TrainingDomain | None:
        model = unwrap_peft(self.model)
        stated = getattr(model.config, "trained_on", None)
        return None if stated is None or is_adapted(model) else read_typed(TrainingDomain, stated, "trained_on")

    @property
    def _warned_kinds(self) -> set[str]:
        return self.__dict__.setdefault("_kinds_warned_of", set())

    def _warn_once(self, kind: str, message: str):
        if kind not in self._warned_kinds:
            self._warned_kinds.add(kind)
            warn_user(message)


def _known_domain(stated: TrainingDomain) -> str:
    return f"It knows only {stated.domain}"


def texts_of_messages(messages: Iterable[dict]) -> list[str]:
    """The texts of users in a conversation."""
    contents = [message["content"] for message in messages if message["role"] != "assistant"]
    parts = [[content] if isinstance(content, str) else content for content in contents]
    texts = [part if isinstance(part, str) else part.get("text") for row in parts for part in row]
    return [text for text in texts if isinstance(text, str)]
