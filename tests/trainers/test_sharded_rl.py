"""RL on two processes, with whole weights on each or with parts of them, against one process."""

import os
from functools import partial

import pytest
import torch
from processes import in_processes, in_two_processes, join_sharded
from test_sharded_checkpoints import IN_PARTS, whole
from test_sharded_training import shard
from tiny import free_port


pytest.importorskip("trl")
from test_grpo import lora, make_trainer  # noqa: E402
from test_resuming import make  # noqa: E402

from transformers_nextflow.trainers.rl import grpo_trainer, rollouts  # noqa: E402


# Two levels, which are drawn in other numbers of passes; with two processes each has one of them.
ROWS = [{"prompt": "a red circle", "height": 16, "width": 16}, {"prompt": "one", "height": 28, "width": 8}]
OPTIONS = {"beta": 0.1, "steps_per_generation": 2, "shuffle_dataset": False, "num_generations": 4}
TRAINED = {"full": None, "lora": lora()}
KINDS = {"full": (False, True), "lora": (True,)}


def _step(folder: str, peft_config, rank: int = 0, processes: int = 1, mesh=None) -> dict:
    """What a process sees of one step: its rollouts, how likely policy and reference find them, its loss, and the
    trained weights after it.
    """
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, rows=ROWS, peft_config=peft_config, per_device_train_batch_size=4 // processes, **OPTIONS
    )
    model = trainer.model.train()
    before = [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]
    if mesh is not None:
        for sharded in filter(None, (model, trainer.ref_model)):
            shard(sharded, mesh, torch.float32)
    elif processes > 1:
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer._wrap_model(model))
    trainer.current_gradient_accumulation_steps = 1
    count = len(ROWS) * 4 // processes
    generators = [torch.Generator().manual_seed(row) for row in range(rank * count, (rank + 1) * count)]
    grpo_trainer.generate_rollouts = partial(rollouts.generate_rollouts, generator=generators)
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    loss = trainer._compute_loss(trainer.model_wrapped, inputs)
    loss.backward()
    optimizer.step()
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return {
        "codes": [rollout.image_tokens for rollout in inputs["rollouts"]],
        "old": inputs["old_per_token_logps"],
        "reference": inputs["ref_per_token_logps"],
        "loss": loss.detach(),
        "weights": {name: w.full_tensor() if hasattr(w, "full_tensor") else w for name, w in trained.items()},
        "moved": sum(not torch.equal(a, b) for a, b in zip(before, trained.values())) if mesh is None else None,
        "in_parts": sum(hasattr(weight, "placements") for weight in trained.values()),
    }


def _steps(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    found = {
        (kind, is_sharded): _step(folder, peft_config, rank, 2, mesh if is_sharded else None)
        for kind, peft_config in TRAINED.items()
        for is_sharded in KINDS[kind]
    }
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_draw_score_and_learn_as_one_with_whole_weights_and_with_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "generate_rollouts", rollouts.generate_rollouts)
    in_two_processes(_steps, free_port(), str(tmp_path))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for kind, peft_config in TRAINED.items():
        one = _step(str(tmp_path), peft_config)
        assert one["moved"] >= len(one["weights"]) // 2 and one["loss"] != 0
        for is_sharded in KINDS[kind]:
            first, second = (found[kind, is_sharded] for found in both)
            assert first["in_parts"] == (len(first["weights"]) if is_sharded else 0)
            for codes, expected in zip(first["codes"] + second["codes"], one["codes"], strict=True):
                assert torch.equal(codes, expected)
            for name in ("old", "reference"):
                for found, expected in zip(first[name] + second[name], one[name], strict=True):
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close((first["loss"] + second["loss"]) / 2, one["loss"], atol=1e-6, rtol=1e-5)
            assert first["weights"].keys() == second["weights"].keys() == one["weights"].keys()
            for name, weight in one["weights"].items():
                assert torch.equal(first["weights"][name], second["weights"][name])
                torch.testing.assert_close(first["weights"][name], weight, atol=1e-6, rtol=1e-5)


# Through accelerate, from the start to the end -----------------------------------------------------------------------


def _training(folder: str, kind: str, rank: int = 0, processes: int = 1, **options) -> dict:
    """A training of two steps: what it logs, its weights at the end, and which of its models are in parts."""
    count, resume = len(ROWS) * 4 // processes, options.pop("resume", None)
    trainer = make_trainer(
        folder, rows=ROWS, peft_config=TRAINED[kind], per_device_train_batch_size=count, optim="sgd", learning_rate=0.1,
        **OPTIONS | {"steps_per_generation": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 1} | options,
    )  # fmt: skip

    def draw(*args):
        first = 100 * trainer.state.global_step + rank * count
        seeds = [torch.Generator().manual_seed(first + row) for row in range(count)]
        return rollouts.generate_rollouts(*args, generator=seeds)

    grpo_trainer.generate_rollouts = draw
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/final")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "logged": [entry[name] for entry in entries for name in ("loss", "grad_norm", "reward", "kl")],
        "weights": whole({name: w.detach() for name, w in trainer.model.named_parameters() if w.requires_grad}),
        "in parts": [_is_in_parts(model) for model in (trainer.model, trainer.ref_model) if model is not None],
    }


def _is_in_parts(model) -> bool:
    """All but the vision tokenizer."""
    weights = [weight for name, weight in model.named_parameters() if "vq_model" not in name]
    return all(hasattr(weight, "placements") for weight in weights)


def _trainings(rank: int, port: int, folder: str):
    join_sharded(rank, port, 2, *IN_PARTS)
    for kind in TRAINED:
        found = _training(f"{folder}/{kind}", kind, rank, 2)
        checkpoint = f"{folder}/{kind}/checkpoint-1"
        resumed = _training(f"{folder}/{kind}", kind, rank, 2, resume=checkpoint, save_strategy="no")
        torch.save((found, resumed), f"{folder}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_sharded_training_by_rewards_is_that_of_one_process_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "generate_rollouts", rollouts.generate_rollouts)
    in_two_processes(_trainings, free_port(), str(tmp_path))
    for kind in TRAINED:
        one = _training(f"{tmp_path}/one {kind}", kind)
        for rank in (0, 1):
            found, resumed = torch.load(tmp_path / f"{kind}-{rank}.pt")
            # The reference of a full training is in parts too; that of an adapter is the model without it.
            assert found["in parts"] == [True] * (2 if kind == "full" else 1) and not any(one["in parts"])
            assert found["logged"] == pytest.approx(one["logged"], rel=1e-4, abs=1e-6)
            assert found["weights"].keys() == one["weights"].keys() == resumed["weights"].keys()
            for name, weight in one["weights"].items():
                torch.testing.assert_close(found["weights"][name], weight, atol=1e-6, rtol=1e-5)
                assert torch.equal(resumed["weights"][name], found["weights"][name])
            assert resumed["logged"] == found["logged"]


def _version_1(rank: int, port: int, folder: str):
    options = ("--fsdp_reshard_after_forward", "FULL_SHARD", "--fsdp_sync_module_states", "false")
    join_sharded(rank, port, 1, "--fsdp_version", "1", *options)
    for start in (lambda: make_trainer(folder, rows=ROWS), lambda: make(folder)):
        with pytest.raises(ValueError, match="FSDP of version 1.*set fsdp_version to 2"):
            start()


def test_fsdp_of_version_1_is_refused(tmp_path):
    in_processes(1, _version_1, free_port(), str(tmp_path))
