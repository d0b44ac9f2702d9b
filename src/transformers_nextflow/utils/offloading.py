"""Weights that accelerate keeps elsewhere (on the CPU, on the disk) and brings for the time of a module's `forward`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from types import NoneType
from weakref import WeakKeyDictionary

import torch
from torch import nn


class _Onloaded:
    """Takes the place of a module's hook while its weights stay where it computes."""

    no_grad = False

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        return output


@contextmanager
def onloaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The weights of these modules (of each its own, not its children's) are there for as long as this lasts.

    What reads a weight in place of calling the module that holds it needs this. For modules without offloading, and
    for those that are onloaded already, it does nothing.
    """
    hooks = {module: hook for module in modules if not isinstance(hook := _hook(module), _Onloaded | NoneType)}
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(_offload, module, hook)
            hook.pre_forward(module)
            # Else a call of the module would take its weights away again.
            module._hf_hook = _Onloaded()
        yield


def is_onloaded(module: nn.Module) -> bool:
    """Whether `onloaded` holds the weights of an offloaded module in place."""
    return isinstance(_hook(module), _Onloaded)


@contextmanager
def one_after_the_other(model: nn.Module) -> Iterator[None]:
    """Threads wait for each other here if the model is offloaded: its weights come and go for one at a time."""
    with _GUARD:
        lock = _LOCKS.setdefault(model, RLock())
    with lock:
        # Looked at inside of the lock: diffusers takes hooks away for a moment when it frees a model.
        if _hook(model) is not None:
            yield
            return
    yield


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_GUARD = Lock()


class ExecutionDeviceMixin:
    """A model whose `device` is where it computes, wherever its weights wait."""

    @property
    def device(self) -> torch.device:
        """The device of its parameters; of offloaded ones the device that they are brought to."""
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
