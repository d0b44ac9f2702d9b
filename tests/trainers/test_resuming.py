"""Resuming from a checkpoint: what has to be the same, when a training is finished, and whose folder it is."""

import json
import logging
import shutil
from pathlib import Path
from unittest.mock import Mock

import peft
import pytest
import torch
from command_line import run_command
from safetensors.torch import load_file
from test_grpo import TEXTS, lora
from test_grpo import make_trainer as make_grpo_trainer
from test_recipes import FOLDER, SMALL, write_rows
from test_trainer import Killed, drawing, question, training_arguments
from test_vq_trainer import Teacher, tiny_vq_model
from test_vq_trainer import make_trainer as make_vq_trainer
from test_vq_trainer import rows as vq_rows
from tiny import PATCH_SIZE, tiny_model, tiny_processor
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoProcessor, TrainerCallback, TrainerState

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowPipeline
from transformers_nextflow.adapters import lora_config
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer
from transformers_nextflow.trainers.runs import training_record
from transformers_nextflow.trainers.runs.atomic_checkpoints import SUPERSEDED, AtomicCheckpointMixin
from transformers_nextflow.trainers.runs.training_record import RECORD_FILE
from transformers_nextflow.utils.folder_lock import LOCK_FILE, lock_folder


STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
DATA = [drawing("one", 1), question("how many circles are there?", "one", 2), drawing("a red circle", 3)]


def make(folder, model=None, data=DATA, patch_size=PATCH_SIZE, **options) -> NextFlowTrainer:
    args = training_arguments(folder, DATA, **(STEPS | {"lr_scheduler_type": "cosine"} | options))
    collator = NextFlowCollator(tiny_processor(patch_size=patch_size))
    return NextFlowTrainer(model or tiny_model(), args, train_dataset=data, data_collator=collator)


def make_vq(folder, **options):
    return make_vq_trainer(folder, **(STEPS | options))


def make_grpo(folder, **options):
    return make_grpo_trainer(folder, **(STEPS | {"per_device_train_batch_size": 8} | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of four steps, with the checkpoints 2 and 4; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    make(folder).train()
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def trained_vq(tmp_path_factory):
    """The same of the tokenizer."""
    folder = tmp_path_factory.mktemp("trained-vq")
    make_vq(folder).train()
    return folder


@pytest.fixture(scope="module")
def trained_grpo(tmp_path_factory):
    """The same of RL."""
    folder = tmp_path_factory.mktemp("trained-grpo")
    make_grpo(folder).train()
    return folder


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, some[name]) for name, value in others.items())


# Finished -------------------------------------------------------------------------------------------------------------


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, *args, **kwargs):
        self.seen.append("begin")

    def on_evaluate(self, *args, **kwargs):
        self.seen.append("evaluate")


