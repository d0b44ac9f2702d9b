"""A step in parts, micro-batches, processes or packs, trains as the undivided batch does, and an evaluation tells the
same whatever the size of its batches.
"""

import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from processes import in_two_processes
from test_packing import Stream, chat
from test_trainer import codes, conversation, drawing, question, text
from tiny import free_port, tiny_model, tiny_processor
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

from transformers_nextflow.adapters import lora_config
from transformers_nextflow.trainers import (
    NextFlowCollator,
    NextFlowTrainer,
    NextFlowTrainingArguments,
    NextFlowVQTrainingArguments,
    PackedDataset,
)
from transformers_nextflow.trainers.recipe_data import StageRows


KINDS = ("text", "images", "mixture")
TEXTS = [chat("how many?", "one"), chat("one", "two blue squares and a green star"), chat("a star", "a red circle")]


def rows_of(kind: str, processor) -> list[dict]:
    """Rows with unlike numbers of trained positions."""
    tall = processor.image_processor.schedule_for_grid(7, 2)
    edit = {
        "messages": conversation([{"type": "image"}, text("one")], [{"type": "image"}, text("a star")]),
        "image_tokens": [codes(5, tall.num_tokens), codes(6)],
        "image_grids": [list(tall.final_grid), [4, 4]],
    }
    wide = drawing("two", 8) | {"image_tokens": [codes(8, tall.num_tokens)], "image_grids": [list(tall.final_grid)]}
    images = [drawing("a red circle", 1), wide, edit]
    mixture = [images[0], TEXTS[0], images[2], question("how many?", "two", 2), TEXTS[1]]
    return {"text": TEXTS, "images": images, "mixture": mixture}[kind]


def packs_of(rows: list[dict], processor) -> PackedDataset:
    """Two packs of unlike size."""
    collator = NextFlowCollator(processor)
    lengths = [collator.size(row).length for row in rows]
    packs = PackedDataset(rows, lambda row: collator.size(row).length, max(max(lengths), sum(lengths) - min(lengths)))
    assert len(packs) == 2
    return packs


class ReadyPacks(PackedDataset):
    """Packs that were made elsewhere."""

    def __init__(self, packs: list[list[dict]]):
        self.rows, self.packs = [row for pack in packs for row in pack], []
        for pack in packs:
            start = sum(map(len, self.packs))
            self.packs.append(range(start, start + len(pack)))


