"""Training of the transformer on `Trainer`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..configuration_nextflow import NextFlowConfig
from ..data.rows import NumberedRows
from ..data.vision_tokenizer import tokenizer_fingerprint
from ..modeling_nextflow import NextFlowCausalLMOutputWithPast, NextFlowForConditionalGeneration, NextFlowTextModel
from ..packed_attention import PACKED_SDPA
from ..processing_nextflow import NextFlowProcessor
from .atomic_checkpoints import AtomicCheckpointMixin
from .collator import NextFlowCollator
from .optimizers import MuonWithAdamW
from .packing import PACKINGS, CostModel, PackedDataset, PackedStream


@dataclass
class NextFlowTrainingArguments(TrainingArguments):
    """`TrainingArguments` and what NextFlow adds.

    Args:
        muon: step the hidden matrices with Muon and the rest with AdamW, in place of `optim`.
        compile_layers: compile each layer of the backbone by itself.
        packing: how a process's batch is made. "padding": `per_device_train_batch_size` rows, padded to the longest.
            "length": one row of samples with `packing_budget` positions at most. "compute": one row of samples that
            cost `packing_budget` at most by [`CostModel`], where a position costs 1 and attention comes on top.
        packing_budget: see `packing`. Processes all have the same, so they take about the same time.
    """

    muon: bool = field(default=False)
    compile_layers: bool = field(default=False)
    packing: str = field(default="padding", metadata={"choices": PACKINGS})
    packing_budget: int | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {PACKINGS}, got {self.packing!r}.")
        if self.packing == "padding" and self.packing_budget is not None:
            raise ValueError(f"packing_budget {self.packing_budget} is for packing 'length' or 'compute'; set that.")
        if self.packing != "padding":
            if self.packing_budget is None or self.packing_budget < 1:
                raise ValueError(f"packing {self.packing!r} needs a packing_budget from 1, got {self.packing_budget}.")
            if self.per_device_train_batch_size != 1:
                raise ValueError(
                    f"A batch is one pack with packing {self.packing!r}: set per_device_train_batch_size to 1 (got "
                    f"{self.per_device_train_batch_size}), and packing_budget to what a step shall hold."
                )
            # Streams: each process takes its own packs; they are lists of rows, which cannot be cut to pieces.
            self.accelerator_config.dispatch_batches = False
        if self.bf16 and self.device.type == "cpu" and not has_bfloat16_units():
            warnings.warn(
                "This processor has no bfloat16 units: bf16=True is many times slower than float32; leave it out.",
                stacklevel=2,
            )
        self.remove_unused_columns = False
        self.label_names = self.label_names or ["labels"]


def has_bfloat16_units() -> bool:
    """Whether the CPU multiplies bfloat16 matrices by itself; taken to, where torch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def packed(
    rows, collator: NextFlowCollator, config: NextFlowConfig, args: NextFlowTrainingArguments
) -> PackedDataset | PackedStream:
    """The packs of a dataset, or of a stream, that the arguments ask for."""
    model = CostModel.from_config(config)

    def cost(row: dict) -> float:
        size = collator.size(row)
        return size.length if args.packing == "length" else model.cost(size, config.read_last_scale)

    if hasattr(rows, "__len__"):
        return PackedDataset(rows, cost, args.packing_budget, args.seed)
    return PackedStream(rows, cost, args.packing_budget)


def _collator_of(processor: NextFlowProcessor | None) -> NextFlowCollator:
    if not isinstance(processor, NextFlowProcessor):
        raise ValueError(
            "Give processing_class, the checkpoint's NextFlowProcessor, or data_collator, a NextFlowCollator; got "
            f"{processor!r} and None."
        )
    return NextFlowCollator(processor)


