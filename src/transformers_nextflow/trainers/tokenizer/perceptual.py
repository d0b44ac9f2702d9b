"""LPIPS (Zhang et al., 2018, arXiv 1801.03924): how far images lie apart in the layers of a VGG16.

Nothing is fetched: the weights are those of a file or a folder at hand.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.checkpoint_checks import is_finite
from ...utils.short_repr import short_path
from ...utils.weight_files import State, read_state_dict


# Convolutions of VGG16 between two halvings; the last one of each block is looked at.
BLOCKS = (2, 2, 3, 3, 3)
# What images in [-1, 1] are brought to, as the VGG was trained on them: (image - SHIFT) / SCALE.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Names as in torchvision and timm, and as in the package lpips, each with anything before them.
CONVOLUTION = re.compile(r"(?:.*\.)?(?:features|slice\d)\.(\d+)\.(weight|bias)")
WEIGHING = re.compile(r"(?:.*\.)?lin(\d)\.model\.1\.weight")


def convolution_numbers() -> list[list[int]]:
    """For each block the numbers of its convolutions among VGG16's `features`, where ReLUs and poolings count too."""
    numbers, place = [], 0
    for count in BLOCKS:
        numbers.append([place + 2 * index for index in range(count)])
        place += 2 * count + 1
    return numbers


class PerceptualDistance(nn.Module):
    """LPIPS on a VGG16; images (B, 3, H, W) in [-1, 1] and others of their size → distances (B,). Nothing is trained.

    Args:
        state: `features.N.weight` and `.bias` of the convolutions, and `linK.model.1.weight`, how much the channels of
            block K count. Their shapes say how wide the network is.

    Raises:
        ValueError: for weights that lack, are not finite, or do not follow each other.
    """

    smallest_side = 2 ** (len(BLOCKS) - 1)

    def __init__(self, state: State):
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.blocks, self.weighings, width = nn.ModuleList(), nn.ParameterList(), 3
        for block, numbers in enumerate(convolution_numbers()):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if block else []
            for number in numbers:
                weight = _taken(state, f"features.{number}.weight", (None, width, 3, 3))
                layers += [_convolution(weight, _taken(state, f"features.{number}.bias", weight.shape[:1])), nn.ReLU()]
                width = len(weight)
            self.blocks.append(nn.Sequential(*layers))
            self.weighings.append(_taken(state, f"lin{block}.model.1.weight", (1, width, 1, 1)))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Raises `ValueError` for images with a side below `smallest_side`."""
        if min(images.shape[-2:]) < self.smallest_side:
            height, width = images.shape[-2:]
            raise ValueError(f"Images of {height}x{width} pixels are too small: sides start at {self.smallest_side}.")
        maps, distance = [(one - self.shift) / self.scale for one in (images, others)], 0
        for block, weighing in zip(self.blocks, self.weighings):
            maps = [block(one) for one in maps]
            some, other = (F.normalize(one, dim=1, eps=1e-10) for one in maps)
            distance = distance + (weighing * (some - other).square()).sum(1).mean((1, 2))
        return distance


def load_perceptual(path: str | os.PathLike) -> PerceptualDistance:
    """The distance whose weights a file holds, or the files of a folder together: safetensors, or pickles of tensors.

    The weights of the package lpips, or of a VGG16 of torchvision or timm with lpips' own `vgg.pth` beside it.

    Raises:
        ValueError: for what is not there, cannot be read, holds other objects than tensors, or lacks weights.
    """
    place = Path(path)
    files = sorted(file for file in place.glob("*") if file.suffix in SUFFIXES) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"{short_path(place)} holds no weights ({', '.join(SUFFIXES)}) of a perceptual distance.")
    state: State = {}
    for file in files:
        state |= _known(read_state_dict(file))
    try:
        return PerceptualDistance(state)
    except ValueError as error:
        raise ValueError(f"{short_path(place)} is not a perceptual distance of a VGG16: {error}") from error


def _known(found: State) -> State:
    """What a distance takes of a file, by its own names."""
    state: State = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        if match := CONVOLUTION.fullmatch(str(name)):
            state[f"features.{match[1]}.{match[2]}"] = value
        elif match := WEIGHING.fullmatch(str(name)):
            state[f"lin{match[1]}.model.1.weight"] = value
    return state


def _taken(state: State, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
    """A weight of a shape, `None` for any size, in float32."""
    tensor = state.get(name)
    if tensor is None:
        raise ValueError(f"{name} is missing; give VGG16's convolutions, and the weights of LPIPS on them.")
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not is_finite(tensor):
        raise ValueError(f"{name} is not a tensor of finite floats.")
    if len(tensor.shape) != len(shape) or any(b is not None and a != b for a, b in zip(tensor.shape, shape)):
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, and {wanted} is needed.")
    return tensor.float()


def _convolution(weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], len(weight), 3, padding=1)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer
