"""Means of losses and accuracies over the trained positions of many batches, however positions are divided."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..modeling_nextflow import NextFlowCausalLMOutputWithPast


class MetricMeans:
    """Means of the losses and accuracies of batches over all their trained positions."""

    def __init__(self):
        self.names: list[str] = []
        # (2, n): of each metric the sum over positions, and their number.
        self.sums: torch.Tensor | None = None

    def add(self, outputs: NextFlowCausalLMOutputWithPast):
        """Adds a batch, without copying from its device."""
        parts = batch_metrics(outputs)
        self.names = list(parts)
        means, counts = (torch.stack([part[index].float() for part in parts.values()]) for index in (0, 1))
        # The mean of nothing is NaN.
        batch = torch.stack([torch.where(counts > 0, means * counts, 0), counts])
        # Apple's GPUs have no float64.
        batch = batch if batch.device.type == "mps" else batch.double()
        self.sums = batch if self.sums is None else self.sums + batch

    def pop(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means so far, by their names in the log, NaN for means over no positions; then counting begins anew.

        Args:
            gather: joins the tensors (1, …) of all processes; all of them must have added batches, or none.
        """
        if self.sums is None:
            return {}
        sums, counts = gather(self.sums[None]).cpu().double().sum(0)
        self.sums = None
        return dict(zip(self.names, (sums / counts).tolist()))


def batch_metrics(outputs: NextFlowCausalLMOutputWithPast) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The metrics of a batch by their names in the log: a mean () and the number () of its positions."""
    text, scales = outputs.num_trained[0], outputs.num_trained[1:]
    parts = {
        "loss": (outputs.mean_loss, outputs.num_trained.sum()),
        "text_loss": (outputs.text_loss, text),
        "image_loss": (outputs.image_loss, scales.sum()),
        "text_accuracy": (outputs.text_accuracy, text),
    }
    for kind, values in (("loss", outputs.scale_losses), ("accuracy", outputs.scale_accuracies)):
        parts |= {f"scale_{scale}_{kind}": pair for scale, pair in enumerate(zip(values, scales), start=1)}
    return parts