class NextFlowTrainer(AtomicCheckpointMixin, Trainer):
    """Trains a [`NextFlowForConditionalGeneration`] on the batches of a [`NextFlowCollator`].

    Logs the text loss, the weighted image loss, each scale's own loss and the accuracies beside the total, in training
    and in evaluation. [`PictureGrids`] shows what it draws.

    Args:
        processing_class: the [`NextFlowProcessor`], from which the collator is made where no `data_collator` is given;
            paths of pictures are then relative to the working directory.

    Raises:
        ValueError: without both, or for other arguments than [`NextFlowTrainingArguments`]; in training, for a row that
            cannot be used; the message has its number.
    """

    args: NextFlowTrainingArguments

    def __init__(self, model: NextFlowForConditionalGeneration, args: NextFlowTrainingArguments, **kwargs):
        if not isinstance(args, NextFlowTrainingArguments):
            raise ValueError(
                f"args must be NextFlowTrainingArguments, which take what TrainingArguments take, got "
                f"{type(args).__name__}."
            )
        collator = kwargs["data_collator"] = kwargs.get("data_collator") or _collator_of(kwargs.get("processing_class"))
        if isinstance(collator, NextFlowCollator):
            collator.processor.check_fits(model.config)
        rows = kwargs.get("train_dataset")
        if hasattr(rows, "__len__"):
            rows = kwargs["train_dataset"] = NumberedRows(rows)
        if args.compile_layers:
            # An adapter may wrap the model.
            backbone = next(module for module in model.modules() if isinstance(module, NextFlowTextModel))
            for layer in backbone.layers:
                layer.compile(dynamic=True)
        if isinstance(collator, NextFlowCollator) and collator.tokenizer_fingerprint is None:
            # The first process's: others may have no weights yet.
            fingerprint = [tokenizer_fingerprint(model.vq_model) if args.process_index == 0 else None]
            collator.tokenizer_fingerprint = broadcast_object_list(fingerprint)[0]
        if args.packing != "padding" and rows is not None:
            if model.config._attn_implementation == "sdpa" and not args.compile_layers:
                # The same attention, at the cost of the samples and not of the whole row. Compiled layers would be
                # compiled anew for each number of samples.
                model.set_attn_implementation(PACKED_SDPA)
            kwargs["train_dataset"] = packed(rows, collator, model.config, args)
        super().__init__(model=model, args=args, **kwargs)
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._evaluated: dict[str, list[torch.Tensor]] = {}

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        # Grouping by length reads the lengths of a `datasets.Dataset` from its column.
        sampler = super()._get_train_sampler(rows.rows if isinstance(rows, NumberedRows) else rows)
        if isinstance(sampler, LengthGroupedSampler):
            # A `datasets` column looks into its file for each length: a minute an epoch for 200,000 rows.
            sampler.lengths = sampler.lengths[:]
        return sampler

    def create_optimizer(self, *args, **kwargs):
        if self.args.muon and self.optimizer is None:
            model = self.accelerator.unwrap_model(self.model)
            self.optimizer = MuonWithAdamW(
                model,
                self.args.learning_rate,
                self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                orthogonalize_dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            )
        return super().create_optimizer(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        # Trained positions are text tokens and codes; `labels` alone do not count the latter.
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        collected = self._parts if self.model.training else self._evaluated
        for name, value in parts_of(outputs).items():
            collected.setdefault(name, []).append(value)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._evaluated.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, values in self._evaluated.items():
            mean = self.accelerator.gather(torch.stack(values)).nanmean()
            output.metrics[f"{metric_key_prefix}_{name}"] = round(float(mean), 4)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            for name, values in self._parts.items():
                logs[name] = round(float(torch.stack(values).nanmean()), 4)
            self._parts.clear()
        super().log(logs, start_time)


def parts_of(outputs: NextFlowCausalLMOutputWithPast) -> dict[str, torch.Tensor]:
    """What a batch tells beside its loss, by the names of the log; NaN where it has nothing of the kind."""
    parts = {name: getattr(outputs, name) for name in ("text_loss", "image_loss", "text_accuracy")}
    for kind, values in (("loss", outputs.scale_losses), ("accuracy", outputs.scale_accuracies)):
        parts |= {f"scale_{scale}_{kind}": value for scale, value in enumerate(values, start=1)}
    return parts
