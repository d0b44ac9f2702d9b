"""How the codes of a scale are sampled from logits: guidance, then temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import torch

from ..utils.known_names import check_names
from ..utils.short_repr import short_repr
from ..utils.typed_values import is_finite_number, is_of_type


Generators = torch.Generator | Sequence[torch.Generator] | None
PerScale = Real | Sequence[Real]
# With stronger guidance, differences of logits leave the range of half precision.
MAX_GUIDANCE = 1000
STRENGTH = "at least 0 (1 is no guidance), at most 1000"


@dataclass(frozen=True)
class ImageSampling:
    """Settings of the scale loop. A number holds for all scales; a sequence has one value for each, coarse to fine.

    Args:
        guidance_scale: logits are `unconditional + guidance_scale * (conditional - unconditional)`; 1 is no guidance.
        image_guidance_scale: guidance by the images in a prompt, separately from its text, as in InstructPix2Pix:
            logits are `neither + image_guidance_scale * (images - neither) + guidance_scale * (all - images)`; 1 is no
            guidance.
        guidance_ramp: let the guidance grow linearly from 1 at the first scale to `guidance_scale` at the last guided
            one, as in TokenFlow. Only if the guidance scales are numbers.
        num_unguided_scales: how many of the last scales run without any guidance, at half the cost.
        temperature: 0 takes the likeliest code.
        top_k: sample only among this many of the likeliest codes; `None` for all.
        top_p: sample only among the likeliest codes whose probabilities sum up to this value.

    Raises:
        ValueError: for a value that is no number or out of range.
    """

    # The names of the strengths between each context that guidance compares and the next.
    guided_parts: ClassVar[tuple[str, str]] = ("guidance_scale", "image_guidance_scale")

    guidance_scale: PerScale = 1.0
    image_guidance_scale: PerScale = 1.0
    guidance_ramp: bool = False
    num_unguided_scales: int = 0
    temperature: PerScale = 1.0
    top_k: PerScale | None = None
    top_p: PerScale = 1.0

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
        self._check("temperature", lambda v: v >= 0, "at least 0 (0 takes the likeliest code)")
        self._check(
            "top_k", lambda v: v >= 1 and v == int(v), "a whole number from 1, or None for all codes", or_none=True
        )
        self._check("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1")

    @classmethod
    def from_dict(cls, settings: Mapping) -> ImageSampling:
        """The inverse of `to_dict`; settings that are left out have their defaults. Raises `ValueError` for anything
        but a dict, and for unknown names.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"The settings of the scale loop are a dict, got {short_repr(settings)}.")
        names = [field.name for field in fields(cls)]
        check_names(settings, names, "The scale loop")
        return cls(**settings)

    def to_dict(self) -> dict:
        return asdict(self)

    def check_scales(self, counts: Sequence[int]):
        """Raises `ValueError` for a sequence whose length is none of the model's numbers of scales, `counts`."""
        for name in (field.name for field in fields(ImageSampling)):
            if is_per_scale(value := getattr(self, name)) and len(value) not in counts:
                raise ValueError(
                    f"{name} gives {len(value)} values, but images are drawn in {' or '.join(map(str, counts))} scales."
                )

    def drawing_at(self, scale: int, num_scales: int) -> dict:
        """Temperature, top-k and top-p at a scale, as arguments of `sample_codes`."""
        return {name: self.value_at(name, scale, num_scales) for name in ("temperature", "top_k", "top_p")}

    def is_sampled_at(self, scale: int, num_scales: int) -> bool:
        """Whether codes are sampled at a scale, counted from 0; else the likeliest codes are taken."""
        options = self.drawing_at(scale, num_scales)
        return options["temperature"] > 0 and options["top_k"] != 1

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

    def contexts(self, scale_counts: Sequence[int]) -> tuple[str, ...]:
        """The names of the contexts with which guidance compares prompts, for images with these numbers of scales; the
        most conditioned context comes first.

        "negative" is the negative prompt with the prompt's images, "unconditional" is the same without images.
        """
        counts = set(scale_counts)
        images_guided = any(self.is_guided(count, "image_guidance_scale") for count in counts)
        if images_guided:
            return "negative", "unconditional"
        return ("negative",) if any(self.is_guided(count) for count in counts) else ()

    def _check(self, name: str, is_valid: Callable[[Any], bool], remedy: str, or_none: bool = False):
        """Raises `ValueError` for a setting with values that are no valid numbers."""
        values = getattr(self, name)
        for value in values if is_per_scale(values) else [values]:
            if or_none and value is None:
                continue
            if not is_of_type(value, float) or not is_finite_number(value) or not is_valid(value):
                raise ValueError(f"{name} must be {remedy}, got {short_repr(value)}.")


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


def truncate_logits(logits: torch.Tensor, top_k: int | None = None, top_p: float = 1.0) -> torch.Tensor:
    """Logits (…, V) in which all codes that top-k, then top-p, do not allow are minus infinity."""
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(int(top_k), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # A code is allowed if the sum of those before it is below top_p, so the likeliest code always is.
        removed = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    return logits


def sampled_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> torch.Tensor:
    """Probabilities (…, V) in float32 with which classes are sampled; `temperature` must not be 0.

    Raises:
        ValueError: for logits that are not finite, only on a CPU; on a GPU the check would wait for the values.
    """
    logits = logits.float()
    if temperature != 1:
        # Relative to the largest logit, so that no quotient overflows.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities = truncate_logits(logits, top_k, top_p).softmax(-1)
    # One NaN or infinity turns its whole row into NaN.
    if probabilities.device.type == "cpu" and not bool(probabilities[..., 0].isfinite().all()):
        raise ValueError(
            "The model's logits hold NaN or infinity, so nothing can be sampled from them; use a smaller "
            "guidance_scale, dtype=float32, or another checkpoint."
        )
    return probabilities


def sample_codes(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: Generators = None,
) -> torch.Tensor:
    """Codes (…) sampled independently from logits (…, V), in float32.

    `generator` is one for all, or a sequence with one for each entry of the first dimension. A CPU generator gives the
    same random numbers on every device, as in diffusers.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # One random number for each code, by inverting the cumulated probabilities; `torch.multinomial` takes V of them.
    cumulated = sampled_probabilities(logits, temperature, top_k, top_p).cumsum_(-1)
    threshold = _random_numbers((*logits.shape[:-1], 1), generator, logits.device) * cumulated[..., -1:]
    # Random numbers are below one, so thresholds are below the sum, and a code above the threshold always exists.
    return torch.searchsorted(cumulated, threshold, right=True).squeeze(-1)


def check_generators(generator: Generators, count: int):
    """Raises `ValueError` unless `generator` is one generator, or a sequence with another one for each of `count`."""
    several = isinstance(generator, Sequence)
    for source in generator if several else [generator]:
        if not isinstance(source, torch.Generator) and (several or source is not None):
            raise ValueError(
                f"generator must hold torch.Generators, got {short_repr(source)}; see torch.Generator.manual_seed."
            )
    if several and len(generator) != count:
        raise ValueError(
            f"{len(generator)} generators came with a batch of {count}; give one for all, or one for each."
        )
    # The images would depend on each other, and none but the first on the seed that its file names.
    if several and len({id(source) for source in generator}) < count:
        raise ValueError(
            "generator holds the same torch.Generator more than once; give one for all, or create one for each: "
            "[torch.Generator().manual_seed(seed) for seed in seeds]."
        )


def _random_numbers(shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
    if isinstance(generator, Sequence):
        return torch.stack([_random_numbers(shape[1:], source, device) for source in generator])
    source_device = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source_device).to(device)
