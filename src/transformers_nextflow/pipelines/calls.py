"""A call on a pipeline while it runs: what happens after each scale, requests to stop, and the cleaning up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from ..generation.scale_loop import ScaleState
from ..sequence.padding import pad_codes
from ..utils.offloading import is_onloaded, one_thread_if_offloaded, onload_weights
from ..utils.saved_adapters import unwrap_peft
from ..utils.short_repr import short_repr
from .notebook_display import ScalePreviews


CALLBACK_KWARGS = ("image_tokens", "preview")
WHOLE_NUMBERS = (torch.int16, torch.int32, torch.int64)


@dataclass
class _Call:
    """A call that runs or was the last to run.

    `stops` is the number of requests to stop from outside when it began, and `changed_rows` are the numbers of images
    whose codes a callback replaced by others.
    """

    stops: int
    changed_rows: set[int] = field(default_factory=set)
    is_over: bool = False
    interrupted: bool = False


class _Thread(threading.local):
    """For each pipeline the calls that run in this thread, the innermost last; if none runs, the last one."""

    def __init__(self):
        self.calls: WeakKeyDictionary[PipelineCallsMixin, list[_Call]] = WeakKeyDictionary()


_THREAD = _Thread()


class PipelineCallsMixin:
    """Calls of a [`NextFlowPipeline`], which may run in several threads, and within callbacks of other calls."""

    _stops = 0

    @property
    def interrupt(self) -> bool:
        """Whether the call in this thread (if none runs, the last one) was asked to stop after the current scale."""
        calls = self._calls()
        if not calls:
            return False
        return calls[-1].interrupted or (not calls[-1].is_over and calls[-1].stops != self._stops)

    @property
    def _interrupt(self) -> bool:
        """The request to stop. Set in a callback, it stops the call of that callback; set outside of calls, such as by
        a button in another thread, it stops all calls that are running.
        """
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool):
        calls = self._calls()
        if calls and not calls[-1].is_over:
            calls[-1].interrupted = bool(value)
        elif value:
            self._stops += 1

    def _calls(self) -> list[_Call]:
        return _THREAD.calls.setdefault(self, [])

    @contextmanager
    def _call(self) -> Iterator[None]:
        """One call: an offloaded model is moved to the device that computes, and back afterwards, even after an
        error.
        """
        calls = self._calls()
        if calls and calls[-1].is_over:
            calls.pop()
        calls.append(_Call(self._stops))
        try:
            with one_thread_if_offloaded(self.model):
                is_within_another = is_onloaded(self.model)
                try:
                    # Offloading moves a model when its `forward` is called, but the pipeline mostly calls other
                    # methods.
                    with onload_weights([self.model]):
                        yield
                finally:
                    if not is_within_another:
                        self.maybe_free_model_hooks()
        finally:
            if len(calls) > 1:
                calls.pop()
            else:
                calls[-1].interrupted, calls[-1].is_over = self.interrupt, True

    def _after_scale(
        self,
        progress_bar,
        scale_previews: ScalePreviews | None,
        callback: Callable | None,
        wanted: Sequence[str],
        output_type: str,
    ) -> Callable[[torch.nn.Module, int, ScaleState], bool]:
        """The function that the scale loop calls after each scale; the loop stops if it returns `False`."""

        def after_scale(model, scale: int, state: ScaleState) -> bool:
            progress_bar.update()
            if scale_previews is not None:
                scale_previews.add(self._callback_kwargs(state, ["preview"], "pil")["preview"])
            if callback is not None:
                returned = callback(self, scale, scale, self._callback_kwargs(state, wanted, output_type))
                size = unwrap_peft(self.model).config.vq_config.codebook_size
                self._calls()[-1].changed_rows.update(apply_callback_changes(state, returned, size))
            return not self.interrupt

        return after_scale

    def _callback_kwargs(self, state: ScaleState, names: Sequence[str], output_type: str) -> dict:
        make = {
            "image_tokens": lambda: pad_codes(state.image_tokens),
            "preview": lambda: self._images(
                self._checked(state.preview())[0], "pil" if output_type == "latent" else output_type
            ),
        }
        return {name: make[name]() for name in names}


def apply_callback_changes(state: ScaleState, returned: dict | None, codebook_size: int) -> list[int]:
    """Replace the codes so far by those that a callback returns; the next scale reads them.

    Args:
        state: the state after the scale, whose codes are replaced.
        returned: `None`, or a dict in which "image_tokens" are the codes (B, n) so far.

    Returns:
        The numbers of the images that have other codes now.

    Raises:
        ValueError: for anything else, such as other names, and for codes of another shape or outside of the codebook.
    """
    if returned is None:
        return []
    if not isinstance(returned, dict):
        raise ValueError(f"callback_on_step_end must return None or its callback_kwargs, got {short_repr(returned)}.")
    if unknown := [name for name in returned if name not in CALLBACK_KWARGS]:
        raise ValueError(
            f"callback_on_step_end must return callback_kwargs, whose names are {', '.join(CALLBACK_KWARGS)}, got "
            f"{short_repr(unknown[0])}."
        )
    codes, own = returned.get("image_tokens"), pad_codes(state.image_tokens)
    if codes is None:
        return []
    if not torch.is_tensor(codes) or codes.dtype not in WHOLE_NUMBERS or codes.shape != own.shape:
        raise ValueError(
            f"The image_tokens that a callback returns must be whole numbers {tuple(own.shape)}, as given."
        )
    if bool((((codes < 0) | (codes >= codebook_size)) & (own >= 0).to(codes.device)).any()):
        raise ValueError(f"The image_tokens that a callback returns must lie from 0 to {codebook_size - 1}.")
    changed = []
    for number, (row, new) in enumerate(zip(state.image_tokens, codes)):
        new = new[: len(row)].to(row)
        if not torch.equal(row, new):
            row.copy_(new)
            changed.append(number)
    return changed
