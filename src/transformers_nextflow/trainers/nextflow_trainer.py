"""Training of the transformer on `Trainer`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..configuration_nextflow import NextFlowConfig
from ..data.mixture import Mixture
from ..data.reconstruction_quality import measure_reconstruction, pixels_of
from ..data.row_codes import TOKENS
from ..data.row_errors import BadRowError
from ..data.rows import NumberedRows
from ..data.stored_sizes import rows_of_sizes
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import ScaleSchedule
from ..sequence.loss import IGNORE_INDEX, LossWeights
from ..utils.older_transformers import SAVES_TENSOR_PARALLEL
from ..utils.user_warnings import warn_user
from ..vision_tokenizer.fingerprint import tokenizer_fingerprint
from .collator import NextFlowCollator
from .device_settings import CheckpointedLayers, choose_attention, compile_layers, use_liger
from .metric_means import MetricMeans, batch_metrics
from .optimizers import MuonWithAdamW
from .packing import PACKINGS, CostModel, PackedDataset, PackedStream
from .runs.averaged_weights import AveragedWeightsMixin
from .runs.checked_arguments import NOT_NEGATIVE, CheckedArguments, Rule
from .runs.epochs import SetEpochCallback
from .runs.finite_training import FiniteTrainingMixin
from .runs.resumable_training import ResumableTrainingMixin
from .runs.trained_weights import TrainedInFloat32Mixin, check_trained_weights, prepare_sharding
from .runs.training_card import TrainingCardMixin
from .runs.training_record import processor_differences
from .throughput import ThroughputMeter
from .unsupported_arguments import check_trainer_arguments, check_training_arguments


logger = logging.get_logger(__name__)
# How many rows are examined to choose the fastest attention.
NUM_EXAMINED_ROWS = 64
# How many images are reconstructed before an adapter is trained on them.
NUM_RECONSTRUCTED_ROWS = 8
# Orders of the rows that depend on their lengths.
NEEDS_LENGTHS = ("group_by_length", "batch_rebalance")


@dataclass
class NextFlowTrainingArguments(CheckedArguments, TrainingArguments):
    """`TrainingArguments` and the arguments that NextFlow adds; see also [`CheckedArguments`]. Unsupported arguments
    raise a `ValueError` that names them (`unsupported_arguments.py`).

    Args:
        muon: step the hidden matrices with Muon and the rest with AdamW, in place of `optim`.
        compile_layers: compile each layer of the backbone separately; default: on CUDA. On CUDA, layers that are not
            compiled use the kernels of Liger if it is installed.
        checkpoint_every: with `gradient_checkpointing`, only every n-th layer discards its activations: less is
            computed twice, at the cost of more memory.
        packing: how the batch of a process is made. "padding": `per_device_train_batch_size` rows, padded to the
            longest. "length": one row of samples with `packing_budget` positions at most. "compute": one row of samples
            whose cost by [`CostModel`] is `packing_budget` at most; a position costs 1, and attention is added.
        packing_budget: see `packing`. It is the same for all processes, so their steps take about the same time.
        text_loss_weight, level_loss_weights, z_loss_weight: see [`LossWeights`]; the second by resolution, such as
            `{1024: 0.5}`.
    """

    muon: bool = field(default=False)
    compile_layers: bool | None = field(default=None)
    checkpoint_every: int = field(default=1)
    packing: str = field(default="padding", metadata={"choices": PACKINGS})
    packing_budget: int | None = field(default=None)
    text_loss_weight: float = field(default=1.0)
    level_loss_weights: dict[int, float] | None = field(default=None)
    z_loss_weight: float = field(default=0.0)
    prediction_loss_only: bool = field(default=True)
    remove_unused_columns: bool = field(default=False)

    rules: ClassVar[tuple[Rule, ...]] = ((("text_loss_weight", "z_loss_weight"), *NOT_NEGATIVE),)

    def __post_init__(self):
        super().__post_init__()
        if not all(isinstance(weight, Real) and weight >= 0 for weight in (self.level_loss_weights or {}).values()):
            raise ValueError(f"level_loss_weights must be at least 0, got {self.level_loss_weights}.")
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
        if self.bf16 and self.device.type == "cpu" and not has_bfloat16_units():
            warn_user(
                "This processor has no bfloat16 units: bf16=True is many times slower than float32; leave it out.",
            )
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}.")
        if self.checkpoint_every > 1 and not self.gradient_checkpointing:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} is for gradient_checkpointing=True; set that.")
        if self.checkpoint_every > 1 and "every_n_layers" in (self.gradient_checkpointing_kwargs or {}):
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} and every_n_layers of activation_checkpointing_kwargs both "
                "say which layers are checkpointed; leave one out."
            )
        self.label_names = self.label_names or ["labels"]
        check_training_arguments(self)
        # Each process reads its own batches of a stream, which cannot be split into rows.
        self.accelerator_config.dispatch_batches = False

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(self.text_loss_weight, self.level_loss_weights or {}, self.z_loss_weight)


def has_bfloat16_units() -> bool:
    """Whether the CPU has units for bfloat16 matrix products; assumed if torch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def packed(
    rows, collator: NextFlowCollator, config: NextFlowConfig, args: NextFlowTrainingArguments
) -> PackedDataset | PackedStream:
    """The packs of a dataset or a stream, according to the arguments."""
    model = CostModel.from_config(config)

    def cost(row: dict) -> float:
        size = collator.size(row)
        return size.length if args.packing == "length" else model.cost(size, config.read_last_scale)

    if not hasattr(rows, "__len__"):
        return PackedStream(rows, cost, args.packing_budget)
    # Packs stay the same while each epoch takes other views of their rows, so they have room for the largest ones.
    views = rows.in_largest_views() if isinstance(rows, NumberedRows) else [rows]
    views = zip(*(_measured(view, collator) for view in views))
    return PackedDataset(rows, lambda own: max(map(cost, own)), args.packing_budget, args.seed, views)


