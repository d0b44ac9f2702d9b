"""Muon for the hidden matrices, AdamW for the rest, as one optimizer that `Trainer` and its schedulers can hold."""

from __future__ import annotations

import torch
from torch import nn


# Quintic Newton-Schulz iteration of Jordan et al. (Muon, 2024): its coefficients, and how often it is applied.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The nearest matrix with singular values of about one; its products are computed in `dtype`.

    `torch.optim.Muon` always takes bfloat16, which processors without bfloat16 units multiply ten times slower than
    float32, and those with them six times faster.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Orthogonalised momentum (Muon) on the matrices inside of layers, AdamW on embeddings, heads and vectors.

    Muon's updates are brought to the size of AdamW's, so that one learning rate serves both.

    Args:
        model: its trainable parameters are taken.
        lr: learning rate.
        weight_decay: of matrices and embeddings; vectors are never decayed.
        momentum: Muon's.
        betas: AdamW's.
        orthogonalize_dtype: precision of the products in Muon's iteration; bfloat16 serves where it is fast.
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = self._muon(parameter, group) if group["muon"] else self._adamw(parameter, group)
                    parameter.add_(update, alpha=-group["lr"])
        return loss

    def _muon(self, parameter: nn.Parameter, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])
        # 0.2 · sqrt(longer side) is the root mean square of AdamW's updates (Moonlight, 2025).
        return orthogonalize(nesterov, self.orthogonalize_dtype) * (0.2 * max(parameter.shape) ** 0.5)

    def _adamw(self, parameter: nn.Parameter, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        mean, square = state["mean"] / (1 - beta1**step), state["square"] / (1 - beta2**step)
        return mean / (square.sqrt() + 1e-8)
