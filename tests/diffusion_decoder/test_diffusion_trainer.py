"""Training of the diffusion decoder: what it learns, resuming, the mean of its weights."""

import copy
import sys

import pytest
import torch
from test_diffusion_decoder import codes_of, seeds
from tiny import tiny_model
from tiny_diffusion import tiny_decoder
from transformers import TrainerCallback

import transformers_nextflow
from transformers_nextflow import trainers
from transformers_nextflow.diffusion_decoder import DiffusionSettings, NextFlowDiffusionDecoder, decode_codes
from transformers_nextflow.evaluation.image_metrics import psnr
from transformers_nextflow.trainers.diffusion.arguments import NextFlowDiffusionTrainingArguments
from transformers_nextflow.trainers.diffusion.diffusion_trainer import NextFlowDiffusionTrainer


@pytest.fixture(scope="module")
def vq_model():
    return tiny_model().vq_model


def random_rows(count=16, side=16, seed=0):
    pixels = torch.rand(count, 3, side // 4, side // 4, generator=seeds(seed)[0]) * 2 - 1
    return [{"pixel_values": image} for image in pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)]


def trainer_of(vq_model, folder, decoder=None, rows=None, **arguments):
    values = {
        "learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    args = NextFlowDiffusionTrainingArguments(str(folder), **(values | arguments))
    return NextFlowDiffusionTrainer(
        tiny_decoder(vq_model) if decoder is None else decoder, args, rows or random_rows(), vq_model=vq_model
    )


def weights_of(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def test_a_decoder_reproduces_sixteen_images_that_it_was_trained_on(vq_model, tmp_path):
    # Codes of their own tell the images apart, which a random tokenizer need not do.
    codes, schedule = codes_of(vq_model, count=16)
    rows = [row | {"image_tokens": tokens} for row, tokens in zip(random_rows(), codes)]
    decoder = tiny_decoder(vq_model, channels=(64,), pixel_cell=4)
    trainer = trainer_of(
        vq_model, tmp_path, decoder, rows, max_steps=200, per_device_train_batch_size=16, condition_dropout=0.0,
        learning_rate=5e-3, lr_scheduler_type="cosine", ema_decay=0.9,
    )  # fmt: skip
    trainer.train()
    with trainer.averaged_weights():
        images = decode_codes(
            trainer.model.eval(), vq_model, codes, [schedule] * 16, DiffusionSettings(4, 1.0), seeds(0)[0]
        )
    originals = torch.stack([row["pixel_values"] for row in rows])
    assert psnr(torch.stack(images) / 2 + 0.5, originals / 2 + 0.5).min() > 30


def test_a_resumed_training_ends_as_the_unbroken_one(vq_model, tmp_path):
    whole = trainer_of(vq_model, tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of(vq_model, tmp_path / "resumed", tiny_decoder(vq_model, seed=5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert all(torch.equal(whole._averages[name], average) for name, average in resumed._averages.items())


def test_a_training_is_resumed_in_a_process_that_orders_the_defaults_of_a_config_otherwise(vq_model, tmp_path):
    trainer_of(vq_model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    decoder = tiny_decoder(vq_model)
    # diffusers lists them in the order of a set, which differs from process to process.
    decoder.register_to_config(_use_default_values=[*reversed(decoder.config["_use_default_values"]), "another"])
    resumed = trainer_of(vq_model, tmp_path, decoder, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_a_compiled_training_is_the_plain_one(vq_model, tmp_path):
    start, trained = tiny_decoder(vq_model), []
    for compiles in (False, True):
        trainer = trainer_of(
            vq_model, tmp_path, copy.deepcopy(start), torch_compile=compiles, torch_compile_backend="eager"
        )
        trainer.train()
        trained.append(weights_of(trainer))
    torch.testing.assert_close(*trained)


def test_what_is_saved_is_the_mean_of_the_weights(vq_model, tmp_path):
    trainer = trainer_of(vq_model, tmp_path, ema_decay=0.5)
    seen = [trainer.model.projection[0].weight.detach().clone()]

    class Noted(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            decay = min(0.5, len(seen) / (9 + len(seen)))
            seen.append(decay * seen[-1] + (1 - decay) * trainer.model.projection[0].weight.detach())

    trainer.add_callback(Noted())
    trainer.train()
    raw = weights_of(trainer)
    trainer.save_model(str(tmp_path / "final"))
    saved = NextFlowDiffusionDecoder.from_pretrained(tmp_path / "final").projection[0].weight
    torch.testing.assert_close(saved, seen[-1])
    assert not torch.equal(saved, raw["projection.0.weight"])
    assert all(torch.equal(raw[name], weight) for name, weight in weights_of(trainer).items())


def test_without_averages_the_weights_are_their_own(vq_model, tmp_path):
    trainer = trainer_of(vq_model, tmp_path, ema_decay=0.0)
    trainer.train()
    expected = weights_of(trainer)
    with trainer.averaged_weights():
        assert all(torch.equal(expected[name], weight) for name, weight in weights_of(trainer).items())


def test_dropped_conditions_train_the_unconditional_case(vq_model, tmp_path):
    decoder = tiny_decoder(vq_model)
    before = decoder.projection[0].weight.detach().clone()
    trainer_of(vq_model, tmp_path, decoder, condition_dropout=1.0, weight_decay=0.0).train()
    assert torch.equal(decoder.projection[0].weight, before)


def test_codes_made_on_the_fly_are_those_of_the_image_at_the_tokenizers_size(vq_model, tmp_path):
    rows = random_rows(4, side=32)
    small = torch.nn.functional.avg_pool2d(torch.stack([row["pixel_values"] for row in rows]), 2)
    ready = [r | {"image_tokens": t} for r, t in zip(rows, vq_model.encode(small).image_tokens)]
    trained = []
    for name, data in (("fly", rows), ("ready", ready)):
        trainer = trainer_of(vq_model, tmp_path / name, tiny_decoder(vq_model, upsampling=2), data, max_steps=2)
        trainer.train()
        trained.append(weights_of(trainer))
    assert all(torch.equal(trained[0][name], weight) for name, weight in trained[1].items())


@pytest.mark.parametrize("kind", ["flux", "text unet"])
def test_a_trained_base_learns_with_prompts_and_its_own_weights_rest_where_it_has_adapters(kind, vq_model, tmp_path):
    decoder = tiny_decoder(vq_model, kind)
    rows = [row | {"prompt_tokens": torch.randn(3, 12), "prompt_pooled": torch.randn(6)} for row in random_rows(8)]
    before = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    trainer_of(vq_model, tmp_path, decoder, rows).train()
    changed = {name for name, weight in decoder.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and changed <= {name for name, weight in decoder.named_parameters() if weight.requires_grad}


def test_the_decoder_of_another_tokenizer_is_refused(vq_model, tmp_path):
    with pytest.raises(ValueError, match="trained on the codes of the tokenizer"):
        trainer_of(tiny_model(seed=1).vq_model, tmp_path, tiny_decoder(vq_model))


def test_without_diffusers_the_import_says_what_to_install(monkeypatch):
    # They are imported anew, and those that other tests hold come back afterwards.
    for name in [name for name in sys.modules if "transformers_nextflow.diffusion_decoder" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "transformers_nextflow.trainers.diffusion.diffusion_trainer")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for module, name in ((transformers_nextflow, "NextFlowDiffusionDecoder"), (trainers, "NextFlowDiffusionTrainer")):
        with pytest.raises(ImportError, match=r"pip install transformers-nextflow\[pipelines\]"):
            getattr(module, name)
