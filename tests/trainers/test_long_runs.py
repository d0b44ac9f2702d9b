"""What keeps a long run healthy: averaged weights, spikes of the gradient, weights of losses, throughput."""

import json
import math

import pytest
import torch
from test_finite_training import AtSteps, spoil_outputs
from test_trainer import conversation, drawing, make_trainer, rows, text
from test_vq_trainer import make_trainer as make_vq_trainer
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.sequence.loss import LossWeights
from transformers_nextflow.trainers import NextFlowCollator
from transformers_nextflow.trainers.packing import CostModel
from transformers_nextflow.trainers.runs import gradient_spikes
from transformers_nextflow.trainers.runs.gradient_spikes import GradientSpikes
from transformers_nextflow.trainers.throughput import ThroughputMeter


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def equal(some: dict, other: dict) -> bool:
    return some.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in some.items())


def text_row(words: str = "one two") -> dict:
    return {"messages": conversation([text("a red circle")], [text(words)])}


# Averaged weights -----------------------------------------------------------------------------------------------------


def test_an_average_takes_in_each_step_and_is_saved_as_a_model_of_its_own(tmp_path):
    model, seen = tiny_model(), []
    trainer = make_trainer(tmp_path, model, rows(), max_steps=4, ema_decay=0.75)
    expected = weights(model)
    trainer.add_callback(AtSteps(range(1, 6), lambda model: seen.append(weights(model)), "on_step_end"))
    trainer.train()
    for number, step in enumerate(seen):
        decay = min(0.75, (1 + number) / (10 + number))  # it grows
        expected = {name: average.lerp(step[name], 1 - decay) for name, average in expected.items()}
    assert len(seen) == 4 and equal(trainer._averages, expected)
    trained = weights(model)
    with trainer.averaged_weights():
        assert equal(weights(model), expected)
    assert equal(weights(model), trained)
    trainer.save_model(str(tmp_path / "final"))
    averaged = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "final" / "ema")
    assert equal({n: w for n, w in averaged.named_parameters() if n in expected}, expected)
    assert (tmp_path / "final" / "ema" / "processor_config.json").is_file()


@pytest.mark.parametrize("make", [make_trainer, make_vq_trainer], ids=["transformer", "tokenizer"])
def test_averages_of_a_resumed_training_are_those_of_the_unbroken_one(make, tmp_path):
    def trained(folder, resume=None, until=6):
        options = {"max_steps": 6, "ema_decay": 0.9, "lr_scheduler_type": "constant"}
        options |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
        given = (tiny_model(), rows()) if make is make_trainer else ()
        trainer = make(tmp_path / folder, *given, **options)
        if until < 6:
            trainer.add_callback(AtSteps([until], lambda model: exit_training(), "on_step_begin"))
        with pytest.raises(KeyboardInterrupt) if until < 6 else torch.enable_grad():
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    def exit_training():
        raise KeyboardInterrupt

    unbroken = trained("unbroken")
    trained("broken", until=5)
    resumed = trained("broken", resume=True)
    assert equal(weights(resumed.model), weights(unbroken.model)) and equal(resumed._averages, unbroken._averages)
    assert not equal(resumed._averages, weights(resumed.model))


def test_a_checkpoint_without_its_averages_is_not_gone_on_from(tmp_path):
    options = {"ema_decay": 0.9, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, tiny_model(), rows(), **options).train()
    (tmp_path / "checkpoint-3").rename(tmp_path / "gone")
    (tmp_path / "checkpoint-2" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="ema.safetensors is missing"):
        make_trainer(tmp_path, tiny_model(), rows(), **options).train(resume_from_checkpoint=True)


# Spikes of the gradient -----------------------------------------------------------------------------------------------


def test_a_spike_stands_out_of_the_median_and_norms_that_stay_large_become_the_measure():
    spikes = GradientSpikes(4.0)
    assert not any(spikes.is_spike(norm) for norm in [100.0] + 9 * [1.0])  # too few to tell
    assert not spikes.is_spike(3.9) and spikes.is_spike(4.1)
    assert not any(spikes.is_spike(1.0) for _ in range(100))
    found = [spikes.is_spike(8.0) for _ in range(120)]
    assert found[0] and not found[-1] and 40 < sum(found) < 60


def spiking_trainer(folder, steps, rule, factor=20.0, size=1e4, **options):
    """A training whose gradients are `size` times as large at the given steps."""
    values = {"max_steps": 11, "spike_factor": factor, "on_spike": rule, "ema_decay": 0.5, "weight_decay": 0.1}
    values |= {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 1e9, "learning_rate": 1e-3}
    trainer = make_trainer(folder, tiny_model(), rows(), **(values | options))

    def enlarge(module, inputs, outputs):
        if trainer.model.training and trainer.state.global_step + 1 in steps:
            outputs.loss = outputs.loss * size

    trainer.model.register_forward_hook(enlarge)
    return trainer


