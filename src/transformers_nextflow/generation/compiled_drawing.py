"""Compiled drawing: scales are recorded once and replayed, with key-value buffers of fixed size and one captured graph
for each scale.

The time of small scales is mostly that of launching kernels. A CUDA graph launches all kernels of a scale at once; the
pass over the prompt, the head, guidance and sampling stay outside. The buffers have a part for prompts, which has one
of a few sizes, and prompts are at its right end; so one recording serves all prompts that fit, also of unequal length.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from ..scale_schedule import ScaleSchedule
from ..sequence.ragged_keys import RaggedKeys
from ..sequence.scale_sdpa import SCALE_SDPA
from ..utils.older_transformers import CACHE_KEYWORD
from .cached_sequences import CachedSequences
from .sampling import ImageSampling
from .scale_loop import ImageCodes


logger = logging.get_logger(__name__)
# Prompts share recordings up to each of these lengths; longer prompts take the next multiple of the last one.
PROMPT_COLUMNS = (64, 128, 256, 512, 1024)
# How many kinds of drawings are kept with their recordings and buffers; the least recently used one is dropped first.
MAX_KINDS = 4
WARM_UPS = 2


def prompt_columns(length: int) -> int:
    """The columns that buffers have for prompts of at most `length` tokens."""
    last = PROMPT_COLUMNS[-1]
    return next((size for size in PROMPT_COLUMNS if size >= length), -(-length // last) * last)


class Recording:
    """A function that reads tensors at fixed addresses and is replayed many times.

    On CUDA it is captured as a graph; on other devices each replay calls it.
    """

    def __init__(self, run: Callable[[], torch.Tensor], device: torch.device, pool=None):
        self.run, self.graph = run, None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):  # compiles kernels and allocates their workspaces
                    run()
            torch.cuda.current_stream(device).wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.result = run()

    def replay(self) -> torch.Tensor:
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.result


class Buffers:
    """Keys and values of all layers, (R, columns, heads, D) each: prompts in the first `left` columns, then slots."""

    def __init__(self, cache, left: int, slots: int):
        self.left = left

        def like(states: torch.Tensor) -> torch.Tensor:
            rows, heads, _, channels = states.shape
            return states.new_zeros(rows, left + slots, heads, channels).transpose(1, 2)

        self.layers = [(like(layer.keys), like(layer.values)) for layer in cache.layers]

    def take(self, cache):
        """Copy the cache of prompts to the right end of the part for prompts."""
        for buffers, layer in zip(self.layers, cache.layers):
            for buffer, states in zip(buffers, (layer.keys, layer.values)):
                buffer[:, :, self.left - states.shape[2] : self.left].copy_(states)


class ScaleCache:
    """The buffers as the cache of one pass over the first `rows` rows, which writes columns from `start` on."""

    def __init__(self, buffers: Buffers, rows: int, start: int):
        self.buffers, self.rows, self.start = buffers, rows, start

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        buffers = [buffer[: self.rows] for buffer in self.buffers.layers[layer]]
        for buffer, states in zip(buffers, (keys, values)):
            buffer[:, :, self.start : self.start + states.shape[2]].copy_(states)
        return tuple(buffers)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.start


@dataclass(frozen=True)
class RecordingKey:
    """The properties of a drawing on which its recording depends."""

    schedules: tuple[ScaleSchedule, ...]
    contexts: int
    left: int
    device: torch.device
    dtype: torch.dtype
    weights: tuple[int, ...]


class RecordedScales:
    """The scales of one kind of drawing; the interface is that of `EagerScales`."""

    def __init__(self, model: nn.Module, backbone: Callable, kind: RecordingKey, cache):
        self.model, self.backbone, self.kind = model, backbone, kind
        (schedule,) = set(kind.schedules)
        self.codes = ImageCodes(model, kind.schedules, ImageSampling())
        self.buffers = Buffers(cache, kind.left, schedule.offsets[-1])
        self.starts = torch.zeros(kind.contexts * len(kind.schedules), dtype=torch.int32, device=kind.device)
        self.origins = torch.zeros(3, kind.contexts, len(kind.schedules), 1, device=kind.device)
        self.recordings: dict[tuple[int, int], Recording] = {}
        self.pool = torch.cuda.graph_pool_handle() if kind.device.type == "cuda" else None

    def begin(self, drawing: ImageCodes, sequences: CachedSequences, rows: torch.Tensor):
        """Start a drawing after its prompts."""
        self.drawing, self.contexts = drawing, self.kind.contexts
        self.buffers.take(sequences.cache)
        unused = self.kind.left - sequences.cache.get_seq_length()
        self.starts.copy_(torch.tensor([unused + padding for padding in sequences.padding], dtype=torch.int32))
        self.origins.copy_(sequences.slot_origins(rows))

    def read(self, scale: int, round_: int = 0) -> torch.Tensor:
        """Hidden states (C, B, n, D) of the slots of a scale, counted from 0; the next replay overwrites them."""
        self.codes.image_tokens.copy_(self.drawing.image_tokens)
        key = (scale, self.contexts)
        if key not in self.recordings:
            self.recordings[key] = Recording(lambda: self._pass(*key), self.kind.device, self.pool)
        return self.recordings[key].replay()

    def drop_contexts(self):
        """Continue without the rows that only guidance needs."""
        self.contexts = 1

    def _pass(self, scale: int, contexts: int) -> torch.Tensor:
        embeds, coordinates, _ = self.codes.slots(scale)
        (schedule,) = self.codes.groups
        rows, start, count = contexts * len(embeds), self.kind.left + schedule.offsets[scale], embeds.shape[1]
        # Scale 0 has no slots, so the first slots are those of scale 1.
        start -= schedule.offsets[1]
        ragged = RaggedKeys(self.starts[:rows], start + count)
        outputs = self.backbone(
            inputs_embeds=embeds.expand(contexts, -1, -1, -1).flatten(0, 1),
            attention_mask={"full_attention": ragged},
            position_ids=(self.origins[:, :contexts] + coordinates).flatten(1, 2),
            **{CACHE_KEYWORD: ScaleCache(self.buffers, rows, start)},
            use_cache=True,
            bidirectional=True,
        )
        return outputs.last_hidden_state.unflatten(0, (contexts, -1))


class CompiledDrawing:
    """The recordings of a model, made when needed; see `NextFlowForConditionalGeneration.compile_drawing`.

    Args:
        model: the [`NextFlowForConditionalGeneration`] that draws.
        fuse: compile the backbone, so that its elementwise operations are fused inside of the graphs; default: on CUDA.
    """

    def __init__(self, model: nn.Module, fuse: bool | None):
        self.model, self.fuse = model, fuse
        language_model = model.model.language_model
        is_fused = model.device.type == "cuda" if fuse is None else fuse
        self.backbone = torch.compile(language_model, dynamic=True) if is_fused else language_model
        self.kinds: OrderedDict[RecordingKey, RecordedScales] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def scales(
        self, drawing: ImageCodes, sequences: CachedSequences, rows: torch.Tensor
    ) -> Iterator[RecordedScales | None]:
        """The recorded scales of a drawing; `None`, with a message in the log, if it cannot be recorded."""
        reason = self._unsupported_reason(drawing, sequences, rows)
        if reason is None and not self._lock.acquire(blocking=False):
            reason = "another thread draws on them"
        if reason is not None:
            logger.warning(f"This drawing does not use the compiled scales: {reason}.")
            yield None
            return
        try:
            recorded = self._recorded(drawing, sequences, len(rows))
            recorded.begin(drawing, sequences, rows)
            yield recorded
        finally:
            self._lock.release()

    def _unsupported_reason(self, drawing: ImageCodes, sequences: CachedSequences, rows: torch.Tensor) -> str | None:
        if len(drawing.groups) > 1:
            return "its images differ in size"
        if sequences.padding is None:
            return "its rows have read different columns"
        if rows.numel() != len(sequences.padding):
            return "some rows do not draw"
        implementation = self.model.model.language_model.config._attn_implementation
        if implementation != SCALE_SDPA:
            return f"attn_implementation is {implementation!r}, not {SCALE_SDPA!r}"
        if any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            return "the model is offloaded or spread over devices"
        return None

    def _recorded(self, drawing: ImageCodes, sequences: CachedSequences, contexts: int) -> RecordedScales:
        inner = self.model.model
        read = [*inner.language_model.parameters(), *inner.visual_embedding.parameters()]
        left = prompt_columns(sequences.cache.get_seq_length())
        # A graph reads weights at fixed addresses, which change when the model, or only an adapter, is moved or cast;
        # some of them, as the first one's, may be given again.
        weights = tuple(map(_address, read))
        kind = RecordingKey(drawing.schedules, contexts, left, read[0].device, read[0].dtype, weights)
        if kind not in self.kinds:
            while len(self.kinds) >= MAX_KINDS:
                self.kinds.popitem(last=False)
            self.kinds[kind] = RecordedScales(self.model, self.backbone, kind, sequences.cache)
        self.kinds.move_to_end(kind)
        return self.kinds[kind]


def _address(weight: torch.Tensor) -> int:
    # Classes of weights that are made of other tensors, as quantised ones, have no address of their own.
    return weight.data_ptr() if type(weight) in (nn.Parameter, torch.Tensor) else id(weight)
