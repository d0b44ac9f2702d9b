"""Convolutions over large images stripe by stripe, without gradients: temporary tensors are never as large as the
image.

Norms have their statistics over the whole image, and stripes overlap as far as a kernel reaches, so the result is that
of the layers themselves, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


# Bytes of a stripe of one tensor.
STRIPE_BYTES = 2**24


def convolve(x: torch.Tensor, convolution: nn.Conv2d, norm: nn.GroupNorm | None = None) -> torch.Tensor:
    """3x3 convolution of (B, C, H, W) with padding 1; with a norm that of SiLU(norm(x))."""
    prepared = _normed(x, norm) if norm is not None else lambda part: part
    return _by_stripes(x.shape[2], x, lambda low, high: prepared(x[:, :, low:high]), convolution)


def convolve_enlarged(x: torch.Tensor, convolution: nn.Conv2d) -> torch.Tensor:
    """3x3 convolution with padding 1 of (B, C, H, W) enlarged to (2H, 2W), each pixel copied."""

    def enlarged(low: int, high: int) -> torch.Tensor:
        first = low // 2
        part = x[:, :, first : (high + 1) // 2].repeat_interleave(2, 2).repeat_interleave(2, 3)
        return part[:, :, low - 2 * first : high - 2 * first]

    return _by_stripes(2 * x.shape[2], x.new_empty(0, 0, 0, 2 * x.shape[3]), enlarged, convolution, len(x))


def add_convolved(x: torch.Tensor, hidden: torch.Tensor, convolution: nn.Conv2d, norm: nn.GroupNorm):
    """Adds to x the 3x3 convolution of SiLU(norm(hidden)), in place."""
    prepared = _normed(hidden, norm)
    for low, high, part in _stripes(hidden.shape[2], hidden, lambda a, b: prepared(hidden[:, :, a:b]), convolution):
        x[:, :, low:high] += part


def _by_stripes(height: int, like: torch.Tensor, source: Callable, convolution: nn.Conv2d, count: int | None = None):
    shape = (len(like) if count is None else count, convolution.out_channels, height, like.shape[3])
    result = like.new_empty(shape)
    for low, high, part in _stripes(height, result, source, convolution):
        result[:, :, low:high] = part
    return result


def _stripes(
    height: int, like: torch.Tensor, source: Callable, convolution: nn.Conv2d
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """For each stripe its first row, the row after its last one, and the convolved stripe; `source(low, high)` gives
    rows of the input.
    """
    channels = max(convolution.in_channels, convolution.out_channels)
    rows = max(1, STRIPE_BYTES // (len(like) * channels * like.shape[3] * like.element_size()))
    for low in range(0, height, rows):
        high = min(low + rows, height)
        part = source(max(low - 1, 0), min(high + 1, height))
        part = F.pad(part, (1, 1, int(low == 0), int(high == height)))
        yield low, high, F.conv2d(part, convolution.weight, convolution.bias)


def _normed(x: torch.Tensor, norm: nn.GroupNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """SiLU(norm(…)) of rows of x, with the statistics of the whole x."""
    grouped = x.unflatten(1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0, keepdim=True)
    scale = (variance.float() + norm.eps).rsqrt() * norm.weight.float().view(1, norm.num_groups, -1, 1, 1)
    shift = norm.bias.float().view(1, norm.num_groups, -1, 1, 1) - mean.float() * scale
    scale, shift = (value.flatten(1, 2).to(x.dtype) for value in (scale, shift))
    return lambda part: F.silu(torch.addcmul(shift, part, scale), inplace=True)
