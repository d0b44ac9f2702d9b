"""Handling of what `callback_on_step_end` of a [`NextFlowPipeline`] returns."""

from __future__ import annotations

import torch

from ..generation.image_codes import ScaleState
from ..sequence.padding import pad_codes
from ..utils.short_repr import short_repr


CALLBACK_KWARGS = ("image_tokens", "preview")
WHOLE_NUMBERS = (torch.int16, torch.int32, torch.int64)


def apply_callback_changes(state: ScaleState, returned: dict | None, codebook_size: int):
    """Replace the codes so far by those that a callback returns; the next scale reads them.

    Args:
        state: the state after the scale, whose codes are replaced.
        returned: `None`, or a dict in which "image_tokens" are the codes (B, n) so far.

    Raises:
        ValueError: for anything else, such as other names, and for codes of another shape or outside of the codebook.
    """
    if returned is None:
        return
    if not isinstance(returned, dict):
        raise ValueError(f"callback_on_step_end must return None or its callback_kwargs, got {short_repr(returned)}.")
    if unknown := [name for name in returned if name not in CALLBACK_KWARGS]:
        raise ValueError(
            f"callback_on_step_end must return callback_kwargs, whose names are {', '.join(CALLBACK_KWARGS)}, got "
            f"{short_repr(unknown[0])}."
        )
    codes, own = returned.get("image_tokens"), pad_codes(state.image_tokens)
    if codes is None:
        return
    if not torch.is_tensor(codes) or codes.dtype not in WHOLE_NUMBERS or codes.shape != own.shape:
        raise ValueError(
            f"The image_tokens that a callback returns must be whole numbers {tuple(own.shape)}, as given."
        )
    if bool((((codes < 0) | (codes >= codebook_size)) & (own >= 0).to(codes.device)).any()):
        raise ValueError(f"The image_tokens that a callback returns must lie from 0 to {codebook_size - 1}.")
    for row, new in zip(state.image_tokens, codes):
        row.copy_(new[: len(row)])