def test_a_spike_that_is_counted_changes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_spikes, "MIN_NORMS", 3)
    counted = spiking_trainer(tmp_path / "counted", [6], "count")
    plain = spiking_trainer(tmp_path / "plain", [6], "skip", factor=1e12)
    for trainer in (counted, plain):
        trainer.train()
    assert equal(weights(counted.model), weights(plain.model)) and equal(counted._averages, plain._averages)
    logged = [entry["gradient_spikes"] for entry in counted.state.log_history if "loss" in entry]
    assert logged == 5 * [0] + 6 * [1]


def test_a_run_with_a_spike_and_a_nan_left_out_ends_as_one_that_never_takes_these_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_spikes, "MIN_NORMS", 3)
    handled = spiking_trainer(tmp_path / "handled", [6], "skip", max_nonfinite_steps=1)
    spoil_outputs(handled, [10], "text_loss")
    plain = spiking_trainer(tmp_path / "plain", [], "skip")
    left_out = plain._get_grad_norm

    def leaving_out(model, grad_norm=None):
        norm = left_out(model, grad_norm)
        if plain.state.global_step + 1 in (6, 10):
            plain._skip_step(model)
        return norm

    plain._get_grad_norm = leaving_out
    for trainer in (handled, plain):
        trainer.train()
    assert equal(weights(handled.model), weights(plain.model)) and equal(handled._averages, plain._averages)
    last = [entry for entry in handled.state.log_history if "loss" in entry][-1]
    assert last["gradient_spikes"] == last["nonfinite_steps"] == 1


def test_a_rewound_run_goes_on_from_its_checkpoint_without_the_steps_since(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_spikes, "MIN_NORMS", 3)
    rewound = spiking_trainer(tmp_path / "rewound", [7], "rewind", lr_scheduler_type="linear")
    plain = spiking_trainer(tmp_path / "plain", [], "skip", lr_scheduler_type="linear")
    taken = plain._get_grad_norm

    def leaving_out(model, grad_norm=None):
        norm = taken(model, grad_norm)
        if plain.state.global_step + 1 in (5, 6, 7):
            plain._skip_step(model)
        return norm

    plain._get_grad_norm = leaving_out
    for trainer in (rewound, plain):
        trainer.train()
    assert equal(weights(rewound.model), weights(plain.model)) and equal(rewound._averages, plain._averages)
    rates = [[e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (rewound, plain)]
    assert rates[0] == rates[1]
    resumed = spiking_trainer(tmp_path / "rewound", [7], "rewind", lr_scheduler_type="linear")
    resumed.train(resume_from_checkpoint=str(tmp_path / "rewound" / "checkpoint-4"))
    assert equal(weights(resumed.model), weights(rewound.model)) and equal(resumed._averages, rewound._averages)


def test_counts_and_norms_are_resumed_and_a_spike_before_the_first_checkpoint_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_spikes, "MIN_NORMS", 3)
    trainer = spiking_trainer(tmp_path, [4], "rewind", save_steps=8)
    before = weights(trainer.model)
    trainer.train()
    assert not equal(weights(trainer.model), before)
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert state["finite_training"]["gradient_spikes"] == 1 and len(state["finite_training"]["norms"]) == 8
    again = spiking_trainer(tmp_path, [4], "rewind", save_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again._num_spikes == 1 and list(again._spikes.norms) == list(trainer._spikes.norms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"spike_factor": 1.0}, "spike_factor must be more than 1, got 1.0"),
        ({"on_spike": "stop"}, r"on_spike must be one of \('count', 'skip', 'rewind'\), got 'stop'"),
        ({"spike_factor": 3.0, "on_spike": "rewind", "save_only_model": True}, "leave out save_only_model"),
        ({"text_loss_weight": -1.0}, "text_loss_weight must be at least 0, got -1.0"),
        ({"z_loss_weight": math.nan}, "z_loss_weight"),
        ({"level_loss_weights": {16: -1.0}}, "level_loss_weights must be at least 0"),
        ({"level_loss_weights": {1024: 1.0}}, r"weights of the levels \[1024\], but the model's are \[16\]"),
    ],
)
def test_settings_of_which_no_training_makes_sense_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_model(), rows(), **options)


