"""Muon with AdamW: each rule against its definition, who gets which, and what `Trainer` asks of an optimizer."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from transformers_nextflow.trainers import MuonWithAdamW, optimizers
from transformers_nextflow.trainers.optimizers import orthogonalize


class Network(nn.Module):
    """A matrix inside of layers, one outside, and vectors: all that the optimizer tells apart."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([nn.Linear(6, width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body.layers[0](x).tanh())


def network(width: int = 6) -> Network:
    torch.manual_seed(0)
    return Network(width)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (12, 12)], ids=["tall", "wide", "square"])
def test_orthogonalized_matrices_keep_their_directions_and_lose_their_sizes(shape):
    torch.manual_seed(0)
    smaller = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], smaller))[0]
    right = torch.linalg.qr(torch.randn(shape[1], smaller))[0]
    result = orthogonalize(left @ torch.diag(torch.linspace(3.0, 60.0, smaller)) @ right.T)
    assert result.shape == shape
    in_the_same_directions = left.T @ result @ right
    values = in_the_same_directions.diagonal()
    assert 0.65 < values.min() and values.max() < 1.25
    torch.testing.assert_close(in_the_same_directions, torch.diag(values), atol=1e-4, rtol=0)
    torch.testing.assert_close(result, left @ torch.diag(values) @ right.T, atol=1e-4, rtol=0)


def test_products_in_bfloat16_give_the_same_to_its_precision():
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    exact, rough = orthogonalize(matrix), orthogonalize(matrix, torch.bfloat16)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)


def test_outside_of_layers_it_is_adamw():
    class Outside(nn.Sequential):
        pass

    torch.manual_seed(0)
    ours = Outside(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    theirs = copy.deepcopy(ours)
    matrices, vectors = ([p for p in theirs.parameters() if p.ndim == ndim] for ndim in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    train(ours, MuonWithAdamW(ours, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)), steps=5)
    train(theirs, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-8), steps=5)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("width", [6, 24, 3], ids=["square", "tall", "wide"])
def test_a_step_of_muon_is_the_orthogonalized_momentum_of_the_size_of_adamws_steps(width):
    model = network(width)
    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.1, momentum=0.9)
    matrix = model.body.layers[0].weight
    momentum = torch.zeros_like(matrix)
    for seed in range(3):
        before = matrix.detach().clone()
        train(model, optimizer, steps=1, seed=seed)
        momentum = 0.9 * momentum + 0.1 * matrix.grad
        direction = orthogonalize(0.1 * matrix.grad + 0.9 * momentum)
        expected = before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(6, width) ** 0.5 * direction
        torch.testing.assert_close(matrix.detach(), expected)
    # Entries of AdamW's steps are about 0.2 of the learning rate, in the mean square.
    update = (matrix.detach() - before * (1 - 0.01 * 0.1)) / 0.01
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_matrices_are_stepped_alike_by_themselves_and_many_at_a_time(monkeypatch):
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    other = copy.deepcopy(model)
    for parameter, twin in zip(model.parameters(), other.parameters()):
        twin.grad = None if parameter.grad is None else parameter.grad.clone()
    batches = []
    original = optimizers.orthogonalize
    monkeypatch.setattr(optimizers, "orthogonalize", lambda x, dtype: batches.append(len(x)) or original(x, dtype))
    MuonWithAdamW(model, lr=0.01).step()
    assert max(batches) > 2
    batches.clear()
    monkeypatch.setattr(optimizers, "ELEMENTS_AT_ONCE", 1)
    MuonWithAdamW(other, lr=0.01).step()
    assert set(batches) == {1}
    for one, twin in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one, twin)


def test_muon_has_the_matrices_of_the_layers_and_nothing_else():
    model = tiny_model()
    groups = MuonWithAdamW(model, lr=0.01, weight_decay=0.1).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, rest, vectors = ([names[parameter] for parameter in group["params"]] for group in groups)
    assert [group["muon"] for group in groups] == [True, False, False]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert sorted(name.split(".", 3)[3] for name in muon) == sorted(
        f"{layer}.{'self_attn' if kind in kinds[:4] else 'mlp'}.{kind}.weight" for layer in (0, 1) for kind in kinds
    )
    assert {"model.language_model.embed_tokens.weight", "lm_head.weight"} < set(rest)
    assert all(model.get_parameter(name).ndim == 1 for name in vectors)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(muon) | set(rest) | set(vectors) == trainable and not any("vq_model" in name for name in trainable)


def test_a_schedule_of_the_learning_rate_reaches_all_parameters():
    model = network()
    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    train(model, optimizer, steps=1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, steps=1, seed=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_loaded_optimizer_goes_on_where_the_saved_one_stopped(tmp_path):
    model = network()
    optimizer = MuonWithAdamW(model, lr=0.01)
    train(model, optimizer, steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    # The learning rate is part of the state, so that another one at the start makes no difference.
    loaded = MuonWithAdamW(other, lr=0.5)
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    fresh_model = copy.deepcopy(model)
    train(model, optimizer, steps=2, seed=1)
    train(other, loaded, steps=2, seed=1)
    train(fresh_model, MuonWithAdamW(fresh_model, lr=0.01), steps=2, seed=1)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert not torch.equal(fresh_model.state_dict()[name], value)
