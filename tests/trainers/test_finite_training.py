"""Numbers that are not finite: settings, losses, gradients and weights, in every trainer."""

import copy
import json
import os

import pytest
import torch
from processes import in_two_processes
from safetensors.torch import load_file
from test_grpo import make_trainer as make_grpo_trainer
from test_trainer import drawing, make_trainer, question, rows, training_arguments
from test_vq_trainer import make_trainer as make_vq_trainer
from test_vq_trainer import tiny_vq_model
from tiny import free_port, tiny_model, tiny_processor
from transformers import TrainerCallback

from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, PatchDiscriminator
from transformers_nextflow.trainers.recipes import Recipe
from transformers_nextflow.trainers.runs.finite_training import are_finite


NAN, INF = float("nan"), float("inf")
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


class AtSteps(TrainerCallback):
    """Calls a function of the model at the beginning or the end of some steps."""

    def __init__(self, steps, function, event="on_step_begin"):
        self.steps, self.function = steps, function
        setattr(self, event, self._call)

    def _call(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            self.function(model)


def spoil_outputs(trainer, steps, *names, scale=None, value=NAN):
    """In the given steps the named losses, one of a scale, and the total are `value`."""

    def spoil(model, args, outputs):
        if model.training and trainer.state.global_step + 1 in steps:
            for name in names:
                setattr(outputs, name, outputs[name] + value)
            if scale is not None:
                outputs.scale_losses[scale - 1] = value
            outputs.loss = outputs.loss + value

    trainer.model.register_forward_hook(spoil)


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Losses and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_training_before_it_reaches_a_weight(value, accumulation, tmp_path):
    model = tiny_model()
    options = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    trainer = make_trainer(tmp_path, model, rows(), **options, **SAVING)
    spoil_outputs(trainer, [3], "image_loss", scale=2, value=value)
    good = f"The last good checkpoint is {tmp_path}/checkpoint-2"
    with pytest.raises(ValueError, match=f"^Step 3: image_loss and scale_2_loss are not finite. {good}"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if name in saved)
    assert all(entry.get("loss") != 0 for entry in trainer.state.log_history)


def test_the_term_is_the_loss_where_no_part_tells_and_the_gradient_where_all_losses_are_finite(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), rows())
    spoil_outputs(trainer, [1])
    with pytest.raises(ValueError, match="Step 1: loss is not finite. There is no checkpoint yet"):
        trainer.train()
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    model.lm_head.weight.register_hook(lambda gradient: gradient * INF)
    with pytest.raises(ValueError, match="Step 1: the norm of the gradient is not finite"):
        make_trainer(tmp_path, model, rows(), max_grad_norm=0.0).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["image", "text"])
def test_what_a_batch_has_nothing_of_is_no_fault(kind, tmp_path):
    row = rows()[kind == "text"]
    trainer, batch = make_trainer(tmp_path, tiny_model().train(), [row]), NextFlowCollator(tiny_processor())([row])
    if kind == "image":
        batch["labels"][batch["input_ids"] != trainer.model.config.eoi_token_id] = -100
    trainer.compute_loss(trainer.model, batch)
    noted = dict(trainer._noted)
    absent = ["text_loss"] if kind == "image" else ["image_loss", *(f"scale_{scale}_loss" for scale in range(1, 5))]
    assert [name for name, value in noted.items() if value == 0] == absent and len(noted) == 6
    assert are_finite(noted.values())


def test_a_few_steps_are_left_out_where_asked_for_and_change_nothing(tmp_path):
    options = {"max_steps": 5, "weight_decay": 0.1, "max_nonfinite_steps": 2, "per_device_train_batch_size": 2}
    model, seen = tiny_model(), []
    trainer = make_trainer(tmp_path, model, rows(), **options)
    trainer.add_callback(AtSteps(range(6), lambda model: seen.append(copy.deepcopy(model.state_dict()))))
    spoil_outputs(trainer, [2, 4], "text_loss")
    trainer.train()
    moved = [any(not torch.equal(value, after[name]) for name, value in s.items()) for s, after in zip(seen, seen[1:])]
    assert moved == [True, False, True, False]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("nonfinite_steps") for entry in logs] == [None, 1, 1, 2, 2]
    assert [entry["loss"] == entry["loss"] for entry in logs] == [True, False, True, False, True]

    trainer = make_trainer(tmp_path, tiny_model(), rows(), **options)
    spoil_outputs(trainer, [1, 2, 3])
    with pytest.raises(ValueError, match=r"Step 3: loss is not finite. 2 such steps were skipped before"):
        trainer.train()


