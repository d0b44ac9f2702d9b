"""Steps of two processes that hold a part of the weights each, against those of one process."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from processes import in_two_processes, join_sharded
from test_mixture import text_row
from test_precision import image_rows, write_images
from test_resuming import DATA, make
from tiny import free_port, tiny_model, tiny_processor

from transformers_nextflow.sequence import fused_cross_entropy
from transformers_nextflow.sequence.loss import LossWeights
from transformers_nextflow.trainers import ImageGrids, NextFlowCollator


STEPS = 3
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
WEIGHTS = LossWeights(text=2.0, z=1e-3)


def shard(model, mesh, dtype: torch.dtype):
    """Layers, embedding and heads by themselves, and the rest; the vision tokenizer stays whole."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shard = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in (*base.model.language_model.layers, base.lm_head, base.visual_head):
        shard(module)
    shard(model)


def _train(rows: list[dict], count: int, mesh, dtype: torch.dtype, folder: str) -> tuple[list[float], torch.Tensor]:
    """Some steps on the rows of this process, of `count` trained positions on the whole mesh: the loss of each step
    over all of these, and the codes of the images.
    """
    model, codes, losses = tiny_model().train(), [], []
    shard(model, mesh, dtype)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    encode = model.vq_model.encode
    model.vq_model.encode = lambda pixels: codes.append(encode(pixels).image_tokens) or encode(pixels)
    batch = NextFlowCollator(tiny_processor(), root=folder)(rows)
    for _ in range(STEPS):
        loss = model(**batch, num_items_in_batch=count, loss_weights=WEIGHTS).loss
        (loss * mesh.size()).backward()  # gradients are averaged over the processes
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(total := loss.detach().clone(), group=mesh.get_group())
        losses.append(float(total))
    return losses, codes[0]


def _compare(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    both = torch.distributed.init_device_mesh("cpu", (2,))
    alone = torch.distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("processes", "own"))["own"]
    rows = [*image_rows(6), text_row("one two three")]
    count = int(tiny_model().num_trained_positions(**NextFlowCollator(tiny_processor(), root=folder)(rows)))
    read = fused_cross_entropy._FusedCrossEntropy.apply
    calls = []
    fused_cross_entropy._FusedCrossEntropy.apply = lambda *args: calls.append(1) or read(*args)
    found = {}
    for dtype in TOLERANCES:
        # Other numbers of positions in each process.
        own = rows[:2] if rank == 0 else rows[2:]
        found[dtype] = [_train(rows, count, alone, dtype, folder), _train(own, count, both, dtype, folder)]
    torch.save((found, len(calls)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_parts_of_all_weights_have_the_losses_and_codes_of_one(tmp_path):
    write_images(tmp_path, 6)
    in_two_processes(_compare, free_port(), str(tmp_path))
    (found, calls), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert calls == STEPS * 2 * len(TOLERANCES)  # the loss stays fused with the heads
    for dtype, tolerance in TOLERANCES.items():
        (whole, codes), (shared, first) = found[dtype]
        assert shared == other[dtype][1][0] == pytest.approx(whole, rel=tolerance)
        assert len(set(whole)) == STEPS
        assert torch.equal(torch.cat([first, other[dtype][1][1]]), codes)


def _with_sheets(folder: str, rows_each: int, sheets: bool) -> dict[str, torch.Tensor]:
    """The weights after a training of two steps, with a sheet of images before and after them."""
    trainer = make(folder, data=DATA[:2] * 2, per_device_train_batch_size=rows_each, max_steps=2, save_strategy="no")
    if sheets:
        trainer.add_callback(ImageGrids(tiny_processor(), [{"prompt": "a red circle"}], every=2, num_images=2))
    trainer.train()
    return {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in trainer.model.state_dict().items()}


def _sheets_of_parts(rank: int, port: int, folder: str):
    join_sharded(rank, port)
    weights = [_with_sheets(f"{folder}/{sheets}", 1, sheets) for sheets in (True, False)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    torch.distributed.destroy_process_group()


def test_sheets_of_a_sharded_training_are_those_of_a_whole_one_and_change_nothing_of_it(tmp_path):
    in_two_processes(_sheets_of_parts, free_port(), str(tmp_path))
    _with_sheets(f"{tmp_path}/whole", 2, True)
    for name in ("step_00000.png", "step_00002.png"):
        found, expected = (Image.open(tmp_path / run / "image_grids" / name) for run in ("True", "whole"))
        np.testing.assert_allclose(np.array(found, int), np.array(expected, int), atol=1)
    assert not (tmp_path / "False" / "image_grids").exists()


def _losses(folder: str, rows_each: int, **options) -> list[float]:
    data = DATA[:2] * 2
    trainer = make(folder, data=data, per_device_train_batch_size=rows_each, max_steps=2, learning_rate=1e-3, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _in_bfloat16(rank: int, port: int, folder: str):
    join_sharded(rank, port, 2, "--mixed_precision", "bf16")
    losses = _losses(folder, 1, bf16=True, save_strategy="no")
    torch.save((losses, AcceleratorState().fsdp_plugin.mixed_precision_policy), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_under_accelerates_bfloat16_policy_gradients_are_added_up_and_losses_told_in_float32(tmp_path):
    in_two_processes(_in_bfloat16, free_port(), str(tmp_path))
    losses, policy = torch.load(tmp_path / "0.pt", weights_only=False)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    one = _losses(f"{tmp_path}/whole", 2, bf16=True, save_strategy="no")
    assert losses == pytest.approx(one, rel=2e-3)  # half of what bfloat16 tells apart
    assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in losses)
