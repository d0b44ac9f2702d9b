"""Makes padded or packed batches from rows of conversations and codes."""

from __future__ import annotations

import os
from functools import cached_property

import torch
from transformers.utils import logging

from ..data.row_codes import FINGERPRINT, read_grids
from ..data.row_encoding import EncodedRow, encode_sample
from ..data.row_errors import BadRowError
from ..data.rows import ROW_NUMBER, read_row
from ..data.stored_sizes import processor_fingerprint, stored_size
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import ScaleSchedule
from ..sequence.loss import IGNORE_INDEX
from ..sequence.padding import pad_codes
from .packing import SampleSize


logger = logging.get_logger(__name__)


class NextFlowCollator:
    """Makes batches from rows of the data format (docs/data.md).

    For rows with codes (`image_tokens`, `image_grids`, and `image_labels` and `image_clean_tokens` if codes were
    sampled for self-correction) these codes are used; images of other rows are read, and the model encodes them. All
    rows of a batch must be of one kind. The loss is on the assistant's turns, unless a row says otherwise, with one
    label for each trained position; an image that is not trained on is read with its clean codes.

    Rows are padded to a common length. A batch that is one pack, a list of rows, becomes one row of samples with
    `seq_idx` in place of `attention_mask`.

    A row that cannot be used, or in which nothing is trained on, raises a `ValueError` that names the field, and the
    row if [`NextFlowTrainer`] numbers it. `validate_rows` reports the same rows.

    Args:
        processor: its tokenizer and chat template are used, and its image processor for rows without codes.
        pad_to_multiple_of: lengths are rounded up to a multiple of this, so that compiled code sees few shapes.
        root: the folder to which paths of images are relative.
        tokenizer_fingerprint, codebook_size: codes of another tokenizer, or outside of the codebook, are refused;
            `NextFlowTrainer` sets these to its model's. `None`: not checked.
        max_positions: rows that take more positions are refused; `NextFlowTrainer` sets it too. `None`: not checked.
    """

    def __init__(
        self,
        processor: NextFlowProcessor,
        pad_to_multiple_of: int = 1,
        root: str | os.PathLike = ".",
        tokenizer_fingerprint: str | None = None,
        codebook_size: int | None = None,
        max_positions: int | None = None,
    ):
        self.processor, self.pad_to_multiple_of, self.root = processor, pad_to_multiple_of, root
        self.tokenizer_fingerprint, self.codebook_size = tokenizer_fingerprint, codebook_size
        self.max_positions = max_positions

    @property
    def settings(self) -> dict:
        """The settings, besides those of the processor, on which batches depend."""
        return {"pad_to_multiple_of": self.pad_to_multiple_of}

    def __call__(self, rows: list[dict] | list[list[dict]]) -> dict[str, torch.Tensor]:
        packed = bool(rows) and isinstance(rows[0], list)
        if packed and len(rows) > 1:
            raise ValueError(
                f"With packing, a batch is one pack, got {len(rows)}; set per_device_train_batch_size to 1."
            )
        encoded = [self._encode_to_train(row) for row in (rows[0] if packed else rows)]
        return (self._packed if packed else self._padded)(encoded) | self._images(encoded)

    def encode(self, row: dict) -> tuple[list[int], list[int]]:
        """Token ids and labels of one row; every image as `<boi>`, its slots, `<eoi>`.

        Raises:
            ValueError: naming the field, if the row does not follow the format or has codes of another tokenizer.
        """
        encoded = self._encode(row)
        return encoded.ids, encoded.labels

    def size(self, row: dict) -> SampleSize:
        """What the cost of the row depends on: as it is stored, else by reading the row.

        Raises:
            ValueError: where it is read, as a call on it.
        """
        if self.knows_size(row):
            counts, grids = stored_size(row, self._processor_fingerprint), read_grids(row)
        else:
            encoded = self._encode_to_train(row)
            counts, grids = (len(encoded.ids), encoded.num_trained), encoded.grids
            logger.warning_once(
                "Rows are read and tokenized to know their lengths before they are packed: they come without lengths, "
                "or with those of another processor or tokenizer. `extract-codes` stores them."
            )
        return SampleSize(*counts, tuple(self._schedule(grid) for grid in grids))

    def knows_size(self, row: dict) -> bool:
        """Whether the size of a row is stored, by this processor and for codes of this tokenizer, and is no reason to
        refuse the row.
        """
        size = stored_size(row, self._processor_fingerprint) if isinstance(row, dict) else None
        if size is None or self.tokenizer_fingerprint not in (None, row.get(FINGERPRINT)):
            return False
        # Positions are at most as many as tokens.
        return size[1] > 0 and (self.max_positions is None or size[0] <= self.max_positions)

    @cached_property
    def _processor_fingerprint(self) -> str:
        return processor_fingerprint(self.processor)

    def _encode_to_train(self, row: dict) -> EncodedRow:
        """An encoded row in which something is trained on; errors name the row's number if it has one."""
        try:
            encoded = self._encode(row)
            encoded.check_learned()
        except BadRowError as error:
            if isinstance(row, dict) and ROW_NUMBER in row:
                raise error.of_row(row[ROW_NUMBER]) from error
            raise
        return encoded

    def _encode(self, row: dict) -> EncodedRow:
        sample = read_row(row, self.root, max_frames=self.processor.image_processor.max_frames)
        return encode_sample(sample, self.processor, self.codebook_size, self.tokenizer_fingerprint, self.max_positions)

    def _padded(self, rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
        batch = self._empty(len(rows), max(len(row.ids) for row in rows))
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for index, row in enumerate(rows):
            batch["input_ids"][index, : len(row.ids)] = torch.tensor(row.ids)
            batch["attention_mask"][index, : len(row.ids)] = 1
            batch["labels"][index, : len(row.ids)] = torch.tensor(row.labels)
        return batch

    def _packed(self, rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
        batch = self._empty(1, sum(len(row.ids) for row in rows))
        # Padding at the end counts as one more sample.
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

    def _images(self, rows: list[EncodedRow]) -> dict[str, torch.Tensor]:
        rows = [row for row in rows if row.grids]
        if not rows:
            return {}
        batch = {"image_grids": torch.tensor([grid for row in rows for grid in row.grids])}
        codes = [row.sample.codes for row in rows if row.sample.codes is not None]
        if not codes:
            pixels = [torch.from_numpy(pixel_values) for row in rows for pixel_values in row.pixels]
            height, width = (max(pixel_values.shape[side] for pixel_values in pixels) for side in (-2, -1))
            padding = [
                (0, width - pixel_values.shape[-1], 0, height - pixel_values.shape[-2]) for pixel_values in pixels
            ]
            padded = [torch.nn.functional.pad(pixel_values, pad) for pixel_values, pad in zip(pixels, padding)]
            return batch | {"pixel_values": torch.stack(padded)}
        if len(codes) < len(rows):
            raise ValueError(
                f"{len(codes)} of {len(rows)} rows with images hold codes; extract the codes of all, or of none."
            )
        for name, kind in (("image_tokens", "read"), ("image_labels", "written")):
            images = [torch.tensor(image) for own in codes for image in getattr(own, kind)]
            batch[name] = pad_codes(images)
        return batch

    def _schedule(self, grid: tuple[int, int]) -> ScaleSchedule:
        return self.processor.image_processor.schedule_for_grid(*grid)
