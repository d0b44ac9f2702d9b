"""RL on two processes, with whole weights on each or with parts of them, against one process."""

import os
from functools import partial

import pytest
import torch
from test_sharded_training import shard
from tiny import free_port


pytest.importorskip("trl")
from test_grpo import lora, make_trainer  # noqa: E402

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
    torch.set_num_threads(1)
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
    torch.multiprocessing.spawn(_steps, args=(free_port(), str(tmp_path)), nprocs=2)
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