# Weights of losses ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_text_levels_and_z_over_the_trained_positions():
    model = tiny_model(vq_config={"scales": (1, 2, 3, 4), "levels": ((12, 3), (16, 4))})
    processor = tiny_processor(levels=((12, 3), (16, 4)))
    small = drawing("two blue squares", seed=3) | {"image_tokens": [list(range(14))], "image_grids": [[3, 3]]}
    batch = NextFlowCollator(processor)([rows()[0], small, text_row()])
    chosen = LossWeights(text=7.0, levels={12: 0.5}, z=1e-2)
    output = model(**batch, loss_weights=chosen)
    logits = model(**{k: v for k, v in batch.items() if k not in ("labels", "image_labels")}).logits.float()
    layout = model.model.layout_batch(
        batch["input_ids"], batch["attention_mask"], None, None, None, batch["image_tokens"], batch["image_grids"], None
    )
    from transformers_nextflow.sequence.loss import loss_targets

    plain = loss_targets(
        batch["input_ids"], batch["labels"], batch["image_labels"], layout, layout.schedules, model.config
    )
    row = plain.mask.nonzero()[:, 0]
    factor = torch.where(plain.scales == 0, 7.0, torch.where(row == 1, 0.5, 1.0))
    selected = logits[plain.mask]
    losses = torch.nn.functional.cross_entropy(selected, plain.classes, reduction="none")
    losses = losses + 1e-2 * selected.logsumexp(-1).square()
    expected = (losses * plain.weights * factor).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.mean_loss, expected.detach(), rtol=1e-5, atol=0)
    output.loss.backward()
    gradient = model.visual_head.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    assert float((gradient - model.visual_head.weight.grad).norm() / gradient.norm()) < 1e-5


def test_a_head_that_is_called_has_the_same_weighted_loss():
    model, batch = tiny_model(), NextFlowCollator(tiny_processor())(rows())
    chosen = LossWeights(text=3.0, levels={16: 2.0}, z=1e-2)
    losses = []
    for called in (False, True):
        if called:  # a hook, as of offloading
            model.visual_head.register_forward_hook(lambda *args: None)
        model.zero_grad()
        loss = model(**batch, loss_weights=chosen).loss
        loss.backward()
        losses.append((loss.detach(), model.visual_head.weight.grad.clone()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_the_trainer_passes_the_weights_on_in_training_and_in_evaluation(tmp_path):
    options = {"text_loss_weight": 5.0, "level_loss_weights": {16: 0.5}, "z_loss_weight": 1e-3, "learning_rate": 0.0}
    model, batch = tiny_model(), NextFlowCollator(tiny_processor())(rows())
    expected = float(model(**batch, loss_weights=LossWeights(5.0, {16: 0.5}, 1e-3)).loss.detach())
    trainer = make_trainer(tmp_path, model, rows(), max_steps=1, **options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    for size in (1, 2):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate(rows())["eval_loss"] == pytest.approx(expected, rel=1e-5)


# The throughput -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["padding", "length", "compute"])
def test_the_log_tells_tokens_a_second_the_fill_of_batches_and_the_wait_for_data(packing, tmp_path, monkeypatch):
    data, budget = [*rows(), text_row()], None if packing == "padding" else 400
    size = {"per_device_train_batch_size": 3 if packing == "padding" else 1}
    trainer = make_trainer(tmp_path, tiny_model(), data, packing=packing, packing_budget=budget, max_steps=1, **size)
    trainer.train()
    entry = trainer.state.log_history[0]
    collator, cost = NextFlowCollator(tiny_processor()), CostModel.from_config(tiny_model().config)
    sizes = [collator.size(row) for row in data]
    lengths = [size.length for size in sizes]
    expected = {
        "padding": sum(lengths) / (3 * max(lengths)),
        "length": sum(lengths) / 400,
        "compute": sum(map(cost.cost, sizes)) / 400,
    }[packing]
    assert entry["fill"] == pytest.approx(expected, rel=1e-5)
    assert entry["tokens_per_second"] > 0 and 0 < entry["data_wait"] < 1


def test_padding_of_a_pack_is_no_sample(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 1.0, 1.5, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    batch = NextFlowCollator(tiny_processor(), pad_to_multiple_of=64)([[text_row(), text_row("one")]])
    length = sum(NextFlowCollator(tiny_processor()).size(row).length for row in (text_row(), text_row("one")))
    throughput = ThroughputMeter(tiny_model().config, "length", 200)
    assert list(throughput.time_batches(iter([batch]))) == [batch]
    throughput.stop()
    logs = throughput.pop_metrics(lambda own: torch.stack([own, own]), torch.device("cpu"))
    speed = {"seconds_per_step": 4.0, "tokens_per_second": 2 * length / 4}
    assert logs == pytest.approx(speed | {"fill": length / 200, "data_wait": 1.5 / 4})
    assert throughput.pop_metrics(lambda own: own, torch.device("cpu")) == {}
