"""Weights that accelerate offloads (to the CPU or the disk) and loads only while a module's `forward` runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from types import NoneType
from weakref import WeakKeyDictionary

import torch
from torch import nn


class _OnloadedHook:
    """Replaces a module's hook while its weights stay on the device that computes."""

    no_grad = False

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        return output


@contextmanager
def onload_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """During the block the own weights of these modules, without those of their children, are on the device that
    computes.

    Code that reads a weight without calling its module needs this. For modules without offloading, and for those that
    are onloaded already, it does nothing.
    """
    hooks = {module: hook for module in modules if not isinstance(hook := _hook(module), _OnloadedHook | NoneType)}
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(_offload, module, hook)
            hook.pre_forward(module)
            # Otherwise a call of the module would offload its weights again.
            module._hf_hook = _OnloadedHook()
        yield


def check_holds_weights(model: nn.Module, what: str):
    """Raises `ValueError` for a model whose weights are offloaded one by one: what reads or writes them outside of
    `forward` reaches only empty ones, without an error.
    """
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(
            f"Weights of the {type(model).__name__} are offloaded, where {what} does not reach them; do it before they "
            "are (pipe.remove_all_hooks() takes back enable_sequential_cpu_offload)."
        )


def is_onloaded(module: nn.Module) -> bool:
    """Whether `onload_weights` currently keeps the weights of an offloaded module on the device."""
    return isinstance(_hook(module), _OnloadedHook)


@contextmanager
def one_thread_if_offloaded(model: nn.Module) -> Iterator[None]:
    """If the model is offloaded, only one thread at a time runs the block, since weights are moved for each."""
    with _GUARD:
        lock = _LOCKS.setdefault(model, RLock())
    with lock:
        # Checked inside of the lock, since diffusers removes hooks for a moment when it offloads a model.
        if _hook(model) is not None:
            yield
            return
    yield


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_GUARD = Lock()


class ExecutionDeviceMixin:
    """A model whose `device` is the device that computes, also if its weights are offloaded."""

    @property
    def device(self) -> torch.device:
        """The device of its parameters; for offloaded ones the device to which they are moved."""
        device = super().device
        if device.type == "meta":
            devices = (getattr(_hook(module), "execution_device", None) for module in self.modules())
            device = next((torch.device(found) for found in devices if found is not None), device)
        return device


def _hook(module: nn.Module):
    # `getattr` would search parameters, buffers and children too.
    return module.__dict__.get("_hf_hook")


def _offload(module: nn.Module, hook):
    module._hf_hook = hook
    hook.post_forward(module, None)
