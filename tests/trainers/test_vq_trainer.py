"""Training of the vision tokenizer: stages, losses, care of the codebook, the adversary, scores and resuming."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import in_two_processes
from tiny import tiny_vq_config
from torch import nn

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.evaluation.image_metrics import psnr
from transformers_nextflow.modeling_nextflow_vq import codebook_statistics
from transformers_nextflow.trainers import NextFlowVQTrainer, NextFlowVQTrainingArguments, PatchDiscriminator
from transformers_nextflow.trainers.tokenizer import codebook_maintenance, vq_trainer
from transformers_nextflow.trainers.tokenizer.adversarial import Adversary
from transformers_nextflow.trainers.tokenizer.codebook_maintenance import initialize_codebook, revive_dead_codes


BRANCHES = {"semantic_encoder", "semantic_projection", "pixel_encoder"}
DECODERS = {"semantic_decoder", "pixel_decoder"}


class Teacher(nn.Module):
    """Features (B, 4, 4, 8) of images of 16x16 pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.patches = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patches(pixels).permute(0, 2, 3, 1)


def tiny_vq_model(seed: int = 0, **kwargs) -> NextFlowVQModel:
    torch.manual_seed(seed)
    return NextFlowVQModel(tiny_vq_config(**kwargs))


def make_images(count: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    """(B, 3, size, size): every cell has a colour of its own."""
    colors = torch.rand(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(colors * 2 - 1, (size, size))


def rows(count: int = 8, seed: int = 0, size: int = 16) -> list[dict]:
    return [{"pixel_values": image} for image in make_images(count, seed, size)]


def make_trainer(folder, model=None, data=None, teacher="ours", **options) -> NextFlowVQTrainer:
    """A trainer that takes the whole of its small data set in each step; `options` are arguments or the trainer's."""
    data = data or rows()
    own = {name: options.pop(name) for name in ("perceptual", "discriminator", "eval_dataset") if name in options}
    values = {
        "stage": "joint",
        "max_steps": 2,
        "autoencoder_share": 0.0,
        "revive_every": 0,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": len(data),
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    args = NextFlowVQTrainingArguments(output_dir=str(folder), **(values | options))
    teacher = Teacher() if teacher == "ours" else teacher
    return NextFlowVQTrainer(model or tiny_vq_model(), args, data, teacher=teacher, **own)


def logged(trainer: NextFlowVQTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# Stages and losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, trained",
    [
        ("pixel", {"pixel_encoder", "pixel_decoder"}),
        ("joint", BRANCHES | DECODERS | {"quantizer"}),
        ("codebook", DECODERS | {"quantizer"}),
        ("decoder", {"pixel_decoder"}),
    ],
)
def test_each_stage_trains_its_own_parts_alone(stage, trained, tmp_path):
    model = tiny_vq_model()
    before = copy.deepcopy(model.state_dict())
    make_trainer(tmp_path, model, stage=stage).train()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained


def test_the_codebook_stage_starts_from_k_means_and_trains_the_codes_from_there(tmp_path):
    model, expected = tiny_vq_model(), tiny_vq_model()
    data = rows()
    initialize_codebook(expected, make_images(6), seed=42)
    still = make_trainer(tmp_path, model, data, stage="codebook", learning_rate=0.0, kmeans_images=6, max_steps=1)
    still.train()
    torch.testing.assert_close(model.quantizer.codebook, expected.quantizer.codebook)
    trained = tiny_vq_model()
    make_trainer(tmp_path, trained, data, stage="codebook", kmeans_images=6, max_steps=1).train()
    assert not torch.allclose(trained.quantizer.codebook, expected.quantizer.codebook, atol=1e-4)


@pytest.mark.parametrize("stage, steps", [("pixel", 30), ("joint", 30), ("codebook", 30), ("decoder", 30)])
def test_losses_go_down(stage, steps, tmp_path):
    trainer = make_trainer(tmp_path, stage=stage, max_steps=steps, scale_dropout=0.0, learning_rate=1e-2)
    trainer.train()
    names = ["pixel_loss"] + ["semantic_loss"] * (stage in ("joint", "codebook"))
    for name in names:
        losses = logged(trainer, name)
        assert len(losses) == steps and losses[-1] < 0.8 * losses[0], name


# Codes are used from step 2 on; 0.4 of 6 steps are no whole number of them.
@pytest.mark.parametrize("share, steps", [(0.5, 4), (0.4, 6)])
def test_the_joint_stage_begins_without_codes_and_then_starts_them_from_k_means(share, steps, tmp_path):
    model = tiny_vq_model()
    before = model.quantizer.codebook.detach().clone()
    trainer = make_trainer(tmp_path, model, autoencoder_share=share, max_steps=steps)
    seen = []

    def look(module, args, kwargs):
        seen.append((kwargs["quantize"], not torch.equal(module.quantizer.codebook, before)))

    model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    assert seen == [(False, False)] * 2 + [(True, True)] * (steps - 2)
    assert [loss > 0 for loss in logged(trainer, "codebook_loss")] == [False] * 2 + [True] * (steps - 2)


def test_the_semantic_loss_is_one_minus_the_cosine_to_the_teacher(tmp_path):
    model, teacher = tiny_vq_model(), Teacher()
    weights = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        features, target = model(make_images(8)).semantic_features, teacher(make_images(8))
    cosine = (features * target).sum(-1) / (features.norm(dim=-1) * target.norm(dim=-1))
    trainer = make_trainer(tmp_path, model, teacher=teacher, scale_dropout=0.0, semantic_weight=2.0)
    trainer.train()
    assert logged(trainer, "semantic_loss")[0] == pytest.approx(2 * (1 - float(cosine.mean())), abs=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    seen = []

    def perceptual(reconstruction, pixels):
        distance = (reconstruction - pixels).abs().mean((1, 2, 3))
        seen.append(float(distance.detach().mean()))
        return distance

    options = {"perceptual_weight": 3.0, "pixel_weight": 0.5, "perceptual": perceptual}
    trainer = make_trainer(tmp_path, max_steps=3, **options)
    trainer.train()
    assert logged(trainer, "perceptual_loss") == pytest.approx([3 * value for value in seen], abs=1e-4)
    parts = zip(*(logged(trainer, f"{name}_loss") for name in ("pixel", "semantic", "codebook", "perceptual")))
    assert logged(trainer, "loss") == pytest.approx([sum(values) for values in parts], abs=1e-3)


@pytest.mark.parametrize("share, expected", [(0.0, 0.0), (0.5, 0.375), (1.0, 0.75)])
def test_scale_dropout_leaves_some_images_their_first_scales(share, expected, tmp_path):
    model = tiny_vq_model()
    drawn = []
    trainer = make_trainer(tmp_path, model, rows(64), scale_dropout=share, max_steps=5, learning_rate=0.0)
    hook = model.register_forward_pre_hook(lambda _, a, kwargs: drawn.append(kwargs["num_scales"]), with_kwargs=True)
    trainer.train()
    hook.remove()
    counts = torch.cat(drawn)
    assert len(counts) == 5 * 64 and set(counts.tolist()) == (set(range(1, 5)) if share else {4})
    assert float((counts < 4).float().mean()) == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stage": "both"}, "stage must be one of .* got 'both'"),
        ({"scale_dropout": 1.5}, r"scale_dropout must lie in \[0, 1\], got 1.5"),
        ({"autoencoder_share": -0.1}, "autoencoder_share must lie"),
        ({"adversarial_start": 2.0}, "adversarial_start must lie"),
        ({"perceptual_weight": 1.0}, "needs `perceptual=`"),
        ({"adversarial_weight": 1.0}, "needs `discriminator=`"),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_the_joint_stage_asks_for_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="needs `teacher=`"):
        make_trainer(tmp_path, teacher=None).train()


def test_images_of_a_wrong_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="20x20 .* the nearest that is: 16x16"):
        make_trainer(tmp_path, data=rows(4, size=20)).train()
    with pytest.raises(ValueError, match=r"must have one size, got \[\(3, 8, 8\), \(3, 16, 16\)\]"):
        make_trainer(tmp_path, data=rows(2) + rows(2, size=8)).train()


# Care of the codebook -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False], ids=["unit length", "Euclidean"])
def test_k_means_puts_the_codes_to_use_and_is_the_same_for_a_seed(normalize):
    pixels = make_images(64)
    model = tiny_vq_model(normalize_codes=normalize)
    schedule = model.schedule_of(pixels)

    def usage() -> float:
        return codebook_statistics(model.encode(pixels).image_tokens, schedule, 32)["usage"]

    # A collapsed codebook: every code is the same.
    for codebook in (model.quantizer.semantic_codebook, model.quantizer.pixel_codebook):
        codebook.weight.data[1:] = codebook.weight.data[0]
    assert usage() < 0.1
    initialize_codebook(model, pixels, seed=1)
    codebook = model.quantizer.codebook.clone()
    assert usage() == 1
    initialize_codebook(model, pixels, seed=1)
    assert torch.equal(model.quantizer.codebook, codebook)
    initialize_codebook(model, pixels, seed=2)
    assert not torch.equal(model.quantizer.codebook, codebook)


def test_k_means_lowers_what_the_codes_cannot_say():
    pixels = make_images(64)
    model = tiny_vq_model(normalize_codes=False)
    latents = model.encode_latents(pixels).detach()

    @torch.no_grad()
    def error() -> float:
        return float((model.quantizer.encode(latents, model.schedule_of(pixels)).features - latents).square().mean())

    random_error = error()
    initialize_codebook(model, pixels, shares=[2, 4, 6, 20])
    assert error() < 0.5 * random_error


def squared_distances(vectors, others):
    return (vectors[:, None] - others).square().sum(-1)


def left_over(model, pixels, codebook, sizes):
    """Scale by scale the vectors (n, C) of what the nearest codes, among the first `sizes[k]`, have left of images."""
    schedule, residual = model.schedule_of(pixels), model.encode_latents(pixels).detach()
    for grid, size in zip(schedule.grids, sizes):
        target = F.interpolate(residual, grid, mode="area").permute(0, 2, 3, 1)
        yield target.flatten(0, 2)
        nearest = codebook[:size][squared_distances(target.flatten(0, 2), codebook[:size]).argmin(1)]
        nearest = nearest.view(target.shape).permute(0, 3, 1, 2)
        residual = residual - F.interpolate(nearest, schedule.final_grid, mode="bicubic", align_corners=False)


def test_k_means_of_a_scale_sees_what_the_scales_before_it_leave_over():
    pixels, shares = make_images(8), [1, 2, 5, 24]
    model = tiny_vq_model(normalize_codes=False)
    initialize_codebook(model, pixels, shares)
    codebook, stops = model.quantizer.codebook.detach(), [1, 3, 8, 32]
    for vectors, share, stop in zip(left_over(model, pixels, codebook, stops), shares, stops):
        own = codebook[stop - share : stop]
        assigned = squared_distances(vectors, own).argmin(1)
        # Where Lloyd's algorithm has come to rest, each code is the mean of the vectors that are nearest to it.
        means = torch.stack([vectors[assigned == code].mean(0) for code in range(share)])
        torch.testing.assert_close(own, means, atol=1e-4, rtol=0)


@torch.no_grad()
def undivided(model, pixels, seed, most) -> torch.Tensor:
    """The codebook of a k-means that holds all images and all vectors of a scale at once."""
    quantizer, residual, schedule = model.quantizer, model.encode_latents(pixels), model.schedule_of(pixels)
    generator, centers = torch.Generator().manual_seed(seed), torch.empty(0, residual.shape[1])
    for grid in schedule.grids:
        target, vectors = quantizer.targets(residual, grid)
        vectors = vectors.flatten(0, 2)
        drawn = vectors[torch.randperm(len(vectors), generator=generator)[:most]]
        own = drawn[torch.randperm(len(drawn), generator=generator)[:8]].clone()
        for _ in range(codebook_maintenance.KMEANS_STEPS):
            assigned = quantizer.distances(drawn, own).argmin(-1)
            for code in assigned.unique():
                own[code] = drawn[assigned == code].mean(0)
            empty = torch.bincount(assigned, minlength=8) == 0
            own[empty] = drawn[torch.randint(len(drawn), (int(empty.sum()),), generator=generator)]
            own = quantizer.normalize(own) if model.config.normalize_codes else own
        centers = torch.cat([centers, own])
        nearest = centers[quantizer.distances(vectors, centers).argmin(-1)].view(target.shape).permute(0, 3, 1, 2)
        residual = residual - F.interpolate(nearest, schedule.final_grid, mode="bicubic", align_corners=False)
    return centers


@pytest.mark.parametrize("normalize", [True, False], ids=["unit length", "Euclidean"])
@pytest.mark.parametrize("size", [1, 5, 24])
def test_k_means_in_batches_is_the_undivided_one(size, normalize, monkeypatch):
    monkeypatch.setattr(codebook_maintenance, "MAX_VECTORS", 60)  # fewer than the vectors of the last scales
    model, pixels = tiny_vq_model(normalize_codes=normalize), make_images(24)
    expected = undivided(model, pixels, seed=3, most=60)
    initialize_codebook(model, iter(pixels.split(size)), seed=3)
    torch.testing.assert_close(model.quantizer.codebook, expected, atol=1e-5, rtol=1e-5)


def test_k_means_of_a_training_encodes_no_more_images_at_once_than_a_step(tmp_path, monkeypatch):
    model, sizes, encode = tiny_vq_model(), [], NextFlowVQModel.encode_latents

    def counted(own, pixels):
        sizes.append(len(pixels))
        return encode(own, pixels)

    monkeypatch.setattr(NextFlowVQModel, "encode_latents", counted)
    options = {"per_device_train_batch_size": 4, "kmeans_images": 10, "learning_rate": 0.0, "max_steps": 1}
    make_trainer(tmp_path, model, rows(12), stage="codebook", **options).train()
    assert sizes[:3] == [4, 4, 2] and max(sizes) == 4
    expected = tiny_vq_model()
    initialize_codebook(expected, make_images(12)[:10], seed=42)
    torch.testing.assert_close(model.quantizer.codebook, expected.quantizer.codebook, atol=1e-5, rtol=1e-5)


def test_k_means_takes_images_of_several_levels_and_a_scale_sees_those_that_have_it():
    levels = [[12, 3], [16, 4]]
    small, large = make_images(6, size=12), make_images(24)
    several, alone = (tiny_vq_model(normalize_codes=False, levels=levels) for _ in range(2))
    initialize_codebook(several, [small, large, F.interpolate(small, (28, 8))], seed=1)
    assert torch.isfinite(several.quantizer.codebook).all()
    # The last scale is the large images' own: without them there is none.
    initialize_codebook(alone, [small], [8, 8, 16], seed=1)
    with pytest.raises(ValueError, match="must give 4 scales 32 codes"):
        initialize_codebook(several, [small, large], [8, 8, 16])


def test_k_means_does_with_fewer_vectors_than_codes():
    model = tiny_vq_model()
    initialize_codebook(model, make_images(2))
    assert torch.isfinite(model.quantizer.codebook).all()


@pytest.mark.parametrize("shares", [[8, 8, 8], [8, 8, 8, 9], [1, 1, 1, 1]])
def test_shares_of_the_codebook_must_add_up(shares, tmp_path):
    with pytest.raises(ValueError, match="must give 4 scales 32 codes in all"):
        initialize_codebook(tiny_vq_model(), make_images(4), shares)
    with pytest.raises(ValueError, match="must give 4 scales 32 codes in all"):
        make_trainer(tmp_path, stage="codebook", kmeans_shares=shares).train()


def model_with_dead_codes() -> NextFlowVQModel:
    """Codes from the 8th on lie where no latent ever is."""
    model = tiny_vq_model(normalize_codes=False)
    for codebook in (model.quantizer.semantic_codebook, model.quantizer.pixel_codebook):
        codebook.weight.data[8:] = 100.0
    return model


def test_dead_codes_move_to_where_they_are_used():
    model, pixels = model_with_dead_codes(), make_images(32)
    before = model.quantizer.codebook.clone()
    assert revive_dead_codes(model, pixels, torch.zeros(32, dtype=torch.bool)) == 0
    assert torch.equal(model.quantizer.codebook, before)
    assert model.encode(pixels).image_tokens.max() < 8
    assert revive_dead_codes(model, pixels, torch.arange(32) >= 8) == 24
    assert torch.equal(model.quantizer.codebook[:8], before[:8])
    assert model.quantizer.codebook.abs().max() < 10
    assert codebook_statistics(model.encode(pixels).image_tokens, model.schedule_of(pixels), 32)["usage"] > 0.8


def test_dead_codes_move_to_what_the_codes_of_each_scale_leave_over():
    model, pixels = model_with_dead_codes(), make_images(4)
    before = model.quantizer.codebook.detach().clone()
    revive_dead_codes(model, pixels, torch.arange(32) >= 8)
    moved = model.quantizer.codebook[8:].detach()
    distances = [squared_distances(moved, vectors).amin(1) for vectors in left_over(model, pixels, before, [32] * 4)]
    nearest, scale = torch.stack(distances).min(0)
    assert nearest.max() < 1e-8 and set(scale.tolist()) == {0, 1, 2, 3}


def codes_of_process(rank: int, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model = tiny_vq_model()
    # Other images stand for additions in another order.
    initialize_codebook(model, make_images(32, seed=rank))
    torch.save(model.quantizer.codebook.detach(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_start_from_the_same_codes_whatever_each_computes(tmp_path):
    in_two_processes(codes_of_process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    model = tiny_vq_model()
    initialize_codebook(model, make_images(32, seed=0))
    assert torch.equal(first, second) and torch.allclose(first, model.quantizer.codebook, atol=1e-5)


def test_the_trainer_revives_what_was_not_used_since_the_last_time(tmp_path):
    model = model_with_dead_codes()
    trainer = make_trainer(tmp_path, model, max_steps=5, revive_every=2, learning_rate=0.0)
    trainer.train()
    revived = logged(trainer, "revived_codes")
    # At steps 2 and 4; at step 0 nothing has been counted yet. Step 2 has what the first 8 codes leave over, at least.
    assert len(revived) == 2 and revived[0] >= 24 and revived[1] < revived[0]
    assert model.quantizer.codebook.abs().max() < 10


def test_a_step_of_several_batches_revives_once(tmp_path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, model_with_dead_codes(), max_steps=3, revive_every=2, logging_steps=3, **options)
    counting_anew = []

    def look(module, inputs):
        counting_anew.append(trainer._used is None)

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    # The counts start anew before the first batch and after the revival, not between the batches of a step.
    assert counting_anew == [True, False, False, False, True, False]


# The adversary --------------------------------------------------------------------------------------------------------


def test_the_discriminator_scores_patches_and_refuses_images_smaller_than_one():
    discriminator = PatchDiscriminator(channels=4, layers=3)
    # 70 pixels a patch, 8 apart, as PatchGAN's: 256 pixels have 30 x 30.
    assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    pixels = torch.zeros(1, 3, 24, 40, requires_grad=True)
    scores = discriminator(pixels + torch.rand(1, 3, 24, 40))
    assert scores.shape == (1, 1, 1, 3)
    with pytest.raises(ValueError, match="23x40 pixels are too small, .* at least 24"):
        discriminator(torch.zeros(1, 3, 23, 40))
    with pytest.raises(ValueError, match="must be at least 1, got 4 and 0"):
        PatchDiscriminator(4, 0)


def test_the_models_half_of_the_loss_has_no_gradient_in_the_discriminator():
    discriminator = PatchDiscriminator(4, layers=1)
    adversary = Adversary(discriminator, learning_rate=1e-2)
    fake = make_images(2, seed=1).requires_grad_()
    loss = adversary.loss(fake, make_images(2))
    torch.testing.assert_close(loss, -discriminator(fake).mean())
    loss.backward()
    assert fake.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_discriminator_learns_to_tell_true_images():
    discriminator = PatchDiscriminator(8, layers=1)
    adversary = Adversary(discriminator, learning_rate=1e-2)
    real, fake = make_images(4), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(15):
        adversary.loss(fake, real)
        adversary.step()
    assert discriminator(real).mean() > 0.5 and discriminator(fake).mean() < -0.5


def adversary_of_process(rank: int, count: int, folder: Path):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count)
    torch.manual_seed(rank)
    adversary = Adversary(PatchDiscriminator(4, layers=1), learning_rate=1e-2)
    for step in range(2):
        adversary.loss(make_images(2, seed=10 * step + rank), make_images(2, seed=10 * step + rank + 5))
        adversary.step()
    torch.save(adversary.discriminator.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_one_discriminator_on_all_their_images(tmp_path):
    in_two_processes(adversary_of_process, 2, tmp_path)
    weights = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.manual_seed(0)
    adversary = Adversary(PatchDiscriminator(4, layers=1), learning_rate=1e-2)
    for step in range(2):
        fakes, reals = ([make_images(2, seed=10 * step + rank + k) for rank in (0, 1)] for k in (0, 5))
        adversary.loss(torch.cat(fakes), torch.cat(reals))
        adversary.step()
    for name, value in adversary.discriminator.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name])
        torch.testing.assert_close(weights[0][name], value, atol=1e-4, rtol=0)


def test_the_adversary_joins_after_its_share_of_the_steps(tmp_path):
    discriminator = PatchDiscriminator(4, layers=1)
    before = copy.deepcopy(discriminator.state_dict())
    options = {"stage": "decoder", "adversarial_weight": 0.1, "adversarial_start": 0.5, "max_steps": 4}
    trainer = make_trainer(tmp_path, discriminator=discriminator, **options)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "adversarial_loss" in entry]
    assert steps == [3, 4]
    assert any(not torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())


def test_a_step_of_several_batches_starts_codes_once_and_is_one_step_of_the_discriminator(tmp_path, monkeypatch):
    started, gradients = [], []
    start = vq_trainer.initialize_codebook
    monkeypatch.setattr(vq_trainer, "initialize_codebook", lambda *a, **k: started.append(1) or start(*a, **k))
    options = {"adversarial_weight": 0.1, "adversarial_start": 0.0, "scale_dropout": 0.0, "stage": "codebook"}
    for size in (8, 4):
        torch.manual_seed(0)
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        discriminator = PatchDiscriminator(4, layers=1)
        trainer = make_trainer(tmp_path, discriminator=discriminator, max_steps=1, **batches, **options)
        trainer.train()
        states = trainer.adversary.optimizer.state_dict()["state"].values()
        assert {int(state["step"]) for state in states} == {1}
        gradients.append(torch.cat([state["exp_avg"].flatten() for state in states]))
    assert len(started) == 2
    torch.testing.assert_close(*gradients)


def test_losses_that_are_never_logged_do_not_pile_up(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, logging_strategy="no")
    trainer.train()
    total, count = trainer._losses["pixel_loss"]
    assert total.shape == () and count == 3


# Scores and checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pixel", "decoder"])
def test_evaluation_scores_whole_reconstructions_and_writes_a_contact_sheet(stage, tmp_path):
    model = tiny_vq_model()
    trainer = make_trainer(tmp_path, model, stage=stage, eval_dataset=rows(6, seed=3))
    metrics = trainer.evaluate()
    with torch.no_grad():
        output = model(make_images(6, seed=3), quantize=stage == "decoder")
    expected = psnr((output.reconstruction.clamp(-1, 1) + 1) / 2, (make_images(6, seed=3) + 1) / 2).mean()
    assert metrics["eval_psnr"] == pytest.approx(float(expected), abs=1e-3)
    assert -1 <= metrics["eval_ssim"] < 1
    if stage == "decoder":
        statistics = codebook_statistics(output.image_tokens, model.schedule_of(output.reconstruction), 32)
        assert {f"eval_{name}": value for name, value in statistics.items()}.items() <= metrics.items()
    else:
        assert not any("usage" in name for name in metrics)
    with Image.open(tmp_path / "contact_sheets" / "step_0.png") as sheet:
        # One batch of four images, above their reconstructions.
        assert sheet.size == (4 * (16 + 4) + 4, 2 * (16 + 4) + 4)


def test_evaluation_between_two_logs_leaves_the_training_losses_to_the_second(tmp_path):
    options = {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, max_steps=4, eval_dataset=rows(4), **options)
    trainer.train()
    with_losses = [entry for entry in trainer.state.log_history if "pixel_loss" in entry]
    assert [entry["step"] for entry in with_losses] == [4] and "eval_psnr" not in with_losses[0]


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    # k-means at step 2, a checkpoint at 3 amid the counts of used codes, a revival at 4, the adversary all along.
    options = {"max_steps": 6, "autoencoder_share": 1 / 3, "revive_every": 2, "save_strategy": "steps", "save_steps": 3}
    options |= {"adversarial_weight": 0.1, "adversarial_start": 0.0, "lr_scheduler_type": "cosine"}
    data = rows(12)

    def train(seed: int, checkpoint=None):
        model = tiny_vq_model(seed)
        discriminator = PatchDiscriminator(4, layers=1)
        batches = {"per_device_train_batch_size": 4, "discriminator": discriminator}
        trainer = make_trainer(tmp_path, model, data, **options, **batches)
        trainer.train(resume_from_checkpoint=checkpoint)
        return model.state_dict(), discriminator.state_dict()

    whole = train(seed=0)
    resumed = train(seed=1, checkpoint=str(tmp_path / "checkpoint-3"))
    for expected, result in zip(whole, resumed):
        assert all(torch.equal(value, result[name]) for name, value in expected.items())
