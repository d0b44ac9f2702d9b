"""Muon for the hidden matrices and AdamW for the rest, in one optimizer for `Trainer` and its schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.optim.adamw import adamw


# Quintic Newton-Schulz iteration of Jordan et al. (Muon, 2024): its coefficients, and how often it is applied.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Small matrices are orthogonalised many at a time, since launching a kernel takes longer than their products.
ELEMENTS_AT_ONCE = 2**24


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The nearest matrices (…, rows, columns) with singular values of about one; products are computed in `dtype`.

    `torch.optim.Muon` always uses bfloat16, which processors without bfloat16 units multiply ten times slower than
    float32, and processors with such units six times faster.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def of_one_kind(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Lists of parameters of one shape, dtype and device, with at most `ELEMENTS_AT_ONCE` elements or one parameter."""
    by_kind: dict[tuple, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for alike in by_kind.values():
        count = max(ELEMENTS_AT_ONCE // alike[0].numel(), 1)
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


class MuonWithAdamW(torch.optim.Optimizer):
    """Orthogonalised momentum (Muon) on the matrices inside of layers, AdamW on embeddings, heads and vectors.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.

    Args:
        model: the model, whose trainable parameters are optimised.
        lr: learning rate.
        weight_decay: of matrices and embeddings; vectors are never decayed.
        momentum: Muon's.
        betas: AdamW's.
        orthogonalize_dtype: precision of the products in Muon's iteration; bfloat16 suffices where it is fast.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        orthogonalize_dtype: torch.dtype = torch.float32,
    ):
        self.orthogonalize_dtype = orthogonalize_dtype
        groups: dict[str, list] = {"hidden": [], "embeddings": [], "vectors": []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kind = "vectors" if parameter.ndim < 2 else "hidden" if ".layers." in name else "embeddings"
                groups[kind].append(parameter)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "muon": False}
        super().__init__(
            [
                {"params": groups["hidden"], "muon": True},
                {"params": groups["embeddings"]},
                {"params": groups["vectors"], "weight_decay": 0.0},
            ],
            defaults,
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._muon if group["muon"] else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[nn.Parameter], group: dict):
        for alike in of_one_kind(parameters):
            # 0.2 · sqrt(longer side) is the root mean square of AdamW's updates (Moonlight, 2025).
            rate = group["lr"] * 0.2 * max(alike[0].shape) ** 0.5
            directions = orthogonalize(self._nesterov(alike, group["momentum"]), self.orthogonalize_dtype)
            torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(alike, list(directions.unbind()), alpha=rate)

    def _nesterov(self, alike: list[nn.Parameter], momentum: float) -> torch.Tensor:
        """Directions (n, rows, columns) of parameters of one kind."""
        for parameter in alike:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in alike]
        momenta = [self.state[parameter]["momentum"] for parameter in alike]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        return torch.stack(torch._foreach_lerp(gradients, momenta, momentum))

    def _adamw(self, parameters: list[nn.Parameter], group: dict):
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
