"""Measure memory and time of the loss and its gradient, fused with the head and plain (CPU).

    python benchmarks/fused_loss.py

The vocabulary is that of Qwen2.5-VL with `<boi>`, `<eoi>` and 32,768 codes. Memory is counted with tensors without
data, as the largest sum of all tensors that exist at the same time, from loss to gradients. It is also measured for
`--measured_tokens`, in a process for each way, as the growth of the process's peak; the plain way takes 3 MB for each
token. The width is small, so the figures show what grows with the vocabulary. Values and gradients of both ways are
compared on the same input. Writes `results/fused_loss.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from backbone import RESULTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from transformers_nextflow.evaluation.results import write_result
from transformers_nextflow.sequence.fused_cross_entropy import fused_cross_entropy


TEXT, CODES = 152_066, 32_768
TARGET_SHARE, TARGET_ERROR = 0.1, 1e-5
Inputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


def make_inputs(tokens: int, width: int, device: str = "cpu") -> Inputs:
    """Returns ([hidden states, both heads], classes, weights), the same at every call."""
    if device == "meta":
        shapes = ((tokens, width), (TEXT, width), (CODES, width))
        tensors = [torch.empty(shape, device=device, requires_grad=True) for shape in shapes]
        classes = torch.empty(tokens, dtype=torch.long, device=device)
        return tensors, classes, torch.empty(tokens, device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (TEXT, width), (CODES, width))
    tensors = [torch.randn(shape, generator=generator).div_(width**0.25).requires_grad_() for shape in shapes]
    classes = torch.randint(TEXT + CODES, (tokens,), generator=generator)
    return tensors, classes, torch.rand(tokens, generator=generator)


def plain(tensors: list[torch.Tensor], classes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    hidden_states, *heads = tensors
    logits = torch.cat([hidden_states @ head.T for head in heads], dim=-1)
    return (F.cross_entropy(logits, classes, reduction="none") * weights).sum()


def fused(tensors: list[torch.Tensor], classes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    hidden_states, *heads = tensors
    return fused_cross_entropy(hidden_states, heads, classes, weights)[0]


WAYS = {"plain": plain, "fused": fused}


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of living tensors that were made inside of the context, and keeps the largest sum."""

    def __init__(self):
        super().__init__()
        self.living: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage):
        key = storage._cdata
        if key not in self.living:
            self.living[key] = storage.nbytes()
            weakref.finalize(storage, self.living.pop, key)
            self.peak = max(self.peak, sum(self.living.values()))


def counted(way: str, tokens: int, width: int) -> int:
    """Returns the most bytes that loss and gradients hold, by the count of living tensors."""
    inputs = make_inputs(tokens, width, "meta")
    with LivingTensors() as tensors:
        WAYS[way](*inputs).backward()
    return tensors.peak


def memory_of(field: str) -> int:
    """Returns the bytes that this process has in memory now ("VmRSS") or had at its peak ("VmHWM")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(way: str, tokens: int, width: int, connection):
    inputs = make_inputs(tokens, width)
    # Threads and libraries are started before memory is counted.
    WAYS[way](*make_inputs(8, width)).backward()
    before, start = memory_of("VmRSS"), time.perf_counter()
    WAYS[way](*inputs).backward()
    connection.send({"bytes": memory_of("VmHWM") - before, "seconds": time.perf_counter() - start})


def in_own_process(way: str, tokens: int, width: int) -> dict:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(way, tokens, width, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise MemoryError(f"The {way} loss of {tokens} tokens ended its process; give fewer --tokens.") from error
    finally:
        process.join()


def errors(tokens: int, width: int) -> dict[str, float]:
    """Returns the relative errors of value and gradients of the fused way, by norm."""
    values = {}
    for way, loss in WAYS.items():
        tensors, classes, weights = make_inputs(tokens, width)
        total = loss(tensors, classes, weights)
        total.backward()
        values[way] = [total.detach(), *(tensor.grad for tensor in tensors)]
    names = ("value", "hidden_states", "lm_head", "visual_head")
    return {name: float((a - b).norm() / a.norm()) for name, a, b in zip(names, values["plain"], values["fused"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--measured_tokens",
        type=int,
        default=4096,
        help="number of tokens; the plain way takes 3 MB of memory for each",
    )
    parser.add_argument("--width", type=int, default=64, help="width of the hidden states")
    parser.add_argument("--results", default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()

    count = {way: counted(way, arguments.tokens, arguments.width) for way in WAYS}
    compared = min(arguments.measured_tokens, 64)
    error = errors(compared, arguments.width)
    same = {way: counted(way, arguments.measured_tokens, arguments.width) for way in WAYS}
    measured = {
        way: in_own_process(way, arguments.measured_tokens, arguments.width) | {"counted_bytes": same[way]}
        for way in tqdm(WAYS, unit="way")
    }
    for way, values in measured.items():
        print(
            f"{way:<6} {arguments.tokens} tokens: {count[way] / 2**20:>6.0f} MiB counted; {arguments.measured_tokens}: "
            f"{same[way] / 2**20:.0f} counted, {values['bytes'] / 2**20:.0f} measured, {values['seconds']:.1f} s"
        )
    share = count["fused"] / count["plain"]
    print(f"share of memory {share:.1%} (target {TARGET_SHARE:.0%})")
    print(f"relative errors (target {TARGET_ERROR}):", json.dumps(error))
    values = {
        "peak_memory_share": round(share, 4),
        "relative_error": max(error.values()),
        "vocabulary": TEXT + CODES,
        "tokens": arguments.tokens,
        "width": arguments.width,
        "counted_bytes": count,
        "measured": measured | {"tokens": arguments.measured_tokens},
        "errors": error | {"tokens": compared},
    }
    print("written:", write_result(Path(arguments.results) / "fused_loss.json", values))


if __name__ == "__main__":
    main()