def _measured(rows: NumberedRows, collator: NextFlowCollator) -> Iterable[dict]:
    """What is stored of the sizes of the rows; those of which that is not known as they are."""
    stored = rows_of_sizes(rows)
    if stored is None:
        return rows
    return (sizes if collator.knows_size(sizes) else rows[number] for number, sizes in enumerate(stored))


def _schedules_of(rows, collator: NextFlowCollator) -> list[ScaleSchedule]:
    """The schedules of the images in the first rows; empty for a stream, of which no rows are read."""
    count = min(len(rows), NUM_EXAMINED_ROWS) if hasattr(rows, "__len__") else 0
    return [schedule for index in range(count) for schedule in collator.size(rows[index]).schedules]


def _warn_of_images(model: nn.Module, rows, collator: NextFlowCollator):
    """Warn if the vision tokenizer cannot reconstruct the images of the first rows, which then no adapter can draw."""
    config, image_processor = model.config, collator.processor.image_processor
    stated = config.trained_on or {}
    try:
        sample = [rows[index] for index in range(min(len(rows), NUM_RECONSTRUCTED_ROWS))]
        sample = [row for row in sample if row.get(TOKENS) is None]
        images = list(pixels_of(sample, collator.root, image_processor, NUM_RECONSTRUCTED_ROWS))
    except BadRowError:
        return  # an error with the row's number follows when the row is trained on
    if not images:
        return
    quality = measure_reconstruction(model.vq_model, images, stated.get("lowest_psnr"))
    if not quality.is_sufficient:
        warn_user(
            f"An adapter cannot draw what its tokenizer cannot reconstruct, and {quality}. Train the tokenizer on such "
            "images first, by the recipe tokenizer (docs/own_images.md).",
        )


def _mixture_in(rows) -> Mixture | None:
    """The mixture from which packs are made, or that is the dataset itself."""
    while rows is not None and not isinstance(rows, Mixture):
        rows = getattr(rows, "rows", None)
    return rows


def _collator_of(processor: NextFlowProcessor | None) -> NextFlowCollator:
    if not isinstance(processor, NextFlowProcessor):
        raise ValueError(
            "Give processing_class, the checkpoint's NextFlowProcessor, or data_collator, a NextFlowCollator; got "
            f"{processor!r} and None."
        )
    return NextFlowCollator(processor)


def _fit_collator(collator: NextFlowCollator, model: nn.Module, args: TrainingArguments):
    """Fill in the settings of a collator that follow from the model. Raises `ValueError` for a processor of another
    model.
    """
    collator.processor.check_fits(model.config)
    if collator.tokenizer_fingerprint is None:
        # From the first process, since others may have no weights yet.
        fingerprint = [tokenizer_fingerprint(model.vq_model) if args.process_index == 0 else None]
        collator.tokenizer_fingerprint = broadcast_object_list(fingerprint)[0]
    if collator.codebook_size is None:
        collator.codebook_size = model.config.vq_config.codebook_size
    if collator.max_positions is None:
        collator.max_positions = model.config.text_config.max_position_embeddings


