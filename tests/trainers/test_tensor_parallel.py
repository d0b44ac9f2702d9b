"""A training whose weight matrices are divided between two processes, which have the same rows, against one process."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_two_processes, on_other_devices
from test_resuming import DATA, make, make_grpo
from tiny import free_port, tiny_model, tiny_processor

from transformers_nextflow import NextFlowForConditionalGeneration, modeling_nextflow
from transformers_nextflow.trainers import ImageGrids, nextflow_trainer
from transformers_nextflow.utils.older_transformers import SAVES_TENSOR_PARALLEL


OPTIONS = {"max_steps": 3, "per_device_train_batch_size": 2, "max_grad_norm": 1.0, "ema_decay": 0.9}
OPTIONS |= {"save_strategy": "no", "learning_rate": 1e-3}


def divided(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    on_other_devices()
    read, called = modeling_nextflow.called_cross_entropy, []
    modeling_nextflow.called_cross_entropy = lambda *args: called.append(1) or read(*args)
    model = NextFlowForConditionalGeneration.from_pretrained(f"{folder}/start", tp_plan="auto")
    in_parts = [name for name, weight in model.named_parameters() if 2 * local(weight).numel() == weight.numel()]
    trainer = make(folder, model, DATA, **OPTIONS)
    trainer.add_callback(sheets())
    trainer.train()
    trainer.save_model(f"{folder}/final")
    torch.save((logged(trainer), in_parts, len(called)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def sheets() -> ImageGrids:
    return ImageGrids(tiny_processor(), [{"prompt": "a red circle"}], every=3, num_images=2)


def local(weight: torch.Tensor) -> torch.Tensor:
    return weight.data.to_local() if hasattr(weight.data, "to_local") else weight


def logged(trainer) -> list[float]:
    names = ("loss", "grad_norm")
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in names]


@pytest.mark.skipif(not SAVES_TENSOR_PARALLEL, reason="refused with a transformers that cannot save it")
def test_matrices_of_backbone_and_heads_are_divided_and_the_training_is_that_of_one(tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    in_two_processes(divided, free_port(), str(tmp_path))
    whole = make(tmp_path / "whole", data=DATA, **OPTIONS)
    whole.add_callback(sheets())
    whole.train()
    (found, in_parts, calls), (other, _, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert found == other and found == pytest.approx(logged(whole), rel=1e-5) and len(set(found)) == len(found)
    assert calls == OPTIONS["max_steps"]  # heads are called on blocks of positions, never on all of them
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in in_parts if name.endswith("weight")} == {
        "lm_head", "visual_head", "embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
        "down_proj",
    }  # fmt: skip
    for name in ("step_00000.png", "step_00003.png"):
        drawn, alike = (Image.open(folder / "image_grids" / name) for folder in (tmp_path, tmp_path / "whole"))
        np.testing.assert_allclose(np.array(drawn, int), np.array(alike, int), atol=1)
    expected = {"final": dict(whole.model.named_parameters()), "final/ema": whole._averages}
    for folder, weights in expected.items():
        trained = dict(NextFlowForConditionalGeneration.from_pretrained(tmp_path / folder).named_parameters())
        for name, weight in weights.items():
            torch.testing.assert_close(trained[name], weight, rtol=0, atol=2e-6, check_device=False)


def test_a_divided_model_is_refused_where_it_could_not_be_saved_or_drawn_with(tmp_path, monkeypatch):
    monkeypatch.setattr(nextflow_trainer, "SAVES_TENSOR_PARALLEL", False)
    model = tiny_model()
    model._tp_size = 2
    with pytest.raises(ValueError, match="sharded over 2 processes.*cannot save it"):
        make(tmp_path, model)
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match="sharded over 2 processes.*which RL does not draw with.*fsdp2.yaml"):
        make_grpo(tmp_path, model=model)


def test_muon_is_refused_where_matrices_are_in_parts(tmp_path):
    trainer = make(tmp_path, muon=True)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="muon needs complete weight matrices.*set optim"):
        trainer.create_optimizer()
    trainer.is_fsdp_enabled, trainer.model._tp_size = False, 2
    with pytest.raises(ValueError, match="muon needs complete weight matrices"):
        trainer.create_optimizer()
