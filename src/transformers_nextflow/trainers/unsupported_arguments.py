"""Arguments of transformers' `TrainingArguments` and `Trainer` that `NextFlowTrainer` does not support, and why."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments


NO_PREDICTIONS = "with labels only trained positions are projected, so there are no logits to predict or to measure"
# For each argument the values that it may have, and why it may have no others.
UNSUPPORTED = {
    "label_smoothing_factor": ((0.0,), "the loss is fused with the head and takes each label as certain"),
    "use_liger_kernel": ((False,), "Liger has no kernels for NextFlow, whose loss is fused with the head without it"),
    "liger_kernel_config": ((None,), "Liger has no kernels for NextFlow"),
    "average_tokens_across_devices": ((True,), "the loss is the mean over the trained positions of all processes"),
    "use_cache": ((False,), "a pass that computes a loss keeps no cache"),
    "remove_unused_columns": ((False,), "the collator reads whole rows"),
    "label_names": ((["labels"],), "the labels of text and images are in `labels` and `image_labels`"),
    "prediction_loss_only": ((True,), NO_PREDICTIONS),
    "batch_eval_metrics": ((False,), NO_PREDICTIONS),
    "include_for_metrics": (([],), NO_PREDICTIONS),
}
UNSUPPORTED_WITH_PACKING = {
    "train_sampling_strategy": (("random", "sequential"), "packs are alike in length or cost already"),
    "auto_find_batch_size": ((False,), "a batch is one pack; lower packing_budget where memory runs out"),
    "include_num_input_tokens_seen": (("no", "all"), "packs are not padded; take 'all'"),
    "neftune_noise_alpha": ((None,), "its noise depends on the length of a sample, and a pack holds several"),
}
UNSUPPORTED_WITH_MUON = {
    "optim": ((TrainingArguments.optim,), "Muon takes its place"),
    "optim_args": ((None,), "Muon takes the place of `optim`"),
    "optim_target_modules": ((None,), "Muon steps the matrices inside of layers"),
    "adam_epsilon": ((TrainingArguments.adam_epsilon,), "AdamW beside Muon has a fixed one"),
}
UNSUPPORTED_BY_TRAINER = {
    "model_init": "give the model itself",
    "compute_loss_func": "the model computes its loss by itself, fused with the head",
    "compute_metrics": NO_PREDICTIONS,
    "preprocess_logits_for_metrics": NO_PREDICTIONS,
}


def check_training_arguments(args: TrainingArguments):
    """Raises `ValueError` for an unsupported argument of [`NextFlowTrainingArguments`]."""
    tables = [("", UNSUPPORTED)]
    if args.packing != "padding":
        tables.append((f" with packing {args.packing!r}", UNSUPPORTED_WITH_PACKING))
    if args.muon:
        tables.append((" with muon", UNSUPPORTED_WITH_MUON))
    for where, table in tables:
        for name, (allowed, reason) in table.items():
            if (value := getattr(args, name)) not in allowed:
                raise _unsupported(f"{name}={value!r}{where}", reason)
    if args.accelerator_config.dispatch_batches:
        reason = "batches cannot be cut into rows, since a row may have any number of images"
        raise _unsupported("accelerator_config.dispatch_batches=True", reason)
    if not args.accelerator_config.even_batches:
        reason = "processes would wait for ever for one that has a batch less"
        raise _unsupported("accelerator_config.even_batches=False", reason)


def check_trainer_arguments(args: TrainingArguments, arguments: dict[str, Any]):
    """Raises `ValueError` for an argument of `Trainer` that [`NextFlowTrainer`] does not support."""
    for name, reason in UNSUPPORTED_BY_TRAINER.items():
        if arguments.get(name) is not None:
            raise _unsupported(name, reason)
    rows = arguments.get("train_dataset")
    # Streams of `datasets` share their epoch with such workers.
    if args.dataloader_persistent_workers and hasattr(rows, "set_epoch") and hasattr(rows, "__len__"):
        reason = "workers that stay would keep the rows of the first epoch"
        raise _unsupported("dataloader_persistent_workers=True with rows that differ by epochs", reason)
    if args.muon:
        for name in ("optimizers", "optimizer_cls_and_kwargs"):
            if any(part is not None for part in arguments.get(name) or ()):
                raise _unsupported(f"{name} with muon", "Muon takes their place")


def _unsupported(what: str, reason: str) -> ValueError:
    return ValueError(f"NextFlowTrainer does not carry out {what}: {reason}.")