def _processor_to_save(collator, processor: NextFlowProcessor | None) -> NextFlowProcessor | None:
    """The processor to save with the model, that of the collator: without one no pipeline loads a checkpoint."""
    own = getattr(collator, "processor", None)
    if processor is not None and own is not None and (names := processor_differences(processor, own)):
        raise ValueError(
            f"processing_class and the data_collator's processor differ in {', '.join(names)}; the one that makes the "
            "batches is to be saved with the model. Leave processing_class out."
        )
    return processor or own


class NextFlowTrainer(
    TrainingCardMixin, TrainedInFloat32Mixin, ResumableTrainingMixin, AveragedWeightsMixin, FiniteTrainingMixin, Trainer
):
    """Trains a [`NextFlowForConditionalGeneration`] on the batches of a [`NextFlowCollator`].

    In training and evaluation it logs the total loss, the text loss, the weighted image loss, the loss of each scale
    and the accuracies. [`ImageGrids`] draws images during training.

    Args:
        processing_class: the [`NextFlowProcessor`] from which the collator is made if no `data_collator` is given;
            paths of images are then relative to the working directory. The collator's processor is saved with the
            model.

    Raises:
        ValueError: if both are missing, for a `processing_class` that differs from the collator's, for other arguments
            than [`NextFlowTrainingArguments`], or for trainable weights that are not float32; in training, for a row
            that cannot be used, with its number in the message.
    """

    args: NextFlowTrainingArguments

    def train(self, *args, **kwargs):
        """As in [`ResumableTrainingMixin`]. Removes the statement `trained_on` about an earlier training from the
        config, unless an adapter is trained, which does not change the model.
        """
        if not is_peft_model(self.model) and getattr(self.model.config, "trained_on", None) is not None:
            logger.warning(
                "What the config says the model was trained on (trained_on) is removed, since it no longer holds."
            )
            self.model.config.trained_on = None
        return super().train(*args, **kwargs)

    def __init__(self, model: NextFlowForConditionalGeneration, args: NextFlowTrainingArguments, **kwargs):
        if not isinstance(args, NextFlowTrainingArguments):
            raise ValueError(
                f"args must be NextFlowTrainingArguments, which take what TrainingArguments take, got "
                f"{type(args).__name__}."
            )
        check_trainer_arguments(args, kwargs)
        if (model.tp_size or 1) > 1 and not SAVES_TENSOR_PARALLEL:
            raise ValueError(
                f"The model is sharded over {model.tp_size} processes (tensor parallel), and transformers "
                f"{transformers.__version__} cannot save it after a training; install a newer transformers."
            )
        collator = kwargs["data_collator"] = kwargs.get("data_collator") or _collator_of(kwargs.get("processing_class"))
        kwargs["processing_class"] = _processor_to_save(collator, kwargs.get("processing_class"))
        if isinstance(collator, NextFlowCollator):
            _fit_collator(collator, model, args)
        rows = kwargs.get("train_dataset")
        if rows is not None:
            check_trained_weights(model, args)
        if hasattr(rows, "__len__") and not isinstance(rows, PackedDataset):
            rows = kwargs["train_dataset"] = NumberedRows(rows)
        on_cuda = args.device.type == "cuda"
        if on_cuda if args.compile_layers is None else args.compile_layers:
            compile_layers(model)
        elif on_cuda:
            use_liger(model)
        if is_peft_model(model) and isinstance(rows, NumberedRows) and isinstance(collator, NextFlowCollator):
            _warn_of_images(model, rows, collator)
        if args.packing != "padding" and rows is not None:
            choose_attention(model, args.device, _schedules_of(rows, collator))
            kwargs["train_dataset"] = packed(rows, collator, model.config, args)
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process has {args.n_gpu} GPUs, over which batches of images cannot be divided; start one process "
                "for each with torchrun or accelerate launch, or show it one by CUDA_VISIBLE_DEVICES."
            )
        if isinstance(rows, NumberedRows):
            self.add_callback(SetEpochCallback(rows))
        if args.checkpoint_every > 1:
            self.add_callback(CheckpointedLayers(args.checkpoint_every))
        self._trained, self._evaluated = MetricMeans(), MetricMeans()
        config = model.config
        args.loss_weights.check_levels(config)
        self._throughput = ThroughputMeter(config, args.packing, args.packing_budget)
        self._new_rows = math.inf
        evaluated = self.eval_dataset
        for rows in evaluated.values() if isinstance(evaluated, dict) else [evaluated]:
            self._check_evaluated(rows)
        prepare_sharding(self)
        if (mixture := _mixture_in(self.train_dataset)) is not None:
            share = self.accelerator.process_index // self.get_tp_size()
            mixture.take_share(share, self._num_shares, args.dataloader_num_workers)

    def get_train_dataloader(self):
        if _mixture_in(self.train_dataset) is None:
            return super().get_train_dataloader()
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        # Not prepared by accelerate, with which each process would read the rows of all processes.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        # Lengths are read from a column of the `datasets.Dataset` that rows are taken from by the same numbers.
        while hasattr(rows, "rows") and not isinstance(rows, PackedDataset):
            rows = rows.rows
        strategy, column = self.args.train_sampling_strategy, self.args.length_column_name
        if strategy in NEEDS_LENGTHS and hasattr(rows, "__len__") and column not in getattr(rows, "column_names", ()):
            raise ValueError(
                f"train_sampling_strategy={strategy!r} needs a column {column!r} in a data set of `datasets` "
                "(docs/data.md, save_to_disk); give the length of each row there, or leave it out."
            )
        sampler = super()._get_train_sampler(rows)
        if isinstance(sampler, LengthGroupedSampler):
            # A column of `datasets` reads its file for each length: a minute in each epoch for 200,000 rows.
            sampler.lengths = sampler.lengths[:]
        return sampler

    def create_optimizer(self, *args, **kwargs):
        if self.args.muon and self.optimizer is None:
            if self.is_fsdp_enabled or self.get_tp_size() > 1:
                raise ValueError(
                    "muon needs complete weight matrices, and these are sharded (FSDP, tensor parallel); set optim."
                )
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
        # `Trainer` counts labels over all processes; the collator gives one label to each trained position.
        counts = [self.model.num_trained_positions(**batch) for batch in batch_samples]
        labels = [torch.zeros(int(count), dtype=torch.long) for count in counts]
        return super()._get_num_items_in_batch([{"labels": one, "shift_labels": one} for one in labels], device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = inputs | {"loss_weights": self.args.loss_weights}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        losses = {name: part for name, part in batch_metrics(outputs).items() if name.endswith("_loss")}
        # The mean of nothing is NaN.
        self.note({name: mean.where(count > 0, 0) for name, (mean, count) in losses.items()})
        (self._trained if self.model.training else self._evaluated).add(outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            # `Trainer`'s own loss is the mean of the steps'.
            logs = self._trained.pop(self.accelerator.gather) | logs
            logs |= self._throughput.pop_metrics(self.accelerator.gather, self.args.device)
        super().log(logs, start_time)

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        return super().get_batch_samples(self._throughput.time_batches(epoch_iterator), *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._throughput.stop()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # Evaluation -------------------------------------------------------------------------------------------------------

    @property
    def _num_shares(self) -> int:
        """The number of processes, or of groups of processes that share one model, among which a batch is divided."""
        return self.accelerator.num_processes // self.get_tp_size()

    def _check_evaluated(self, rows):
        if self._num_shares > 1 and isinstance(rows, IterableDataset):
            raise ValueError(
                "A stream cannot be evaluated in several processes: it is not known which rows fill up its last batch "
                "and would count twice. Give an eval_dataset with a length."
            )

    @contextmanager
    def _dropping_no_rows(self):
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_eval_dataloader(self, eval_dataset=None):
        with self._dropping_no_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._dropping_no_rows():
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """The metrics are means over all trained positions of the dataset, whatever the size of its batches."""
        self._check_evaluated(dataloader.dataset)
        self._new_rows = len(dataloader.dataset) if self._num_shares > 1 else math.inf
        self._evaluated = MetricMeans()  # an earlier evaluation may have been interrupted
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._evaluated.pop(self.accelerator.gather)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        # The last batches are filled up with rows of the first batch, which must not count twice.
        rows = len(inputs["input_ids"])
        own = self._new_rows - rows * (self.accelerator.process_index // self.get_tp_size())
        self._new_rows -= rows * self._num_shares
        if own < rows:
            repeated = torch.arange(rows, device=inputs["labels"].device) >= own
            inputs = inputs | {"labels": inputs["labels"].masked_fill(repeated[:, None], IGNORE_INDEX)}
        return super().prediction_step(model, inputs, *args, **kwargs)
