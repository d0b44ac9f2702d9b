"""Attention over key-value buffers of fixed size, in which the rows of a batch begin at different columns."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
# Whether the function can leave out the end of a row; older versions cannot.
READS_PARTS_OF_ROWS = varlen_attn is not None and "seqused_k" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class RaggedKeys:
    """Takes the place of a mask: each row attends to the columns from its own start to a common end.

    The starts are on the device, so a captured graph serves prompts of every length.

    Args:
        starts: (R,) int32.
        end: one more than the last column.
    """

    starts: torch.Tensor
    end: int


def attend_ragged(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ragged: RaggedKeys, **kwargs
) -> torch.Tensor:
    """Attention (R, n, H, D) of queries (R, H, n, D) with buffers of keys and values (R, Hkv, columns, D).

    In half precision on a GPU no column before a start is read. Otherwise a mask hides these columns.
    """
    rows, heads, count, _ = query.shape
    if READS_PARTS_OF_ROWS and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        columns = key.shape[2]
        begins = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
        of_keys = begins * columns
        of_keys[:rows] += ragged.starts
        output = varlen_attn(
            query.transpose(1, 2).flatten(0, 1),
            *(states.transpose(1, 2).flatten(0, 1) for states in (key, value)),
            begins * count,
            of_keys,
            count,
            ragged.end,
            scale=kwargs.get("scaling"),
            enable_gqa=heads > key.shape[1],
            seqused_k=ragged.end - ragged.starts,
        )
        return output.unflatten(0, (rows, count))
    key, value = key[:, :, : ragged.end], value[:, :, : ragged.end]
    mask = torch.arange(ragged.end, device=query.device) >= ragged.starts[:, None]
    mask = mask[:, None, None].expand(-1, -1, count, -1)
    return sdpa_attention_forward(module, query, key, value, mask, **(kwargs | {"is_causal": False}))[0]
