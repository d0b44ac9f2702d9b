"""Rows of conversations and codes to padded or packed batches."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..data.rows import ROW_NUMBER, BadRowError, Sample, load_picture, read_row
from ..data.segments import encode_messages
from ..data.validation import check_codes_of
from ..loss_nextflow import IGNORE_INDEX
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import ScaleSchedule
from .packing import SampleSize


@dataclass
class _Encoded:
    """A row as token ids, labels, and its pictures: final grids with codes, or with pixel values (3, H, W)."""

    ids: list[int]
    labels: list[int]
    grids: list
    sample: Sample
    pixels: list[torch.Tensor]


class NextFlowCollator:
    """Batches of rows of the data format (docs/data.md).

    Rows that hold codes (`image_tokens`, `image_grids`, and `image_labels` where the codes to write differ) are taken
    as they are; pictures of other rows are read, and the model encodes them. A batch has rows of one kind. Loss is on
    the assistant's turns, unless a row says otherwise.

    Rows are padded to a common length. A batch that is one pack, a list of rows, becomes one row of samples with
    `seq_idx` in place of `attention_mask`.

    A row that cannot be used, or of which nothing is trained on, is a `ValueError` that names the field, and the row
    where [`NextFlowTrainer`] numbers it.

    Args:
        processor: its tokenizer and chat template are used, and its image processor for rows without codes.
        pad_to_multiple_of: lengths are rounded up to it, so that compiled code meets few shapes.
        root: what paths of pictures are relative to.
        tokenizer_fingerprint: codes of rows that name another tokenizer are refused; `NextFlowTrainer` sets it to its
            model's. `None`: not checked.
    """

    def __init__(
        self,
        processor: NextFlowProcessor,
        pad_to_multiple_of: int = 1,
        root: str | os.PathLike = ".",
        tokenizer_fingerprint: str | None = None,
    ):
        self.processor, self.pad_to_multiple_of = processor, pad_to_multiple_of
        self.root, self.tokenizer_fingerprint = root, tokenizer_fingerprint

    @property
    def settings(self) -> dict:
        """What beside the processor decides about the batches."""
        return {"pad_to_multiple_of": self.pad_to_multiple_of}

    def __call__(self, rows: list[dict] | list[list[dict]]) -> dict[str, torch.Tensor]:
        packed = bool(rows) and isinstance(rows[0], list)
        if packed and len(rows) > 1:
            raise ValueError(f"A batch is one pack, got {len(rows)}; set per_device_train_batch_size to 1.")
        encoded = [self._encode_to_train(row) for row in (rows[0] if packed else rows)]
        return (self._packed if packed else self._padded)(encoded) | self._pictures(encoded)

    def encode(self, row: dict) -> tuple[list[int], list[int]]:
        """Token ids and labels of one row; every picture as `<boi>`, its slots, `<eoi>`.

        Raises:
            ValueError: naming the field, if the row does not follow the format or its codes are another tokenizer's.
        """
        encoded = self._encode(row)
        return encoded.ids, encoded.labels

    def size(self, row: dict) -> SampleSize:
        """What the cost of the row depends on. Raises `ValueError` as a call on it."""
        encoded = self._encode_to_train(row)
        trained = len(encoded.labels) - encoded.labels.count(IGNORE_INDEX)
        return SampleSize(len(encoded.ids), trained, tuple(self._schedule(grid) for grid in encoded.grids))

    def _encode_to_train(self, row: dict) -> _Encoded:
        """A row of which something is learned; errors name its number where it holds one."""
        try:
            encoded = self._encode(row)
            if all(label == IGNORE_INDEX for label in encoded.labels):
                raise BadRowError("messages", 'nothing is learned from them; give an answer or "train": true')
        except BadRowError as error:
            if isinstance(row, dict) and ROW_NUMBER in row:
                raise error.of_row(row[ROW_NUMBER]) from error
            raise
        return encoded

    def _encode(self, row: dict) -> _Encoded:
        processor, sample = self.processor, read_row(row, self.root)
        check_codes_of(sample, None, None, self.tokenizer_fingerprint)
        grids, pixels = sample.image_grids, []
        if grids is None:
            pictures = [load_picture(picture, place) for place, picture in zip(sample.fields, sample.pictures)]
            processed = [processor.image_processor(picture, return_tensors="pt") for picture in pictures]
            grids = [batch["image_grids"][0].tolist() for batch in processed]
            pixels = [batch["pixel_values"][0] for batch in processed]
        remaining = list(grids)
        ids, labels = [], []
        for token, trained in zip(*encode_messages(processor, sample.messages)):
            tokens = [token]
            if token == processor.image_token_id:
                if not remaining:
                    raise BadRowError("messages", f"a text spells out {processor.image_token}; it stands for a picture")
                tokens = processor.picture_tokens(*remaining.pop(0))
            ids += tokens
            labels += tokens if trained else [IGNORE_INDEX] * len(tokens)
        return _Encoded(ids, labels, grids, sample, pixels)

    def _padded(self, rows: list[_Encoded]) -> dict[str, torch.Tensor]:
        batch = self._empty(len(rows), max(len(row.ids) for row in rows))
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for index, row in enumerate(rows):
            batch["input_ids"][index, : len(row.ids)] = torch.tensor(row.ids)
            batch["attention_mask"][index, : len(row.ids)] = 1
            batch["labels"][index, : len(row.ids)] = torch.tensor(row.labels)
        return batch

    def _packed(self, rows: list[_Encoded]) -> dict[str, torch.Tensor]:
        batch = self._empty(1, sum(len(row.ids) for row in rows))
        # Padding at the end is one more sample.
        batch["seq_idx"] = torch.full_like(batch["input_ids"], len(rows))
        start = 0
        for index, row in enumerate(rows):
            span = slice(start, start + len(row.ids))
            batch["input_ids"][0, span] = torch.tensor(row.ids)
            batch["labels"][0, span] = torch.tensor(row.labels)
            batch["seq_idx"][0, span] = index
            start = span.stop
        return batch

    def _empty(self, count: int, longest: int) -> dict[str, torch.Tensor]:
        shape = (count, longest + -longest % self.pad_to_multiple_of)
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id)
        return {"input_ids": input_ids, "labels": torch.full(shape, IGNORE_INDEX)}

    def _pictures(self, rows: list[_Encoded]) -> dict[str, torch.Tensor]:
        rows = [row for row in rows if row.grids]
        if not rows:
            return {}
        batch = {"image_grids": torch.tensor([grid for row in rows for grid in row.grids])}
        with_codes = [row for row in rows if row.sample.image_tokens is not None]
        if not with_codes:
            pixels = [picture for row in rows for picture in row.pixels]
            height, width = (max(picture.shape[side] for picture in pixels) for side in (-2, -1))
            padding = [(0, width - picture.shape[-1], 0, height - picture.shape[-2]) for picture in pixels]
            padded = [torch.nn.functional.pad(picture, pad) for picture, pad in zip(pixels, padding)]
            return batch | {"pixel_values": torch.stack(padded)}
        if len(with_codes) < len(rows):
            raise ValueError(
                f"{len(with_codes)} of {len(rows)} rows with pictures hold codes; extract the codes of all, or of none."
            )
        for name in ("image_tokens", "image_labels"):
            codes = [torch.as_tensor(codes).long() for row in rows for codes in getattr(row.sample, name)]
            batch[name] = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1)
        return batch

    def _schedule(self, grid: tuple[int, int]) -> ScaleSchedule:
        return self.processor.image_processor.schedule_for_grid(*grid)