def test_the_tokenizers_terms_are_told_and_a_step_left_out_leaves_the_discriminator_as_it_was(tmp_path):
    calls = []

    def perceptual(reconstruction, pixels):
        calls.append(None)
        return (reconstruction - pixels).square().mean() * (NAN if len(calls) == 2 else 1)

    options = {"perceptual": perceptual, "perceptual_weight": 1.0, "max_steps": 4}
    with pytest.raises(ValueError, match=f"Step 2: perceptual_loss is not finite. .*{tmp_path}/checkpoint-1"):
        make_vq_trainer(tmp_path, **options, **SAVING).train()

    discriminator = PatchDiscriminator(4, layers=1)
    options = {"discriminator": discriminator, "adversarial_weight": 1.0, "adversarial_start": 0.0, "stage": "pixel"}
    model, before = tiny_vq_model(), copy.deepcopy(discriminator.state_dict())
    trainer = make_vq_trainer(tmp_path / "skipping", model, **options, max_nonfinite_steps=1, max_steps=2)

    def spoil(model, args, output):
        if trainer.state.global_step == 0:
            output.reconstruction = output.reconstruction * NAN

    model.register_forward_hook(spoil)
    moved = []

    def compare(model):
        moved.append(any(not torch.equal(value, before[name]) for name, value in discriminator.state_dict().items()))

    trainer.add_callback(AtSteps([1, 2], compare, "on_optimizer_step"))
    trainer.train()
    assert moved == [False, True] and trainer.state.log_history[1]["nonfinite_steps"] == 1


def test_rl_tells_its_terms_and_weights_with_which_nothing_can_be_sampled(tmp_path):
    trainer = make_grpo_trainer(tmp_path, max_steps=3, **SAVING)
    trainer.add_callback(AtSteps([2], lambda model: setattr(trainer, "beta", NAN)))
    with pytest.raises(ValueError, match=f"Step 2: kl_loss is not finite. .*{tmp_path}/checkpoint-1"):
        trainer.train()
    trainer = make_grpo_trainer(tmp_path / "weights", max_steps=3, **SAVING)
    trainer.add_callback(AtSteps([2], lambda model: model.lm_head.weight.data.fill_(NAN)))
    with pytest.raises(ValueError, match="After step 1 1 weights are not finite, lm_head.weight among them"):
        trainer.train()


# Weights and checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_trainer, make_vq_trainer, make_grpo_trainer], ids=["NextFlow", "VQ", "GRPO"])
def test_weights_that_are_not_finite_are_saved_nowhere(make, tmp_path):
    arguments = (tiny_model(), rows()) if make is make_trainer else ()
    trainer = make(tmp_path, *arguments, max_steps=3, **SAVING)
    trainer.add_callback(AtSteps([2], lambda model: next(model.parameters()).data.fill_(INF), "on_optimizer_step"))
    with pytest.raises(ValueError, match=f"weights are not finite, .*; they are not saved. .*{tmp_path}/checkpoint-1"):
        trainer.train()
    assert [name for name in checkpoints(tmp_path) if "checkpoint" in name] == ["checkpoint-1"]
    assert are_finite(load_file(tmp_path / "checkpoint-1" / "model.safetensors").values())
    with pytest.raises(ValueError, match="weights are not finite"):
        trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert are_finite(load_file(tmp_path / "checkpoint-1" / "model.safetensors").values())


def test_a_training_neither_begins_nor_ends_with_weights_that_are_not_finite(tmp_path):
    model = tiny_model()
    model.model.language_model.norm.weight.data[0] = NAN
    message = "Before the first step 1 weights are not finite, model.language_model.norm.weight among them; check"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, rows()).train()
    trainer = make_trainer(tmp_path, tiny_model(), rows(), max_steps=1)
    trainer.add_callback(AtSteps([1], lambda model: model.lm_head.weight.data.fill_(NAN), "on_optimizer_step"))
    with pytest.raises(ValueError, match="After step 1 1 weights are not finite, lm_head.weight among them"):
        trainer.train()


# Settings -------------------------------------------------------------------------------------------------------------


