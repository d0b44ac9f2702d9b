"""Rows of conversations and codes to padded batches."""

from __future__ import annotations

import torch

from ..loss_nextflow import IGNORE_INDEX
from ..processing_nextflow import NextFlowProcessor


class NextFlowCollator:
    """Batches of conversations whose pictures have been encoded.

    A row holds `messages` (chat format; `{"type": "image"}` parts stand for its pictures in order), `image_tokens`, a
    list of codes for each picture, `image_grids`, the final grid of each, and optionally `image_labels`, the codes to
    be written where they differ from those to be read (self-correction). Loss is on the assistant's turns alone.

    Args:
        processor: its tokenizer and chat template are used.
        pad_to_multiple_of: lengths are rounded up to it, so that compiled code meets few shapes.
    """

    def __init__(self, processor: NextFlowProcessor, pad_to_multiple_of: int = 1):
        self.processor, self.pad_to_multiple_of = processor, pad_to_multiple_of

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences = [self.encode(row) for row in rows]
        longest = max(len(ids) for ids, _ in sequences)
        longest += -longest % self.pad_to_multiple_of
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for index, (ids, labels) in enumerate(sequences):
            batch["input_ids"][index, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][index, : len(ids)] = 1
            batch["labels"][index, : len(ids)] = torch.tensor(labels)
        if any(row["image_grids"] for row in rows):
            batch["image_grids"] = torch.tensor([grid for row in rows for grid in row["image_grids"]])
            for name in ("image_tokens", "image_labels"):
                codes = [torch.as_tensor(codes).long() for row in rows for codes in row.get(name, row["image_tokens"])]
                batch[name] = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1)
        return batch

    def encode(self, row: dict) -> tuple[list[int], list[int]]:
        """Token ids and labels of one row; every picture as `<boi>`, its slots, `<eoi>`.

        Raises:
            ValueError: if the pictures of the messages are not as many as the codes.
        """
        processor = self.processor
        encoded = processor.tokenizer.apply_chat_template(
            row["messages"],
            chat_template=processor.chat_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        grids = list(row["image_grids"])
        found = encoded["input_ids"].count(processor.image_token_id)
        if found != len(grids) or len(row["image_tokens"]) != len(grids):
            raise ValueError(
                f"The messages hold {found} pictures, but the row has {len(row['image_tokens'])} image_tokens and "
                f"{len(grids)} image_grids: {row['messages']}."
            )
        ids, labels = [], []
        for token, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"]):
            tokens = [token]
            if token == processor.image_token_id:
                tokens = processor.picture_tokens(*grids.pop(0))
            ids += tokens
            labels += tokens if is_answer else [IGNORE_INDEX] * len(tokens)
        return ids, labels
