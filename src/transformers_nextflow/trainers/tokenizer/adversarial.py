"""The adversarial loss of the tokenizer: a discriminator of patches and its own half of the training (VQGAN, 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """PatchGAN: scores how real every patch of an image looks.

    Args:
        channels: width of the first layer; it doubles with each further one, up to eight times.
        layers: how often an image is halved; with three a patch is 70 pixels wide.

    Raises:
        ValueError: if either is below 1.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        if channels < 1 or layers < 1:
            raise ValueError(f"channels and layers must be at least 1, got {channels} and {layers}.")
        self.smallest_side = 3 * 2**layers
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(zip(widths, widths[1:]), start=1):
            stride = 2 if i < layers else 1
            # Group norm in place of PatchGAN's batch norm: a score does not depend on other images or processes.
            norm = nn.GroupNorm(math.gcd(32, width), width)
            modules += [nn.Conv2d(before, width, 4, stride, padding=1, bias=False), norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] → scores (B, 1, h, w), higher for what looks real.

        Raises:
            ValueError: for images smaller than one patch.
        """
        if min(pixels.shape[-2:]) < self.smallest_side:
            height, width = pixels.shape[-2:]
            raise ValueError(
                f"Images of {height}x{width} pixels are too small, this discriminator needs sides of at least "
                f"{self.smallest_side}; give PatchDiscriminator fewer layers."
            )
        return self.layers(pixels)


class Adversary:
    """A discriminator that is trained together with the model that it judges, with the hinge loss.

    `loss` is the loss of the model, and `step` trains the discriminator on the same images. With several processes all
    start from the weights of the first one and use the mean of their gradients.
    """

    def __init__(self, discriminator: nn.Module, learning_rate: float):
        self.discriminator = discriminator.train()
        self._parameters = [p for p in discriminator.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self._parameters, lr=learning_rate, betas=(0.5, 0.9))
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None
        if torch.distributed.is_initialized():
            for tensor in discriminator.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def loss(self, reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The adversarial loss of a reconstruction (B, 3, H, W); keeps both images for `step`."""
        self._pair = reconstruction.detach(), pixels.detach()
        # The gradient goes through the discriminator, not into its weights.
        weights = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return -torch.func.functional_call(self.discriminator, weights, (reconstruction,)).mean()

    def step(self, num_batches: int = 1, is_last: bool = True) -> dict[str, torch.Tensor]:
        """Take one step of the discriminator on the images of the last `loss`, unless its gradient is not finite. If
        a step has `num_batches` batches, gradients are added up until the last one.

        Returns its loss and, with the last batch, the norm of its gradient, by their names.
        """
        assert self._pair is not None, "step comes after loss"
        fake, real = map(self.discriminator, self._pair)
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).div(2)
        loss.div(num_batches).backward()
        self._pair = None
        if not is_last:
            return {"discriminator_loss": loss.detach()}
        if torch.distributed.is_initialized():
            for parameter in self._parameters:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self._parameters])
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {"discriminator_loss": loss.detach(), "discriminator_gradient_norm": norm}

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict, learning_rate: float):
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