REFUSED = [
    ("learning_rate", NAN), ("learning_rate", -1e-3), ("learning_rate", "1e-3"), ("weight_decay", INF),
    ("weight_decay", -0.1), ("max_grad_norm", NAN), ("max_grad_norm", -1.0), ("adam_beta1", 1.0), ("adam_beta2", NAN),
    ("adam_epsilon", 0.0), ("warmup_steps", NAN), ("num_train_epochs", INF), ("max_nonfinite_steps", -1),
    ("gradient_accumulation_steps", 0), ("per_device_train_batch_size", 0), ("logging_nan_inf_filter", True),
    ("lr_scheduler_kwargs", {"min_lr_rate": NAN}), ("neftune_noise_alpha", NAN),
]  # fmt: skip
REFUSED_VQ = [
    ("latent_noise", NAN), ("latent_noise", -0.1), ("pixel_weight", INF), ("semantic_weight", -1.0),
    ("codebook_weight", NAN), ("perceptual_weight", NAN), ("adversarial_weight", NAN), ("scale_dropout", NAN),
    ("autoencoder_share", NAN), ("adversarial_start", -0.5), ("kmeans_images", 0), ("revive_every", -1),
]  # fmt: skip
REFUSED_GRPO = [
    ("beta", NAN), ("beta", INF), ("beta", -0.1), ("epsilon", NAN), ("epsilon", -0.1), ("epsilon_high", NAN),
    ("scale_alpha", NAN), ("continuation_eta", NAN), ("fine_beta", NAN), ("fine_beta", -1.0), ("max_advantage", NAN),
    ("reward_weights", [NAN]), ("temperature", NAN), ("image_sampling", {"temperature": NAN}),
]  # fmt: skip


@pytest.mark.parametrize(
    "make, name, value",
    [(make_trainer, *setting) for setting in [*REFUSED, ("packing_budget", NAN)]]
    + [(make_vq_trainer, *setting) for setting in REFUSED + REFUSED_VQ]
    + [(make_grpo_trainer, *setting) for setting in REFUSED + REFUSED_GRPO],
)
def test_settings_that_no_training_can_follow_are_refused_by_name(make, name, value, tmp_path):
    arguments = (tiny_model(), rows()) if make is make_trainer else ()
    with pytest.raises(ValueError, match=name):
        make(tmp_path, *arguments, **{name: value})


def test_settings_of_an_optimizer_are_checked_wherever_they_come_from(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), rows(), optim="sgd", optim_args="momentum=nan")
    with pytest.raises(ValueError, match=r"optimizer\[0\].momentum must be a finite number, got nan"):
        trainer.train()
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["lr"] = INF
    arguments = training_arguments(tmp_path, rows())
    own = {"train_dataset": rows(), "processing_class": tiny_processor(), "optimizers": (optimizer, None)}
    with pytest.raises(ValueError, match=r"optimizer\[0\].lr must be a finite number, got inf"):
        NextFlowTrainer(model, arguments, **own).train()


def test_settings_that_change_after_they_were_made_are_checked_again(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), rows())
    trainer.args.learning_rate = NAN
    with pytest.raises(ValueError, match="learning_rate must be a finite number, got nan"):
        trainer.train()


def test_weights_of_losses_in_a_config_and_shares_of_a_recipe_are_checked(tmp_path):
    model, vq_model = tiny_model(), tiny_vq_model()
    model.config.scale_loss_alpha, vq_model.config.commitment_weight = NAN, INF
    with pytest.raises(ValueError, match="config.scale_loss_alpha must be a finite number, got nan"):
        make_trainer(tmp_path, model, rows())
    with pytest.raises(ValueError, match="config.commitment_weight must be a finite number, got inf"):
        make_vq_trainer(tmp_path, vq_model)
    with pytest.raises(ValueError, match="caption_share and empty_share must lie in"):
        Recipe("transformer", caption_share=NAN)


# Several processes ----------------------------------------------------------------------------------------------------


def _train_on_process(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    data = [drawing("one", 1), drawing("a green star", 2), drawing("a red circle", 3), question("how many?", "one", 4)]
    args = training_arguments(
        folder, data, max_steps=4, per_device_train_batch_size=1, ddp_backend="gloo", ddp_find_unused_parameters=True,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer = NextFlowTrainer(tiny_model(), args, train_dataset=data, data_collator=NextFlowCollator(tiny_processor()))
    if rank == 1:
        spoil_outputs(trainer, [2], "text_loss")
    try:
        trainer.train()
    except ValueError as error:
        with open(f"{folder}/error_{rank}.json", "w") as file:
            json.dump(str(error), file)
    torch.distributed.destroy_process_group()


def test_what_one_process_computes_ends_the_training_of_all(tmp_path):
    in_two_processes(_train_on_process, free_port(), str(tmp_path))
    errors = [json.loads((tmp_path / f"error_{rank}.json").read_text()) for rank in range(2)]
    assert errors[0] == errors[1] and errors[0].startswith("Step 2: text_loss is not finite. The last good checkpoint")
    assert checkpoints(tmp_path) == ["checkpoint-1", "error_0.json", "error_1.json"]
