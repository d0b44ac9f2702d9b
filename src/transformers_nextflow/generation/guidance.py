"""Classifier-free guidance: its settings, the scales that are guided, the rows that this needs, and guided logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch

from ..utils.finite_numbers import is_finite_number
from ..utils.short_repr import short_repr
from ..utils.typed_values import is_of_type


PerScale = Real | Sequence[Real]
# With stronger guidance, differences of logits leave the range of half precision.
MAX_GUIDANCE = 1000
STRENGTH = "at least 0 (1 is no guidance), at most 1000"


@dataclass(frozen=True)
class Guidance:
    """How far logits are guided, and at which scales.

    Args:
        guidance_scale: logits are `unconditional + guidance_scale * (conditional - unconditional)`; 1 is no guidance.
        image_guidance_scale: guidance by the images in a prompt, separately from its text, as in InstructPix2Pix:
            logits are `neither + image_guidance_scale * (images - neither) + guidance_scale * (all - images)`; 1 is no
            guidance.
        guidance_ramp: let the guidance grow linearly from 1 at the first scale to `guidance_scale` at the last guided
            one, as in TokenFlow. Only if the guidance scales are numbers.
        num_unguided_scales: how many of the last scales run without any guidance, at half the cost.

    Raises:
        ValueError: for a value that is no number or out of range.
    """

    # The names of the strengths between each context that guidance compares and the next.
    guided_parts: ClassVar[tuple[str, str]] = ("guidance_scale", "image_guidance_scale")

    guidance_scale: PerScale = 1.0
    image_guidance_scale: PerScale = 1.0
    guidance_ramp: bool = False
    num_unguided_scales: int = 0

    def __post_init__(self):
        for part in ("guidance_scale", "image_guidance_scale"):
            self._check(part, lambda v: 0 <= v <= MAX_GUIDANCE, STRENGTH)
        unguided = self.num_unguided_scales
        if not is_of_type(unguided, float) or not is_finite_number(unguided) or unguided < 0 or unguided % 1:
            raise ValueError(f"num_unguided_scales must be a whole number from 0, got {short_repr(unguided)}.")
        if not isinstance(self.guidance_ramp, bool):
            raise ValueError(f"guidance_ramp must be True or False, got {short_repr(self.guidance_ramp)}.")
        if self.guidance_ramp and is_per_scale(self.guidance_scale):
            raise ValueError(
                "guidance_ramp goes with a single guidance_scale; a sequence already has a value for each scale."
            )

    def _check(self, name: str, is_valid: Callable[[Any], bool], remedy: str, or_none: bool = False):
        """Raises `ValueError` for a setting with values that are no valid numbers."""
        values = getattr(self, name)
        for value in values if is_per_scale(values) else [values]:
            if or_none and value is None:
                continue
            if not is_of_type(value, float) or not is_finite_number(value) or not is_valid(value):
                raise ValueError(f"{name} must be {remedy}, got {short_repr(value)}.")

    def value_at(self, name: str, scale: int, num_scales: int):
        """The value of a setting at a scale, counted from 0. Raises `ValueError` for a sequence of another length."""
        value = getattr(self, name)
        if not is_per_scale(value):
            return value
        if len(value) != num_scales:
            raise ValueError(f"{name} gives {len(value)} values, but the image is drawn in {num_scales} scales.")
        return value[scale]

    def guidance_at(self, scale: int, num_scales: int, part: str = "guidance_scale") -> float:
        """Guidance at a scale, counted from 0; `part` is "guidance_scale" or "image_guidance_scale"."""
        guided = num_scales - self.num_unguided_scales
        if scale >= guided:
            return 1.0
        guidance = float(self.value_at(part, scale, num_scales))
        if self.guidance_ramp and part == "guidance_scale":
            guidance = 1 + (guidance - 1) * scale / max(guided - 1, 1)
        return guidance

    def is_guided(self, num_scales: int, part: str = "guidance_scale") -> bool:
        """Whether any scale needs the part's unconditional rows in the batch."""
        return any(self.guidance_at(scale, num_scales, part) != 1 for scale in range(num_scales))

    def contexts(self, scale_counts: Iterable[int]) -> tuple[str, ...]:
        """The names of the contexts with which guidance compares prompts, for images with these numbers of scales; the
        most conditioned context comes first.

        "negative" is the negative prompt with the prompt's images, "unconditional" is the same without images.
        """
        counts = set(scale_counts)
        images_guided = any(self.is_guided(count, "image_guidance_scale") for count in counts)
        if images_guided:
            return "negative", "unconditional"
        return ("negative",) if any(self.is_guided(count) for count in counts) else ()


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance on logits of one shape, with a number or a tensor that broadcasts to them."""
    return torch.lerp(unconditional, conditional, guidance)


def guide_over_contexts(logits: torch.Tensor, guidance: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Guided logits (B, n, V) from logits (C, B, n, V) of the same images under C contexts, the most conditioned first.

    Each context is guided away from the next: `guidance[c]` is the strength between context c and c + 1.
    """
    guided = logits[0]
    if len(logits) > 1:
        guided = guide(logits[0], logits[1], guidance[0])
    for context in range(2, len(logits)):
        guided = guided + (guidance[context - 1] - 1) * (logits[context - 1] - logits[context])
    return guided


def is_per_scale(value: Any) -> bool:
    """Whether a setting has one value for each scale."""
    return isinstance(value, Sequence) and not isinstance(value, str)
