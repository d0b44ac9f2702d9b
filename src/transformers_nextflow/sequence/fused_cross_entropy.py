"""Cross-entropy of a linear head without all logits in memory (the paper fuses head and loss too, section 3.3).

The logits are computed in blocks of classes, twice: first for the normaliser of the softmax, then for the gradient.
With blocks of classes, and not of tokens, each row of the head's gradient is written only once, in few large products;
the cost is that logits are computed twice. The gradient is computed in the forward pass, where all its inputs are
available, and scaled in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import maybe_autocast


# How many logits are in memory at once: 64 MiB in float32, and about three times as much for temporary tensors; on a
# GPU as many as fit into this share of its memory.
LOGITS_AT_ONCE = 2**24
SHARE_OF_MEMORY = 1 / 128
# Products in half precision on a GPU are fast if the rows of their results begin at multiples of this.
ALIGNMENT = 64
# A head that is called reads all its weights for each block of positions, so these are larger: 256 MiB.
CALLED_LOGITS_AT_ONCE = 2**26


def fused_cross_entropy(
    hidden_states: torch.Tensor,
    matrices: Sequence[torch.Tensor],
    classes: torch.Tensor,
    weights: torch.Tensor,
    z_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted sum () of the losses of n positions, their cross-entropies (n,), in float32, and whether (n,) their
    classes have the largest logits. A position's loss is its cross-entropy plus `z_weight` times its z-loss, the square
    of the logarithm of the softmax's normaliser.

    Only the sum has a gradient, of first order. Under autocast the products run in its dtype; with a trained head in
    float32 if that is float16: the gradient is formed before the sum is divided, and would overflow.

    Args:
        hidden_states: (n, D).
        matrices: (V_i, D) parts of one softmax over V_1 + V_2 + … classes, one after the other.
        classes: (n,) int64.
        weights: (n,) float32.
    """
    device = hidden_states.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else matrices[0].dtype
    if dtype == torch.float16 and any(matrix.requires_grad for matrix in matrices):
        dtype = torch.float32
    with maybe_autocast(device, enabled=False):
        return _FusedCrossEntropy.apply(hidden_states, classes, weights, z_weight, dtype, *matrices)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, classes, weights, z_weight, dtype, *matrices):
        hidden, heads = hidden_states.to(dtype), [matrix.to(dtype) for matrix in matrices]
        normaliser = torch.full(classes.shape, -torch.inf, device=classes.device)
        own, largest = torch.zeros_like(normaliser), normaliser
        for _, _, _, logits, index, inside in _blocks(hidden, heads, classes):
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1))
            largest = torch.maximum(largest, logits.amax(-1))
            own = torch.where(inside, logits.gather(1, index[:, None])[:, 0], own)
        losses, correct = normaliser - own, own >= largest

        needs_hidden, _, _, _, _, *needs_matrices = ctx.needs_input_grad
        to_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        to_heads = [torch.empty_like(head) if need else None for head, need in zip(heads, needs_matrices)]
        if needs_hidden or any(needs_matrices):
            for head, rows, matrix, logits, index, inside in _blocks(hidden, heads, classes):
                gradient = logits.sub_(normaliser[:, None]).exp_()
                if z_weight:
                    gradient.mul_(1 + 2 * z_weight * normaliser[:, None])
                gradient.scatter_add_(1, index[:, None], -inside[:, None].float())
                gradient = gradient.mul_(weights[:, None]).to(dtype)
                if needs_hidden:
                    to_hidden += gradient @ matrix
                if needs_matrices[head] and len(matrix) == rows.stop - rows.start:
                    torch.mm(gradient.T, hidden, out=to_heads[head][rows])
                elif needs_matrices[head]:
                    to_heads[head][rows] = (gradient.T @ hidden)[: rows.stop - rows.start]
        # The gradients are kept for the backward pass in the dtypes of their inputs.
        inputs, gradients = (hidden_states, *matrices), (to_hidden, *to_heads)
        ctx.save_for_backward(*(g if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs)))
        ctx.mark_non_differentiable(losses, correct)
        return ((losses + z_weight * normaliser.square()) * weights).sum(), losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        to_hidden, *to_matrices = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return to_hidden, None, None, None, None, *to_matrices


def _blocks(
    hidden: torch.Tensor, heads: Sequence[torch.Tensor], classes: torch.Tensor
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each block the number of the head, the slice of its rows, these rows (m, D), and their logits (n, m) in
    float32; and for each position the column (n,) of its class, and whether (n,) the class is in this block.

    On a GPU m is a multiple of `ALIGNMENT`: a head is padded with rows of zeros, whose logits do not count.
    """
    at_once, alignment = logits_at_once(hidden.device)
    size = max(1, at_once // max(1, len(hidden)))
    size += -size % alignment
    offset = 0
    for number, head in enumerate(heads):
        for start in range(0, len(head), size):
            rows = slice(start, min(start + size, len(head)))
            count = rows.stop - start
            matrix = nn.functional.pad(head[rows], (0, 0, 0, -count % alignment)) if count % alignment else head[rows]
            logits = (hidden @ matrix.T).float()
            logits[:, count:] = -torch.inf
            index = classes - offset - start
            inside = (index >= 0) & (index < count)
            yield number, rows, matrix, logits, index.clamp(0, count - 1), inside
        offset += len(head)


def logits_at_once(device: torch.device) -> tuple[int, int]:
    """How many logits are in memory at once on a device, and the multiple to which blocks of classes are padded."""
    if device.type != "cuda":
        return LOGITS_AT_ONCE, 1
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(LOGITS_AT_ONCE, int(memory * SHARE_OF_MEMORY) // 4), ALIGNMENT


def called_cross_entropy(
    head: Callable,
    hidden_states: torch.Tensor,
    classes: torch.Tensor,
    weights: torch.Tensor,
    num_classes: int,
    z_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `fused_cross_entropy`, for a head that is more than its matrix: an adapter, tensor parallelism, offloading.

    Here blocks are of positions: `head` (m, D) → (m, `num_classes`) is called on each block, and again in the backward
    pass.
    """

    def block(hidden_states, classes, weights):
        logits = head(hidden_states).float()
        losses = nn.functional.cross_entropy(logits, classes, reduction="none")
        z_losses = z_weight * logits.logsumexp(-1).square() if z_weight else 0.0
        return ((losses + z_losses) * weights).sum(), losses.detach(), logits.argmax(-1) == classes

    size = max(1, CALLED_LOGITS_AT_ONCE // num_classes)
    blocks = zip(*(values.split(size) for values in (hidden_states, classes, weights)))
    totals, losses, correct = zip(*(checkpoint(block, *values, use_reentrant=False) for values in blocks))
    return torch.stack(totals).sum(), torch.cat(losses), torch.cat(correct)