@pytest.mark.parametrize("make", [make, make_vq, make_grpo], ids=["NextFlow", "VQ", "GRPO"])
def test_a_training_that_stands_at_its_last_step_is_left_as_it_is(make, tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    expected, names = weights(trainer), sorted(path for path in tmp_path.rglob("*"))
    times = [path.stat().st_mtime_ns for path in names]
    resumed, events = make(tmp_path), Events()
    resumed.args.eval_on_start, resumed.eval_dataset = True, resumed.train_dataset
    resumed.args.resume_with_changes = True  # for the evaluation
    resumed.add_callback(events)
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == resumed.state.global_step == 4 and not events.seen
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert output.training_loss == pytest.approx(sum(losses) / 4)
    assert equal(weights(resumed), expected)
    assert sorted(path for path in tmp_path.rglob("*")) == names
    assert [path.stat().st_mtime_ns for path in names] == times


def test_so_is_one_that_counts_in_epochs_and_a_part_of_one(tmp_path):
    for epochs, steps in ((2.0, 6), (0.5, 2)):
        options = {"max_steps": -1, "num_train_epochs": epochs}
        make(tmp_path / str(epochs), **options).train()
        resumed = make(tmp_path / str(epochs), **options)
        assert resumed.train(resume_from_checkpoint=True).global_step == steps
        assert (tmp_path / str(epochs) / f"checkpoint-{steps}").exists()
        assert not (tmp_path / str(epochs) / f"checkpoint-{steps + 1}").exists()


def test_a_longer_training_goes_on_where_it_is_asked_for(folder):
    with pytest.raises(
        ValueError, match="checkpoint-4 would give another result .*: max_steps was 4 and is 6. Resume with"
    ):
        make(folder, max_steps=6).train(resume_from_checkpoint=True)
    output = make(folder, max_steps=6, resume_with_changes=True).train(resume_from_checkpoint=True)
    assert output.global_step == 6 and (folder / "checkpoint-6").exists()


def test_no_steps_are_none(tmp_path):
    model = tiny_model()
    assert make(tmp_path, model, max_steps=0).train().global_step == 0
    assert equal(model.state_dict(), tiny_model().state_dict()) and not list(tmp_path.iterdir())


def test_the_best_weights_and_averages_are_those_of_a_finished_training(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "ema_decay": 0.5}
    options |= {"eval_strategy": "steps", "eval_steps": 2}

    def train(checkpoint=None):
        args = training_arguments(tmp_path, DATA, **(STEPS | options))
        trainer = NextFlowTrainer(
            tiny_model(), args, train_dataset=DATA, eval_dataset=DATA, processing_class=tiny_processor()
        )
        trainer.evaluate = lambda *_, **__: {"eval_loss": float(trainer.state.global_step)}
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer), trainer._averages

    best, averages = train()
    assert equal(best, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert equal(averages, load_file(tmp_path / "checkpoint-2" / "ema.safetensors"))
    again, averages_again = train(checkpoint=True)
    assert equal(again, best) and equal(averages_again, averages)


def test_the_best_averages_need_checkpoints_that_hold_them(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_only_model": True}
    training_arguments(tmp_path, DATA, **(STEPS | options))
    with pytest.raises(ValueError, match="the averages .* of the best checkpoint too; leave out save_only_model"):
        training_arguments(tmp_path, DATA, **(STEPS | options | {"ema_decay": 0.5}))


@pytest.mark.parametrize("writes", [True, False], ids=["first process", "another process"])
def test_every_process_knows_the_place_of_the_best_checkpoint(writes, tmp_path):
    class Saving:
        """What `Trainer` does in every process; the checkpoint is there in all of them."""

        def _get_output_dir(self, trial):
            return str(tmp_path)

        def _save_checkpoint(self, model, trial):
            checkpoint = Path(self._get_output_dir(trial)) / "checkpoint-2"
            checkpoint.mkdir(parents=True)
            self.state.best_model_checkpoint = str(checkpoint)

    class Process(AtomicCheckpointMixin, Saving):
        args, accelerator = Mock(should_save=writes, save_total_limit=None), Mock()
        state = TrainerState(global_step=2)

    process = Process()
    process._save_checkpoint(None, None)
    assert process.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    if writes:
        state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


# What has changed -----------------------------------------------------------------------------------------------------


OTHER = question("how many circles are there?", "two", 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 1 and is 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"packing": "length", "packing_budget": 200}, 'packing was "padding" and is "length"'),
        ({"muon": True}, "muon was false and is true"),
        ({"weight_decay": 0.1}, "weight_decay was 0.0 and is 0.1"),
        ({"lr_scheduler_type": "linear"}, 'lr_scheduler_type was "cosine" and is "linear"'),
        ({"warmup_steps": 2}, "warmup_steps was 0 and is 2"),
        ({"max_steps": 3}, "max_steps was 4 and is 3"),
        ({"ignore_data_skip": True}, "ignore_data_skip was false and is true"),
        ({"data": DATA[:2]}, "dataset.rows was 3 and is 2"),
        ({"data": DATA[::-1]}, "dataset.content was"),
        ({"data": [DATA[0], OTHER, DATA[2]]}, "dataset.content was"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_training_that_would_end_otherwise_is_refused_by_what_has_changed(options, message, folder):
    before = sorted(folder.rglob("*"))
    for checkpoint in (True, str(folder / "checkpoint-2")):
        with pytest.raises(ValueError, match=f"would give another result than the training that wrote it: .*{message}"):
            make(folder, **options).train(resume_from_checkpoint=checkpoint)
    assert sorted(folder.rglob("*")) == before


def test_what_changes_nothing_of_the_steps_is_allowed_and_listed(folder, caplog):
    options = {"logging_steps": 2, "save_steps": 1, "save_total_limit": 5, "max_nonfinite_steps": 3, "run_name": "b"}
    with caplog.at_level(logging.WARNING):
        trainer = make(folder, **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "logging_steps was 1 and is 2" in caplog.text and "save_steps was 2 and is 1" in caplog.text
    assert equal(weights(trainer), load_file(folder / "checkpoint-4" / "model.safetensors"))


def test_a_moved_folder_and_a_model_and_processor_read_from_the_checkpoint_change_nothing(folder, trained, tmp_path):
    moved = folder.rename(tmp_path / "moved")
    model = NextFlowForConditionalGeneration.from_pretrained(moved / "checkpoint-2")
    args = training_arguments(moved, DATA, **STEPS, lr_scheduler_type="cosine")
    collator = NextFlowCollator(AutoProcessor.from_pretrained(moved / "checkpoint-2"), root=tmp_path)
    trainer = NextFlowTrainer(model, args, train_dataset=DATA, data_collator=collator)
    trainer.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    assert equal(weights(trainer), load_file(trained / "checkpoint-4" / "model.safetensors"))


@pytest.mark.parametrize("options", [{"learning_rate": 0.02}, {"weight_decay": 0.5}, {"max_steps": 8}])
def test_changes_that_are_asked_for_take_effect_at_once(options, folder, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make(folder, **options, resume_with_changes=True)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    name = next(iter(options))
    assert f"{name} was" in caplog.text
    if name == "weight_decay":
        assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    new = make(folder.parent / "new", **options)
    new.train()
    expected = {entry["step"]: entry["learning_rate"] for entry in new.state.log_history if "learning_rate" in entry}
    assert {step: rate for step, rate in rates.items() if step > 2} == {s: r for s, r in expected.items() if s > 2}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_part_of_the_state_that_is_missing_is_told(name, folder):
    (folder / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match=f"would give another result .*: {name} is missing"):
        make(folder).train(resume_from_checkpoint=True)
    (folder / "checkpoint-2" / name).unlink()
    trainer = make(folder, resume_with_changes=True)
    assert trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2")).global_step == 4


def test_files_that_nothing_is_read_from_may_be_missing(folder):
    for name in ("training_args.bin", "chat_template.jinja", "tokenizer.json"):
        (folder / "checkpoint-2" / name).unlink()
    assert make(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2")).global_step == 4


def test_a_checkpoint_of_weights_only_or_without_a_record_is_told(folder, tmp_path):
    (folder / "checkpoint-4" / RECORD_FILE).unlink()
    with pytest.raises(ValueError, match=f"it holds no {RECORD_FILE} to compare with"):
        make(folder).train(resume_from_checkpoint=True)
    for checkpoint in (None, True):
        trainer = make(tmp_path / "weights", save_only_model=True)
        if checkpoint is None:
            trainer.train()
            continue
        with pytest.raises(ValueError, match="saved with save_only_model, without states of optimizer"):
            trainer.train(resume_from_checkpoint=True)


def test_what_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint in .* to resume from"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="nowhere is not a checkpoint to resume from; it has no trainer_state.json"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale_dropout": 0.1}, "scale_dropout was 0.5 and is 0.1"),
        ({"stage": "pixel"}, 'trained weights was "'),
        ({"data": vq_rows(seed=1)}, "dataset.content was"),
        ({"model": tiny_vq_model(commitment_weight=0.5)}, "model.commitment_weight was 0.25 and is 0.5"),
        ({"teacher": None}, "teacher was .* and is null"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_training_of_the_tokenizer_is_compared_too(options, message, trained_vq):
    with pytest.raises(ValueError, match=message):
        make_vq(trained_vq, **options).train(resume_from_checkpoint=True)


def test_a_training_of_the_tokenizer_goes_on_without_its_state_where_it_is_asked_to(trained_vq, tmp_path):
    shutil.copytree(trained_vq, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / "vq_trainer.pt").unlink()
    with pytest.raises(ValueError, match="vq_trainer.pt is missing"):
        make_vq(tmp_path).train(resume_from_checkpoint=True)
    resumed = make_vq(tmp_path, max_steps=5, resume_with_changes=True)
    assert resumed.train(resume_from_checkpoint=True).global_step == 5


def test_another_teacher_of_the_tokenizer_is_told(trained_vq):
    other = Teacher()
    torch.nn.init.zeros_(other.patches.weight)
    with pytest.raises(ValueError, match='teacher was "[0-9a-f]+" and is "'):
        make_vq(trained_vq, teacher=other).train(resume_from_checkpoint=True)


def other_reward(completions, **_) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.5}, "beta was 0.01 and is 0.5"),
        ({"image_sampling": {"top_p": 0.5}}, "image_sampling was null and is "),
        ({"rows": [{"prompt": text} for text in TEXTS[::-1]]}, "dataset.content was"),
        ({"reward": other_reward}, r'rewards was \["low_codes"\] and is \["other_reward"\]'),
        ({"model": tiny_model(1)}, "reference was"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_training_by_rewards_is_compared_too(options, message, trained_grpo):
    with pytest.raises(ValueError, match=message):
        make_grpo(trained_grpo, **options).train(resume_from_checkpoint=True)


def test_an_adapter_goes_on_over_its_own_base_only(tmp_path):
    def train(seed: int, rank: int = 2, checkpoint=None):
        model = tiny_model(seed)
        model = peft.get_peft_model(model, lora_config(model, rank=rank))
        make(tmp_path, model).train(resume_from_checkpoint=checkpoint)

    train(0)
    train(0, checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match='base model was "[0-9a-f]+" and is "'):
        train(1, checkpoint=True)
    with pytest.raises(ValueError, match="adapters.default.r was 2 and is 4"):
        train(0, rank=4, checkpoint=True)
    make_grpo(tmp_path / "rl", peft_config=lora()).train()
    with pytest.raises(ValueError, match="base model was"):
        make_grpo(tmp_path / "rl", model=tiny_model(1), peft_config=lora()).train(resume_from_checkpoint=True)


# Data of other kinds --------------------------------------------------------------------------------------------------


class RandomRows(Dataset):
    """Rows that chance changes at each access."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return drawing("one", int(torch.randint(100, ())))


class Stream(IterableDataset):
    def __init__(self, seed: int):
        self.seed = seed

    def __iter__(self):
        return (drawing("one", self.seed + number) for number in range(8))


def test_looking_at_the_rows_changes_nothing_of_the_training(tmp_path, monkeypatch):
    def train(name: str) -> dict[str, torch.Tensor]:
        trainer = make(tmp_path / name, data=RandomRows())
        trainer.train()
        return weights(trainer)

    looked = train("looked")
    monkeypatch.setattr("transformers_nextflow.trainers.runs.resumable_training.training_record", lambda *_: {})
    assert equal(train("not"), looked)


def test_rows_by_chance_and_streams_are_compared(tmp_path):
    make(tmp_path / "chance", data=RandomRows()).train()
    make(tmp_path / "chance", data=RandomRows()).train(resume_from_checkpoint=str(tmp_path / "chance" / "checkpoint-2"))
    for name, options in (("rows", {}), ("packs", {"packing": "length", "packing_budget": 100})):
        make(tmp_path / name, data=Stream(1), **options).train()
        checkpoint = str(tmp_path / name / "checkpoint-2")
        make(tmp_path / name, data=Stream(1), **options).train(resume_from_checkpoint=checkpoint)
        with pytest.raises(ValueError, match="dataset.content was"):
            make(tmp_path / name, data=Stream(2), **options).train(resume_from_checkpoint=checkpoint)


def test_the_number_of_workers_counts_where_they_divide_a_stream():
    def recorded(rows, workers: int) -> dict:
        return training_record._dataset(rows, Mock(seed=0, dataloader_num_workers=workers))

    assert recorded(Stream(1), 0) == recorded(Stream(1), 1) != recorded(Stream(1), 2)
    assert recorded(DATA, 0) == recorded(DATA, 2)


def test_a_stream_that_gives_each_row_once_keeps_all_of_them(tmp_path):
    class Once(Stream):
        def __init__(self, seed: int):
            super().__init__(seed)
            self.rows_left = super().__iter__()

        def __iter__(self):
            return self.rows_left

    data = Once(1)
    make(tmp_path, data=data, max_steps=2).train()
    assert len(list(data)) == 8 - 3  # accelerate reads one row ahead


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_an_earlier_training_in_the_folder_is_not_taken(folder, caplog):
    killed = make(folder, save_steps=1, save_total_limit=2)
    killed.add_callback(KillAt(4))
    with caplog.at_level(logging.WARNING), pytest.raises(Killed):
        killed.train()
    assert "checkpoint-2, checkpoint-4 in" in caplog.text and "belong to an earlier training" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-3"]

    other = make(folder, save_steps=2)
    other.add_callback(KillAt(4))
    with pytest.raises(Killed):
        other.train()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(ValueError, match="checkpoint-3 is of an earlier training in this folder than the latest one"):
        make(folder).train(resume_from_checkpoint=True)
    make(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert [(folder / f"checkpoint-{step}" / SUPERSEDED).exists() for step in (2, 3, 4)] == [False, True, False]


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise Killed


def test_a_training_that_goes_back_leaves_the_later_checkpoints_behind(folder):
    back = make(folder, learning_rate=0.02, resume_with_changes=True)
    back.add_callback(KillAt(4))
    with pytest.raises(Killed):
        back.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(ValueError, match="checkpoint-4 is of an earlier training"):
        make(folder, learning_rate=0.02).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_folder_begins_a_line_of_its_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "new")
    branch = make(tmp_path / "new")
    branch.add_callback(KillAt(3))
    with pytest.raises(Killed):
        branch.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(ValueError, match="new/checkpoint-4 is of an earlier training"):
        make(tmp_path / "new").train(resume_from_checkpoint=True)
    assert not list(folder.glob(f"*/{SUPERSEDED}"))


def test_a_folder_in_use_is_refused_and_free_again_afterwards(folder):
    for checkpoint in (None, True):
        with lock_folder(folder), pytest.raises(ValueError, match="is in use by process .*; wait until that has ended"):
            make(folder).train(resume_from_checkpoint=checkpoint)
    trainer = make(folder)
    nested, refused = make(folder), []

    class Nested(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            try:
                nested.train()
            except ValueError as error:
                refused.append(str(error))

    trainer.add_callback(Nested())
    trainer.train()
    assert len(refused) == 4 and not (folder / LOCK_FILE).exists()
    with lock_folder(folder):
        assert make(folder).evaluate(DATA)["eval_loss"] > 0
    nested.train()


def test_the_recipes_command_refuses_what_differs_and_goes_on_where_it_is_asked_to(tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    data = write_rows(tmp_path / "rows.jsonl", [drawing("a red circle", 1), question("how many?", "one", 2)])
    command = ["train", str(FOLDER / "sft.yaml"), "--model", str(tmp_path / "start"), "--data", str(data)]
    command += ["--output", str(tmp_path / "out"), "--resume"]

    def run(*changes: str, resume: bool = True):
        settings = [part for change in (*SMALL, *changes) for part in ("--set", change)]
        return run_command(*(command if resume else command[:-1]), *settings)

    assert run(resume=False).exit_code == 0
    assert run().exit_code == 0  # finished
    for changes, message in (
        (["learning_rate=1e-3"], "learning_rate was 1e-05 and is 0.001"),
        (["empty_share=0.5"], "dataset.empty_share was 0.1 and is 0.5"),
        (["train=[heads]"], "trained weights was"),
    ):
        result = run(*changes)
        assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1, result.output
    assert run("max_steps=2", "resume_with_changes=true").exit_code == 0
    assert (tmp_path / "out" / "checkpoint-2").exists()


# What a checkpoint holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoint_holds_the_collators_processor_so_that_a_pipeline_loads_it(adapted, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "base")
    if adapted:
        model = peft.get_peft_model(model, lora_config(model, rank=2))
    processor.caption_request = "what is to be seen?"
    args = training_arguments(tmp_path / "run", DATA, **STEPS)
    trainer = NextFlowTrainer(model, args, train_dataset=DATA, data_collator=NextFlowCollator(processor))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "final"):
        pipe = NextFlowPipeline.from_pretrained(folder)
        assert pipe.processor.caption_request == "what is to be seen?"
        assert pipe.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert len(pipe("a red circle", height=16, width=16).images) == 1


def test_a_processor_that_differs_from_the_one_that_makes_the_batches_is_refused(tmp_path):
    args, own, other = training_arguments(tmp_path, DATA), tiny_processor(), tiny_processor()
    collator = NextFlowCollator(own)
    NextFlowTrainer(tiny_model(), args, train_dataset=DATA, data_collator=collator, processing_class=other)
    other.image_processor.level, other.chat_template = 16, other.chat_template + " "
    for processor, names in ((other, "image_processor.level, chat_template"), (other.tokenizer, "class")):
        with pytest.raises(ValueError, match=f"data_collator's processor differ in .*{names}"):
            NextFlowTrainer(tiny_model(), args, train_dataset=DATA, data_collator=collator, processing_class=processor)
