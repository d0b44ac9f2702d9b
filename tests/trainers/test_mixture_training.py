"""Trainings on mixtures: as their weights say, resumed exactly, and each process on its own rows."""

import json
import os
from pathlib import Path

import pytest
import torch
from processes import in_two_processes
from test_mixture import drawn_rows, text_row, write_codes
from test_trainer import Killed, training_arguments
from tiny import free_port, tiny_model, tiny_processor
from transformers import TrainerCallback

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.data.columns import Columns
from transformers_nextflow.data.mixture import Mixture, open_source
from transformers_nextflow.data.rows import ROW_NUMBER
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, packing
from transformers_nextflow.trainers.recipe_trainers import make_trainer
from transformers_nextflow.trainers.recipes import load_recipe


CHANGES = [
    "bf16=false", "use_cpu=true", "report_to=[]", "disable_tqdm=true", "warmup_steps=0", "level=16", "max_steps=6",
    "packing_budget=400", "save_steps=2", "learning_rate=1e-2", "mixture={images: 3, words.jsonl: 1}",
    "gradient_checkpointing=false",
]  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 16)
    write_codes(tmp_path / "data" / "images", drawn_rows(24))
    rows = [text_row(f"words {number}") for number in range(20)]
    (tmp_path / "data" / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    return tmp_path


class KilledAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("changes", [[], ["packing=padding", "packing_budget=null"], ["dataloader_num_workers=2"]])
def test_a_resumed_training_on_a_mixture_is_the_unbroken_one(changes, data, monkeypatch):
    def trainer(output):
        recipe = load_recipe("pretrain_256", [*CHANGES, *changes])
        return make_trainer(recipe, data / "start", data / "data", data / output)

    unbroken = trainer("unbroken")
    unbroken.train()
    broken = trainer("broken")
    broken.add_callback(KilledAt(5))
    with pytest.raises(Killed):
        broken.train()
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    start = NextFlowForConditionalGeneration.from_pretrained(data / "start").state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in unbroken.model.state_dict().items())


def test_other_weights_or_workers_are_another_training(data):
    def trainer(*changes):
        recipe = load_recipe("pretrain_256", [*CHANGES, *changes])
        return make_trainer(recipe, data / "start", data / "data", data / "out")

    trainer().train()
    (data / "out" / "checkpoint-6").rename(data / "gone")
    for change, message in (
        ("mixture={images: 1, words.jsonl: 1}", r"mixture.images was \[24, 3"),
        ("dataloader_num_workers=2", "workers was 1 and is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(change).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mixture={images: 0}"], "weights above 0"),
        (["mixture={}"], "weights above 0"),
        (["max_steps=-1"], "has no end: set max_steps"),
        (["mixture={image: 1}"], "There is no file or folder image, and it is not the name of a data set of the Hub"),
        (["mixture=[images]"], "mixture must be"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(changes, message, data):
    with pytest.raises(ValueError, match=message):
        recipe = load_recipe("pretrain_256", [*CHANGES, *changes])
        make_trainer(recipe, data / "start", data / "data", data / "out")


def _train_a_share(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    packing.WINDOW = 16
    sources = [(open_source(name, Path(folder) / "data", Columns()), 1.0) for name in ("images", "words.jsonl")]
    read = []
    mixture = Mixture(sources, prepare=lambda row, name: read.append(row[ROW_NUMBER]) or row)
    options = {"packing": "compute", "packing_budget": 400, "per_device_train_batch_size": 1, "max_steps": 8}
    args = training_arguments(f"{folder}/out", [0], **options)
    trainer = NextFlowTrainer(
        tiny_model(), args, train_dataset=mixture, data_collator=NextFlowCollator(tiny_processor())
    )
    trainer.train()
    logs = trainer.state.log_history
    torch.save([read, trainer.model.lm_head.weight.detach(), logs], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_read_rows_of_their_own_and_train_the_same_weights(data):
    in_two_processes(_train_a_share, free_port(), str(data))
    (read, weight, logs), (other, same, _) = (torch.load(data / f"{rank}.pt") for rank in (0, 1))
    # The first rows are read by the first process once more, for the record of the training.
    assert not set(read[64:]) & set(other) and len(set(other)) > 8
    assert torch.equal(weight, same) and 0 < logs[-2]["fill"] <= 1
