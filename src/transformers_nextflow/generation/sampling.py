"""How the codes of a scale are sampled from logits: temperature, top-k, top-p, after guidance (`guidance.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from ..utils.known_names import check_names
from ..utils.short_repr import short_repr
from .guidance import Guidance, PerScale, is_per_scale


Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class ImageSampling(Guidance):
    """Settings of the scale loop. A number holds for all scales; a sequence has one value for each, coarse to fine.

    Args:
        guidance_scale, image_guidance_scale, guidance_ramp, num_unguided_scales: see [`Guidance`].
        temperature: 0 takes the likeliest code.
        top_k: sample only among this many of the likeliest codes; `None` for all.
        top_p: sample only among the likeliest codes whose probabilities sum up to this value.

    Raises:
        ValueError: for a value that is no number or out of range.
    """

    temperature: PerScale = 1.0
    top_k: PerScale | None = None
    top_p: PerScale = 1.0

    def __post_init__(self):
        super().__post_init__()
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
    """Raises `ValueError` unless `generator` is one generator, or a sequence with one for each of `count`."""
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


def _random_numbers(shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
    if isinstance(generator, Sequence):
        return torch.stack([_random_numbers(shape[1:], source, device) for source in generator])
    source_device = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source_device).to(device)
