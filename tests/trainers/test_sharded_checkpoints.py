"""Checkpoints in parts (FSDP2 through accelerate, as its file among the recipes sets it up), which go on with another
number of processes.
"""

import os

import pytest
import torch
from processes import in_processes, join_sharded
from test_resuming import make
from test_trainer import drawing, question
from tiny import free_port
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import StateDictType
from torch.multiprocessing import ProcessExitedException
from transformers import TrainerCallback

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.trainers.runs.atomic_checkpoints import PARTIAL, checkpoints_in


IN_PARTS = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
ROWS = [drawing("one", 1), question("how many circles are there?", "one", 2), drawing("a red circle", 3)]
ROWS += [drawing("two blue squares", 4), drawing("one", 5), question("how many circles are there?", "two", 6)]
OPTIONS = {"max_steps": 6, "ema_decay": 0.9, "learning_rate": 1e-3, "max_grad_norm": 1.0}


def whole(values: dict) -> dict:
    """Numbers as every process has them, from parts."""
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for name, v in values.items()}


def state_of(trainer) -> dict:
    """All that a training goes on with."""
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    states = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    states = {name: value for name, value in states.items() if isinstance(value, torch.Tensor)}
    return {
        "weights": whole({name: weight.detach() for name, weight in model.named_parameters()}),
        "optimizer": whole(states),
        "averages": whole(trainer._averages),
        "numbers": (trainer.state.global_step, trainer._num_averaged, trainer.lr_scheduler.get_last_lr()),
    }


class States(TrainerCallback):
    """Notes the state where the training goes on and after every second step."""

    def __init__(self):
        self.trainer, self.seen = None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.seen["begin"] = state_of(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 2 == 0:
            self.seen[state.global_step] = state_of(self.trainer)


def trained(folder, processes: int, states: States, resume=None, **options):
    """A training of two rows a step, on however many processes."""
    trainer = make(folder, data=ROWS, **OPTIONS | {"per_device_train_batch_size": 2 // processes} | options)
    states.trainer = trainer
    trainer.add_callback(states)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/final")


def part(rank: int, port: int, processes: int, folder: str, found: str, options: dict):
    """One process of a sharded training; the second is killed in the checkpoint of step 4 where `options` say so."""
    join_sharded(rank, port, processes, *IN_PARTS)
    write, dies = distributed_checkpoint.FileSystemWriter.write_data, options.pop("dies", False) and rank == 1

    def write_or_die(self, *args, **kwargs):
        if dies and "checkpoint-4" in str(self.path) and "optimizer" in str(self.path):
            torch.save(states.seen, found)
            os._exit(9)
        return write(self, *args, **kwargs)

    distributed_checkpoint.FileSystemWriter.write_data = write_or_die
    if processes == 1:
        refused(folder)
    trained(folder, processes, states := States(), **options)
    if rank == 0:
        torch.save(states.seen, found)
    torch.distributed.destroy_process_group()


def refused(folder: str):
    """What is not asked for, where two processes wrote."""
    trainer = make(folder, data=ROWS, **OPTIONS | {"per_device_train_batch_size": 2})
    with pytest.raises(ValueError, match="processes was 2 and is 1.*resume_with_changes=True"):
        trainer.train(resume_from_checkpoint=True)
    plugin = trainer.accelerator.state.fsdp_plugin
    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    with pytest.raises(ValueError, match="holds no pytorch_model_fsdp.bin, which fsdp_state_dict_type=FULL_STATE_DICT"):
        trainer._load_from_checkpoint(f"{folder}/checkpoint-2")
    plugin.state_dict_type = kind


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two processes train and are killed in the checkpoint of step 4; one goes on from that of step 2, and two from
    that one's of step 4. What each saw, beside what one process with whole weights sees.
    """
    folder = tmp_path_factory.mktemp("run")

    def go(processes: int, name: str, **options) -> dict:
        in_processes(processes, part, free_port(), processes, str(folder), str(folder / name), options)
        return torch.load(folder / name)

    with pytest.raises(ProcessExitedException, match="exit code 9"):
        go(2, "killed", dies=True)
    found = {"killed": torch.load(folder / "killed"), "left": sorted(c.name for c in checkpoints_in(folder))}
    found["half written"] = (folder / PARTIAL / "checkpoint-4").is_dir()
    found["one"] = go(1, "one", resume=True, resume_with_changes=True)
    found["two"] = go(2, "two", resume=str(folder / "checkpoint-4"), resume_with_changes=True)
    trained(folder / "whole", 1, whole := States())
    return folder, found | {"whole": whole.seen}


def assert_same(some: dict, other: dict, tolerance: float = 0.0):
    assert some["numbers"] == other["numbers"]
    for name in ("weights", "optimizer", "averages"):
        assert some[name].keys() == other[name].keys() and len(some[name]) >= 34
        for key, value in some[name].items():
            torch.testing.assert_close(value, other[name][key], rtol=0, atol=tolerance)


def test_weights_optimizer_averages_and_step_are_loaded_to_the_bit_by_another_number_of_processes(run):
    _, found = run
    assert_same(found["one"]["begin"], found["killed"][2])
    assert_same(found["two"]["begin"], found["one"][4])


def test_the_steps_after_it_are_those_of_the_unbroken_training_to_rounding(run):
    _, found = run
    assert_same(found["killed"][4], found["whole"][4], 2e-6)
    for name in ("one", "two"):
        assert_same(found[name][6], found["whole"][6], 2e-6)
    moved = [not torch.equal(w, found["whole"][2]["weights"][n]) for n, w in found["whole"][6]["weights"].items()]
    assert sum(moved) >= 34


def test_a_kill_while_parts_are_written_leaves_the_checkpoint_before_whole(run):
    _, found = run
    assert found["left"] == ["checkpoint-2"] and found["half written"]  # from which another process went on


def test_each_process_writes_its_own_part_and_the_outcome_is_a_whole_model(run):
    folder, found = run
    for name in ("pytorch_model_fsdp_0", "optimizer_0", "ema_parts"):
        sizes = [part.stat().st_size for part in sorted((folder / "checkpoint-6" / name).glob("*.distcp"))]
        assert len(sizes) == 2 and max(sizes) < 0.8 * sum(sizes)
    assert not [*folder.glob("checkpoint-*/*.safetensors"), *folder.glob("checkpoint-*/*.bin")]
    for where, name in (("final", "weights"), ("final/ema", "averages")):
        model = NextFlowForConditionalGeneration.from_pretrained(folder / where)
        loaded = dict(model.named_parameters())
        assert all(torch.equal(loaded[key].detach(), value) for key, value in found["two"][6][name].items())