def distributed() -> dict:
    # Who waits for ever fails.
    return {"ddp_backend": "gloo", "ddp_timeout": 60} if "WORLD_SIZE" in os.environ else {}


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = [*getattr(self, "kept", []), gradients_of(model)]


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(folder, model, data, collator, kind=NextFlowTrainer, **options) -> tuple[list[dict], list[dict]]:
    """The gradients of each step, and the log."""
    values = {
        "learning_rate": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        # More than there are: a step takes what the epoch has.
        "gradient_accumulation_steps": 8,
        "max_grad_norm": 0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    if kind is Trainer:
        options["remove_unused_columns"] = False
    options |= distributed()
    arguments = (TrainingArguments if kind is Trainer else NextFlowTrainingArguments)(str(folder), **(values | options))
    callback = KeepGradients()
    trainer = kind(model, arguments, train_dataset=data, data_collator=collator, callbacks=[callback])
    trainer.train()
    return callback.kept, trainer.state.log_history


def undivided(model, batch) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    return expected


def relative_difference(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert gradients.keys() == expected.keys()
    both = [torch.cat([values[name].flatten() for name in expected]).double() for values in (gradients, expected)]
    return float((both[0] - both[1]).norm() / both[1].norm())


# How many positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_last_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_positions_are_counted_as_the_loss_divides_and_have_a_label_each(kind, read_last_scale):
    model, processor = tiny_model(read_last_scale=read_last_scale), tiny_processor(read_last_scale=read_last_scale)
    collator, rows = NextFlowCollator(processor, pad_to_multiple_of=32), rows_of(kind, processor)
    for batch in (collator(rows), collator([rows])):
        with torch.no_grad():
            output = model(**batch)
        count = int(model.num_trained_positions(**batch))
        assert count == int(output.num_trained.sum()) == int((batch["labels"] != -100).sum())
        total = output.text_loss.nan_to_num() * output.num_trained[0]
        total += output.image_loss.nan_to_num() * output.num_trained[1:].sum()
        torch.testing.assert_close(total / count, output.loss)
        assert count == sum(collator.size(row).trained for row in rows)


def test_labels_that_nothing_predicts_are_not_counted_and_counting_them_is_warned_of():
    model, processor = tiny_model(read_last_scale=True), tiny_processor(read_last_scale=True)
    batch = NextFlowCollator(processor)(rows_of("mixture", processor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch, num_items_in_batch=torch.tensor(100))
    # All of them, on the left of the pads too, where other collators put them.
    batch = {name: value.flip(1) if name in ("attention_mask",) else value for name, value in batch.items()}
    longest = batch["attention_mask"].shape[1]
    for row, mask in enumerate(batch["attention_mask"]):
        batch["input_ids"][row] = batch["input_ids"][row].roll(longest - int(mask.sum()))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad(), pytest.warns(UserWarning, match="more or fewer labels than trained positions"):
        output = model(**batch, num_items_in_batch=torch.tensor(100))
    assert (
        int(model.num_trained_positions(**batch)) == int(output.num_trained.sum()) < int((batch["labels"] >= 0).sum())
    )


def test_a_step_on_nothing_has_a_loss_of_zero():
    model, processor = tiny_model(), tiny_processor()
    batch = NextFlowCollator(processor)(rows_of("mixture", processor))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert float(model(**batch, num_items_in_batch=torch.tensor(0)).loss.detach()) == 0


# In one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", [NextFlowTrainer, Trainer])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "kind, read_last_scale", [("text", False), ("images", False), ("mixture", False), ("mixture", True)]
)
def test_micro_batches_have_the_gradient_of_the_undivided_batch(kind, read_last_scale, packed, trainer, tmp_path):
    model, processor = tiny_model(read_last_scale=read_last_scale), tiny_processor(read_last_scale=read_last_scale)
    collator, rows = NextFlowCollator(processor), rows_of(kind, processor)
    expected = undivided(model, collator([rows] if packed else rows))
    data = packs_of(rows, processor) if packed else rows
    (gradients,), log = train(tmp_path, model, data, collator, trainer)
    assert relative_difference(gradients, expected) < 1e-6
    with torch.no_grad():
        output = model(**collator(rows))
    assert log[0]["loss"] == pytest.approx(float(output.loss), rel=1e-5)


@pytest.mark.parametrize("trainer", [NextFlowTrainer, Trainer])
def test_micro_batches_of_an_adapter_have_the_gradient_of_the_undivided_batch(trainer, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = tiny_model(), tiny_processor()
    config = lora_config(model, rank=2, init_lora_weights=False, new_token_ids=[20])
    model = peft.get_peft_model(model, config)
    collator, rows = NextFlowCollator(processor), rows_of("mixture", processor)
    (gradients,), _ = train(tmp_path, model, rows, collator, trainer)
    assert relative_difference(gradients, undivided(model, collator(rows))) < 1e-6


def test_the_last_micro_batches_of_an_epoch_are_a_batch_of_their_own(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    collator, rows = NextFlowCollator(processor), rows_of("mixture", processor)
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    steps, _ = train(tmp_path, model, rows, collator, gradient_accumulation_steps=2, **options)
    assert len(steps) == 2
    for gradients, part in zip(steps, (rows[:4], rows[4:])):
        assert relative_difference(gradients, undivided(model, collator(part))) < 1e-6


@pytest.mark.filterwarnings("ignore:A batch has more or fewer labels")  # of the other collator
def test_labels_of_another_collator_are_counted_as_they_are_trained(tmp_path):
    model, processor = tiny_model(read_last_scale=True), tiny_processor(read_last_scale=True)
    rows = rows_of("mixture", processor)

    def collate(rows):
        batch = NextFlowCollator(processor)(rows)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    (gradients,), _ = train(tmp_path, model, rows, collate)
    assert relative_difference(gradients, undivided(model, collate(rows))) < 1e-6


def test_the_log_has_means_over_all_trained_positions_of_a_step(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    collator, rows = NextFlowCollator(processor), rows_of("mixture", processor)
    _, log = train(tmp_path, model, rows, collator)
    with torch.no_grad():
        output = model.train()(**collator(rows))
    assert log[0]["text_loss"] == pytest.approx(float(output.text_loss), rel=1e-5)
    assert log[0]["image_loss"] == pytest.approx(float(output.image_loss), rel=1e-5)
    for scale, mean in enumerate(output.scale_losses.tolist(), start=1):
        assert log[0][f"scale_{scale}_loss"] == pytest.approx(mean, rel=1e-5)
        assert log[0][f"scale_{scale}_accuracy"] == pytest.approx(float(output.scale_accuracies[scale - 1]), rel=1e-5)


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluation(folder, model, rows, processor, **options) -> dict[str, float]:
    values = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    args = NextFlowTrainingArguments(str(folder), **values, **options, **distributed())
    trainer = NextFlowTrainer(model, args, data_collator=NextFlowCollator(processor))
    metrics = trainer.evaluate(rows)
    return {name: value for name, value in metrics.items() if name.endswith(("loss", "accuracy"))}


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_does_not_depend_on_the_size_of_its_batches(kind, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    rows = rows_of(kind, processor)
    with torch.no_grad():
        output = model(**NextFlowCollator(processor)(rows))
    for size in (1, 2, len(rows)):
        for drop_last in (False, True):
            options = {"per_device_eval_batch_size": size, "dataloader_drop_last": drop_last}
            metrics = evaluation(tmp_path, model, rows, processor, **options)
            assert metrics["eval_loss"] == pytest.approx(float(output.loss), rel=1e-5)
            assert metrics["eval_image_loss"] == pytest.approx(float(output.image_loss), rel=1e-5, nan_ok=True)
            assert metrics["eval_text_loss"] == pytest.approx(float(output.text_loss), rel=1e-5, nan_ok=True)
            losses = [metrics[f"eval_scale_{scale}_loss"] for scale in range(1, 5)]
            assert losses == pytest.approx(output.scale_losses.tolist(), rel=1e-5, nan_ok=True)
            accuracies = [metrics[f"eval_scale_{scale}_accuracy"] for scale in range(1, 5)]
            assert accuracies == pytest.approx(output.scale_accuracies.tolist(), rel=1e-5, nan_ok=True)


def test_a_prediction_has_the_metrics_of_an_evaluation(tmp_path):
    processor = tiny_processor()
    rows = rows_of("mixture", processor)
    args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=2)
    trainer = NextFlowTrainer(tiny_model(), args, data_collator=NextFlowCollator(processor))
    predicted = trainer.predict(rows)
    assert predicted.predictions is None
    assert predicted.metrics["test_loss"] == trainer.evaluate(rows)["eval_loss"]


# In two processes -----------------------------------------------------------------------------------------------------


def sides_by_side(processor) -> list[dict]:
    """Rows of which the first process gets those with images, and the second those without."""
    images = rows_of("images", processor)
    return [images[0], TEXTS[0], images[2], TEXTS[1]]


CASES = {
    "padded": {},
    "Trainer": {"kind": Trainer},
    "packed": {},
    "stream": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_accumulation_steps": 1, "max_steps": 2},
    "packed, checkpointing": {"gradient_checkpointing": True, "max_steps": 2},
}


def in_two(folder, name: str, processor) -> tuple[list[dict], list[dict]]:
    """The gradients of each step of a case, and its log."""
    images, text, more_images, more_text = data = sides_by_side(processor)
    if "packed" in name:
        data = ReadyPacks([[images, more_images], [text, more_text]])
    data = Stream(data) if name == "stream" else data
    return train(folder, tiny_model(read_last_scale=True), data, NextFlowCollator(processor), **CASES[name])


def sharded_step(rank: int, processor) -> dict[str, torch.Tensor]:
    """The gradients under FSDP2, where the first process has an image and the second one has none."""
    collator, rows = NextFlowCollator(processor), sides_by_side(processor)[:2]
    mesh, model = torch.distributed.init_device_mesh("cpu", (2,)), tiny_model(read_last_scale=True).train()
    count = model.num_trained_positions(**collator(rows))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The mean over processes is to be the sum.
    (2 * model(**collator([rows[rank]]), num_items_in_batch=count).loss).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def _one_of_two(rank: int, port: int, folder: str):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processor = tiny_processor(read_last_scale=True)
    for name in CASES:
        torch.save(in_two(folder, name, processor), f"{folder}/{name}-{rank}.pt")
    torch.save(sharded_step(rank, processor), f"{folder}/sharded-{rank}.pt")
    rows, metrics = rows_of("mixture", processor), {}
    for size in (1, 2, 4):
        model = tiny_model(read_last_scale=True)
        metrics[size] = evaluation(folder, model, rows, processor, per_device_eval_batch_size=size)
    with pytest.raises(ValueError, match="A stream cannot be evaluated in several processes"):
        evaluation(folder, model, Stream(rows), processor)
    if rank == 0:
        with open(f"{folder}/metrics.json", "w") as file:
            json.dump(metrics, file)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(_one_of_two, free_port(), str(folder))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradient_of_the_undivided_batch(name, two_processes):
    model, processor = tiny_model(read_last_scale=True), tiny_processor(read_last_scale=True)
    collator, rows = NextFlowCollator(processor), sides_by_side(processor)
    (steps, log), (others, _) = (torch.load(two_processes / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    parts = [rows[:2], rows[2:]] if name == "checkpointing" else [rows] * len(steps)
    assert len(steps) == len(others) == len(parts)
    for gradients, other, entry, part in zip(steps, others, log, parts):
        assert all(torch.equal(gradient, other[name]) for name, gradient in gradients.items())
        assert relative_difference(gradients, undivided(model, collator(part))) < 1e-6
        with torch.no_grad():
            output = model(**collator(part))
        assert entry["loss"] == pytest.approx(float(output.loss), rel=1e-5)
        if name != "Trainer":
            assert entry["text_loss"] == pytest.approx(float(output.text_loss), rel=1e-5)
            assert entry["scale_3_accuracy"] == pytest.approx(float(output.scale_accuracies[2]), rel=1e-5)


def test_two_processes_with_parts_of_the_weights_have_the_gradient_of_the_undivided_batch(two_processes):
    model, processor = tiny_model(read_last_scale=True), tiny_processor(read_last_scale=True)
    expected = undivided(model, NextFlowCollator(processor)(sides_by_side(processor)[:2]))
    for rank in (0, 1):
        gradients = torch.load(two_processes / f"sharded-{rank}.pt", weights_only=True)
        assert relative_difference(gradients, expected) < 1e-6


def test_two_processes_evaluate_every_row_once(two_processes, tmp_path):
    processor = tiny_processor(read_last_scale=True)
    rows, model = rows_of("mixture", processor), tiny_model(read_last_scale=True)
    expected = evaluation(tmp_path, model, rows, processor)
    for size, metrics in json.loads((two_processes / "metrics.json").read_text()).items():
        assert metrics == pytest.approx(expected, rel=1e-5), size


# Every parameter takes part -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["text", "images", "images of one scale"])
def test_every_trainable_parameter_has_a_gradient_in_every_batch(kind, packed, monkeypatch):
    levels = {"levels": [[4, 1], [16, 4]]}
    model, processor = tiny_model(vq_config=levels), tiny_processor(levels=levels["levels"])
    small = drawing("one", 1) | {"image_tokens": [[3]], "image_grids": [[1, 1]]}
    rows = [small, small] if kind == "images of one scale" else rows_of(kind, processor)
    batch = NextFlowCollator(processor)([rows] if packed else rows)
    gradients = undivided(model, batch)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trainable
    loss = model(**batch).loss.detach()
    if kind == "text":
        unused = {name for name in trainable if "visual_embedding" in name}
        assert not any(gradients.pop(name).any() for name in unused)
        embed = model.model.language_model.embed_tokens
        monkeypatch.setattr(model.model, "embed_sequence", lambda input_ids, *_: embed(input_ids))
        others = undivided(model, batch)
        assert others.keys() == gradients.keys() and torch.equal(model(**batch).loss.detach(), loss)
        assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_text_is_read_without_the_visual_embedding_where_no_gradient_is_made(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.model.visual_embedding, "forward", None)
    with torch.no_grad():
        assert model(torch.tensor([[20, 21]])).logits.shape == (1, 2, 352)


# What is not carried out ----------------------------------------------------------------------------------------------

PACKED = {"packing": "length", "packing_budget": 100, "per_device_train_batch_size": 1}


@pytest.mark.parametrize(
    "options, name",
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config="),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False"),
        ({"use_cache": True}, "use_cache=True"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"label_names": ["image_labels"]}, "label_names="),
        ({"prediction_loss_only": False}, "prediction_loss_only=False"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics="),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False"),
        (PACKED | {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=.* with packing 'length'"),
        (PACKED | {"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy=.* with packing 'length'"),
        (PACKED | {"auto_find_batch_size": True}, "auto_find_batch_size=True with packing"),
        (PACKED | {"include_num_input_tokens_seen": "non_padding"}, "include_num_input_tokens_seen="),
        (PACKED | {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 with packing"),
        ({"muon": True, "optim": "sgd"}, "optim=.* with muon"),
        ({"muon": True, "optim_args": "a=1"}, "optim_args='a=1' with muon"),
        ({"muon": True, "adam_epsilon": 1e-4}, "adam_epsilon=0.0001 with muon"),
    ],
)
def test_an_argument_that_is_not_carried_out_is_refused_by_name(options, name, tmp_path):
    with pytest.raises(ValueError, match=f"NextFlowTrainer does not carry out {name}|{name}.*: "):
        NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize(
    "name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"]
)
def test_an_argument_of_the_trainer_that_is_not_carried_out_is_refused_by_name(name, tmp_path):
    args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=f"does not carry out {name}: "):
        NextFlowTrainer(tiny_model(), args, processing_class=tiny_processor(), **{name: lambda *_, **__: None})


def test_workers_that_stay_are_refused_for_rows_that_differ_by_epochs(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
    rows, processor = [drawing("one", 1)], tiny_processor()
    NextFlowTrainer(tiny_model(), args, train_dataset=rows, processing_class=processor)
    with pytest.raises(ValueError, match="dataloader_persistent_workers=True with rows that differ by epochs: workers"):
        NextFlowTrainer(tiny_model(), args, train_dataset=StageRows(rows, processor), processing_class=processor)


def test_optimizers_beside_muon_are_refused(tmp_path):
    args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], muon=True)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for options in ({"optimizers": (optimizer, None)}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}):
        with pytest.raises(ValueError, match="does not carry out optimizer.* with muon"):
            NextFlowTrainer(model, args, processing_class=tiny_processor(), **options)


def test_one_process_with_several_gpus_and_divided_sequences_are_refused(tmp_path, monkeypatch):
    args = NextFlowTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    args._n_gpu = 2
    monkeypatch.setattr(NextFlowTrainingArguments, "n_gpu", property(lambda self: self._n_gpu))
    with pytest.raises(ValueError, match="One process has 2 GPUs"):
        NextFlowTrainer(tiny_model(), args, processing_class=tiny_processor())
    for trained in (args, NextFlowVQTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])):
        trained.parallelism_config = SimpleNamespace(cp_size=2)
        with pytest.raises(ValueError, match="parallelism_config.cp_size=2: sequences are laid out as a whole"):
            trained.check_values()


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_a_loss_that_is_not_the_models_is_refused_in_the_plain_trainer(option, tmp_path):
    processor = tiny_processor()
    values = {"use_cpu": True, "report_to": [], "remove_unused_columns": False, "max_steps": 1, "save_strategy": "no"}
    smoothing = {"label_smoothing_factor": 0.1} if option == "label_smoothing_factor" else {}
    own = {} if smoothing else {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum()}
    args = TrainingArguments(str(tmp_path), **values, **smoothing)
    rows = rows_of("mixture", processor)
    trainer = Trainer(tiny_model(), args, train_dataset=rows, data_collator=NextFlowCollator(processor), **own)
    with pytest.raises(ValueError, match="num_items_in_batch came without labels"):
        trainer.train()
