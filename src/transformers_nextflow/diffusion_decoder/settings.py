"""How a diffusion decoder works: the steps and the guidance of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..generation.sampling import MAX_GUIDANCE
from ..utils.short_repr import short_repr
from ..utils.typed_values import is_of_type
from .bases import TIMESTEPS


if TYPE_CHECKING:
    from .modeling_diffusion_decoder import NextFlowDiffusionDecoder


@dataclass(frozen=True)
class DiffusionSettings:
    """How images are decoded.

    Args:
        num_inference_steps: from 1 to the 1000 times that noise has.
        guidance_scale: from 0 (1 is no guidance) to 1000.

    Raises:
        ValueError: for anything else.
    """

    num_inference_steps: int
    guidance_scale: float

    def __post_init__(self):
        steps, scale = self.num_inference_steps, self.guidance_scale
        if not is_of_type(steps, int) or not 1 <= steps <= TIMESTEPS:
            raise ValueError(f"decoder_steps must be a whole number from 1 to {TIMESTEPS}, got {short_repr(steps)}.")
        if not is_of_type(scale, float) or not 0 <= scale <= MAX_GUIDANCE:
            raise ValueError(
                f"decoder_guidance_scale must be a number from 0 (1 is no guidance) to {MAX_GUIDANCE}, got "
                f"{short_repr(scale)}."
            )
        # Frozen, and numpy's numbers are none of JSON, which tells what drew an image.
        object.__setattr__(self, "num_inference_steps", int(steps))
        object.__setattr__(self, "guidance_scale", float(scale))

    @classmethod
    def of(cls, decoder: NextFlowDiffusionDecoder, steps: int | None, guidance_scale: float | None):
        """What is asked for, and the decoder's own where nothing is."""
        config = decoder.config
        return cls(
            config.num_inference_steps if steps is None else steps,
            config.guidance_scale if guidance_scale is None else guidance_scale,
        )
