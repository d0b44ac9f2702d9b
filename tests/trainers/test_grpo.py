"""RL: groups, rewards, likelihoods and gradients of the trainer, what goes wrong, and resuming."""

import asyncio
import copy
import importlib
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from tiny import tiny_model, tiny_processor

from transformers_nextflow.generation.prefix_likelihood import PrefixColumns, prefix_log_probabilities
from transformers_nextflow.trainers.rl.prefix_objective import (
    RATIO_LEVELS,
    box_mask,
    kl_to_reference,
    policy_terms,
    scale_shares,
)


trl = pytest.importorskip("trl")
from transformers_nextflow.trainers import ImageGrids, NextFlowGRPOConfig, NextFlowGRPOTrainer  # noqa: E402
from transformers_nextflow.trainers.rl.checked_reward import check_rewards  # noqa: E402
from transformers_nextflow.trainers.rl.grpo_config import LIKELIHOODS  # noqa: E402
from transformers_nextflow.trainers.rl.grpo_trainer import _value_of_prefix  # noqa: E402
from transformers_nextflow.trainers.rl.rollouts import generate_rollouts, likelihood_inputs  # noqa: E402
from transformers_nextflow.trainers.runs.epochs import epoch_of  # noqa: E402


TEXTS = ["a red circle", "two blue squares and a green star", "how many circles are there?", "one"]
PROMPTS = [{"prompt": text} for text in TEXTS]
GUIDED = {"guidance_scale": 2.0, "top_k": 8, "top_p": 0.9, "temperature": 0.9}


def low_codes(completion_ids, **_) -> list[float]:
    """The share of codes below 8 of 32 among those of the first three scales."""
    return [sum(code < 8 for code in codes[:14]) / 14 for codes in completion_ids]


def make_trainer(
    folder, model=None, reward=low_codes, rows=None, peft_config=None, callbacks=None, boxes_func=None, **options
):
    values = {
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_prefix_scales": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": [],
    }
    return NextFlowGRPOTrainer(
        model or tiny_model(),
        reward,
        NextFlowGRPOConfig(output_dir=str(folder), **(values | options)),
        train_dataset=rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows or PROMPTS),
        processing_class=tiny_processor(),
        peft_config=peft_config,
        callbacks=callbacks,
        boxes_func=boxes_func,
    )


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=r".*language_model.*\.(q|k|v|o)_proj", init_lora_weights=True)


def first_batch(trainer) -> dict:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def schedules_and_columns(num_scales=3, sizes=((16, 16), (28, 8))):
    schedules = [tiny_model().config.vq_config.scale_schedules.for_size(*size) for size in sizes]
    return schedules, PrefixColumns.of(schedules, num_scales, "cpu")


# The objective --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", [False, True])
def test_bfloat16_is_the_default_where_there_is_an_accelerator(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(NextFlowGRPOConfig.__mro__[1], "__post_init__", lambda self: None)
    config = NextFlowGRPOConfig(output_dir=str(tmp_path), steps_per_generation=1)
    assert config.bf16 is (None if accelerator else False)  # None: TRL turns it on


def test_a_refused_trainer_leaves_its_arguments_as_they_were(tmp_path):
    args = make_trainer(tmp_path, beta=0.3).args
    assert args.beta == 0.3
    with pytest.raises(ValueError):
        NextFlowGRPOTrainer(
            tiny_model(), "no function", args, train_dataset=Dataset.from_dict({"prompt": ["one"]}),
            processing_class=tiny_processor(),
        )  # fmt: skip
    assert args.beta == 0.3


def test_a_code_weighs_its_scales_weight_over_the_sum_of_all_codes():
    schedules, columns = schedules_and_columns()
    weights = scale_shares(schedules, columns, alpha=0.9)
    for row, schedule in enumerate(schedules):
        counts = schedule.tokens_per_scale[:3]
        raw = [count**-0.9 for count in counts]
        total = sum(n * k for n, k in zip(counts, raw))
        expected = [k / total for n, k in zip(counts, raw) for _ in range(n)]
        torch.testing.assert_close(weights[row, columns.occupied[row]], torch.tensor(expected))
        assert (weights[row, ~columns.occupied[row]] == 0).all()


@pytest.mark.parametrize("every", [1, 3], ids=["all codes", "every third code"])
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_at_ratio_one_every_level_has_the_policy_gradient(level, every):
    schedules, columns = schedules_and_columns()
    counted = columns.occupied & (torch.arange(len(columns.scales)) % every == 0)
    weights = scale_shares(schedules, columns, 0.9, counted)
    log_ratios = torch.zeros_like(weights, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5])
    terms, ratios, is_clipped = policy_terms(log_ratios, advantages, weights, columns, level, counted=counted)
    assert (ratios == 1).all() and not is_clipped.any()
    terms.sum().backward()
    torch.testing.assert_close(log_ratios.grad, weights * advantages[:, None])


def test_the_product_of_a_scales_ratios_is_the_ratio_of_its_grid():
    schedules, columns = schedules_and_columns()
    weights = scale_shares(schedules, columns, alpha=0.9)
    log_ratios = 0.01 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)) * columns.occupied
    terms, _, _ = policy_terms(log_ratios, torch.ones(2), weights, columns, "scale_product", (0.5, 0.5))
    for row, schedule in enumerate(schedules):
        counts = schedule.tokens_per_scale[:3]
        total = sum(count**0.1 for count in counts)
        parts = log_ratios[row, columns.occupied[row]].split(list(counts))
        expected = sum(n**-0.9 / total * part.sum().exp() for n, part in zip(counts, parts))
        torch.testing.assert_close(terms[row].sum(), expected)


@pytest.mark.parametrize("level", ["scale_mean", "scale_product"])
def test_codes_that_do_not_count_are_no_part_of_the_ratio_of_their_scale(level):
    schedules, columns = schedules_and_columns()
    counted = columns.occupied & (torch.arange(len(columns.scales)) % 3 == 0)
    weights = scale_shares(schedules, columns, 0.9, counted)
    log_ratios = 0.01 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    terms, _, is_clipped = policy_terms(log_ratios, torch.ones(2), weights, columns, level, counted=counted)
    others = log_ratios.masked_fill(~counted, 3.0)
    found, _, still = policy_terms(others, torch.ones(2), weights, columns, level, counted=counted)
    assert torch.equal(found, terms) and torch.equal(still, is_clipped)


@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_that_went_too_far_the_right_way_gets_no_gradient(level, sign):
    schedules, columns = schedules_and_columns()
    weights = scale_shares(schedules, columns, alpha=0.9)
    log_ratios = (torch.full_like(weights, 0.5 * sign) * columns.occupied).requires_grad_()
    terms, _, is_clipped = policy_terms(log_ratios, sign * torch.ones(2), weights, columns, level)
    terms.sum().backward()
    assert (is_clipped == columns.occupied).all() and (log_ratios.grad == 0).all()
    terms, _, is_clipped = policy_terms(log_ratios, -sign * torch.ones(2), weights, columns, level)
    terms.sum().backward()
    assert not is_clipped.any() and (log_ratios.grad[columns.occupied] != 0).all()


def test_the_estimate_is_the_kl_divergence_on_average():
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, reference = logits.log_softmax(-1)
    expected = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_to_reference(policy, reference)).sum(), expected)
    assert (kl_to_reference(policy, reference) >= 0).all()


# Likelihoods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("edits", [False, True], ids=["drawing", "editing"])
def test_on_the_first_step_ratios_are_one_and_the_kl_is_zero(likelihood, edits, tmp_path):
    rows = [{"prompt": text} for text in TEXTS]
    if edits:
        colors = ("red", "blue", "green", "white")
        rows = [row | {"image": Image.new("RGB", (16, 16), color)} for row, color in zip(rows, colors)]
    sampling = GUIDED | ({"image_guidance_scale": 1.5} if edits else {})
    # Two steps share the rollouts, so that old log-probabilities are computed on their own.
    options = {"likelihood": likelihood, "image_sampling": sampling, "steps_per_generation": 2}
    trainer = make_trainer(tmp_path, rows=rows, **options)
    inputs = first_batch(trainer)
    found = trainer._log_probabilities(trainer.model, inputs["rollouts"])
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(found.columns.place(inputs[name]), found.values.detach(), atol=1e-5, rtol=1e-5)
    trainer._compute_loss(trainer.model, inputs)
    for scale in (1, 2, 3):
        assert trainer._metrics["train"][f"scale_{scale}/ratio_max"][0] == pytest.approx(1, abs=1e-4)
        assert trainer._metrics["train"][f"scale_{scale}/kl"][0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_likelihoods_leave_out_what_their_names_say(likelihood, tmp_path):
    trainer = make_trainer(tmp_path, likelihood=likelihood, image_sampling=GUIDED)
    rollouts = first_batch(trainer)["rollouts"]
    plain = {"temperature": 0.9} | ({} if likelihood == "cond" else {"guidance_scale": 2.0})
    sampling = plain if likelihood != "guided_truncated" else GUIDED
    other = make_trainer(tmp_path, trainer.model, likelihood="guided_truncated", image_sampling=sampling)
    stripped = [copy.copy(rollout) for rollout in rollouts]
    if likelihood == "cond":
        for rollout in stripped:
            object.__setattr__(rollout, "contexts", rollout.contexts[:1])
    expected = other._log_probabilities(other.model, stripped).values
    torch.testing.assert_close(trainer._log_probabilities(trainer.model, rollouts).values, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_the_first_gradient_is_that_of_the_weighted_log_likelihood(level, likelihood, tmp_path):
    options = {"importance_sampling_level": level, "likelihood": likelihood, "image_sampling": GUIDED, "beta": 0.0}
    trainer = make_trainer(tmp_path, **options)
    inputs, model = first_batch(trainer), trainer.model
    trainer._compute_loss(model, inputs).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    log_probabilities = trainer._log_probabilities(model, inputs["rollouts"])
    schedules = [rollout.schedule for rollout in inputs["rollouts"]]
    weights = scale_shares(schedules, log_probabilities.columns, 0.9)
    (-(weights * log_probabilities.values).sum(1) * inputs["advantages"]).mean().backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[name], value.grad, atol=1e-6, rtol=1e-4)
    # Nothing trains the scales behind the prefix, nor the tokenizer, nor the words.
    assert (found["model.visual_embedding.scale.weight"][4:] == 0).all()
    assert not any("vq_model" in name or "lm_head" in name for name in found)


def test_a_batch_of_several_sizes_gives_each_image_what_it_gets_alone(tmp_path):
    sizes = [{"height": 16, "width": 16}, {"height": 28, "width": 8}]
    rows = [{"prompt": text} | size for text, size in zip(TEXTS, sizes)]
    trainer = make_trainer(tmp_path, rows=rows, num_prefix_scales=4)
    rollouts = first_batch(trainer)["rollouts"]
    together = trainer._log_probabilities(trainer.model, rollouts)
    assert {rollout.schedule.final_grid for rollout in rollouts} == {(4, 4), (7, 2)}
    for row, rollout in enumerate(rollouts):
        alone = trainer._log_probabilities(trainer.model, [rollout]).values[0]
        torch.testing.assert_close(together.values[row, together.columns.occupied[row]], alone, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing, image_sampling=GUIDED)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        trainer._compute_loss(trainer.model, first_batch(trainer)).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    # Without it prompts are read once for all of their images: the same sums in another order.
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_a_toy_reward_rises(adapted, tmp_path):
    options = {"max_steps": 12, "learning_rate": 3e-2 if adapted else 5e-3, "per_device_train_batch_size": 16}
    trainer = make_trainer(tmp_path, peft_config=lora() if adapted else None, num_iterations=2, **options)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.2


@pytest.mark.parametrize("adapted", [False, True], ids=["a frozen copy", "the base under the adapter"])
def test_the_reference_stays_where_training_began(adapted, tmp_path):
    model = tiny_model()
    before = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model, peft_config=lora() if adapted else None, max_steps=2)
    trainer.train()
    inputs = first_batch(trainer)
    processor = tiny_processor()
    expected = likelihood_inputs(inputs["rollouts"], before, processor, trainer.sampling)
    with torch.no_grad():
        reference = prefix_log_probabilities(before, *expected, 3)
        policy = trainer._log_probabilities(trainer.model, inputs["rollouts"]).values
    found = reference.columns.place(inputs["ref_per_token_logps"])
    torch.testing.assert_close(found, reference.values, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, policy, atol=1e-3)


def test_rewards_get_images_prompts_codes_and_columns(tmp_path):
    seen = {}

    def look(prompts, completions, completion_ids, answer, image, image_grids, **_):
        seen.update(prompts=prompts, completions=completions, codes=completion_ids, answer=answer, image=image)
        seen["grids"] = image_grids
        return [0.0] * len(prompts)

    rows = [{"prompt": t, "answer": t[::-1], "image": Image.new("RGB", (16, 16), "red")} for t in TEXTS]
    first_batch(make_trainer(tmp_path, reward=look, rows=rows))
    assert [type(shown) for shown in seen["completions"]] == [Image.Image] * 8
    assert {shown.size for shown in seen["completions"]} == {(16, 16)}
    assert seen["answer"] == [prompt[::-1] for prompt in seen["prompts"]]
    assert [len(codes) for codes in seen["codes"]] == [30] * 8 and seen["grids"] == [(4, 4)] * 8
    assert [len(set(seen["prompts"][start : start + 4])) for start in (0, 4)] == [1, 1]
    assert all(shown.getpixel((0, 0)) == (255, 0, 0) for shown in seen["image"])


def test_several_rewards_sync_and_async_add_up_by_weight(tmp_path):
    async def slow(completions, **_):
        await asyncio.sleep(0)
        return [float(index % 4) for index in range(len(completions))]

    def other(completions, **_):
        return [float(index % 4 == 3) for index in range(len(completions))]

    trainer = make_trainer(tmp_path, reward=[slow, other], reward_weights=[1.0, -3.0])
    inputs = first_batch(trainer)
    logs = trainer._metrics["train"]
    assert logs["rewards/slow/mean"] == [1.5] and logs["rewards/other/mean"] == [0.25] and logs["reward"] == [0.75]
    total = torch.tensor([0.0, 1.0, 2.0, 0.0])
    expected = (total - total.mean()) / total.std()
    torch.testing.assert_close(inputs["advantages"].sort().values, expected.repeat(2).sort().values, atol=1e-3, rtol=0)


def test_the_log_has_every_part(tmp_path):
    trainer = make_trainer(tmp_path, image_sampling=GUIDED)
    trainer.train()
    logged = trainer.state.log_history[0]
    per_scale = {
        f"scale_{k}/{name}" for k in (1, 2, 3) for name in ("kl", "entropy", "ratio", "ratio_max", "clip_ratio")
    }
    assert per_scale <= set(logged) and "scale_4/kl" not in logged
    assert {"kl", "entropy", "ratio", "clip_ratio", "reward", "reward_std", "frac_reward_zero_std"} <= set(logged)
    assert {"rewards/low_codes/mean", "rewards/low_codes/std", "rewards/low_codes/skipped"} <= set(logged)
    assert 0 < logged["diversity"] <= 1


# Options --------------------------------------------------------------------------------------------------------------


def test_boxes_mark_the_cells_that_they_touch_at_every_scale():
    schedule = schedules_and_columns(sizes=[(16, 16)])[0][0]
    masks = box_mask([(0.0, 0.0, 0.25, 0.25), (0.6, 0.6, 0.7, 0.7)], schedule).split(schedule.tokens_per_scale)
    assert masks[0].tolist() == [True] and masks[1].tolist() == [True, False, False, True]
    assert masks[2].view(3, 3).tolist() == [[True, False, False], [False, True, True], [False, True, True]]
    assert masks[3].nonzero().flatten().tolist() == [0, 10]
    assert not box_mask([], schedule).any()
    with pytest.raises(ValueError, match="in shares of the image"):
        box_mask([(0.0, 0.0, 16.0, 16.0)], schedule)


def test_the_order_of_prompts_is_that_of_the_epoch_that_begins(tmp_path):
    trainer = make_trainer(tmp_path)
    sampler = trainer._get_train_sampler()
    for epoch, expected in ((None, 0), (0.5, 0), (1 - 1e-9, 1), (1.0, 1), (2.5, 2)):
        trainer.state.epoch = epoch
        assert sampler.epoch() == epoch_of(trainer.state) == expected


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_only_codes_in_boxes_are_trained(level, tmp_path):
    def left_half(completions, **_):
        return [[(0.0, 0.0, 0.5, 1.0)] if index else None for index in range(len(completions))]

    trainer = make_trainer(tmp_path, boxes_func=left_half, beta=0.0, importance_sampling_level=level)
    inputs, seen = first_batch(trainer), []
    found = trainer._log_probabilities
    trainer._log_probabilities = lambda *args: seen.append(found(*args)) or seen[0]
    loss = trainer._compute_loss(trainer.model, inputs)
    gradient = torch.autograd.grad(loss, seen[0].values)[0]
    schedule = inputs["rollouts"][0].schedule
    inside = box_mask([(0.0, 0.0, 0.5, 1.0)], schedule)[:14]
    for row, counted in enumerate(inputs["counted"]):
        expected = torch.ones(14, dtype=torch.bool) if counted.all() else inside
        if inputs["advantages"][row] != 0:
            assert ((gradient[row] != 0) == expected).all()


def test_a_prefix_is_worth_the_soft_maximum_of_its_continuations(tmp_path):
    seen = []

    def reward(completion_ids, **_):
        seen.append(completion_ids)
        return [float(sum(codes) % 7) for codes in completion_ids]

    trainer = make_trainer(tmp_path, reward=reward, num_continuations=3, continuation_eta=2.0)
    first_batch(trainer)
    assert len(seen) == 3
    for one, two, three in zip(*seen):
        assert one[:14] == two[:14] == three[:14] and not one == two == three
    values = torch.tensor([[float(sum(codes) % 7) for codes in row] for row in seen])
    expected = 2 * (values / 2).exp().mean(0).log()
    torch.testing.assert_close(trainer._rewards[:, 0], expected)


def test_the_fine_scales_can_be_held_by_a_penalty_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, fine_beta=1.0, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[1]["scale_4/kl"] > 0
    inputs, model = first_batch(trainer), trainer.model
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    trainer.beta = 1e-12
    model.zero_grad()
    trainer._compute_loss(model, inputs).backward()
    assert (model.model.visual_embedding.scale.weight.grad[4] != 0).any()


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_the_kl_of_all_scales_is_logged_where_asked_for(adapted, tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora() if adapted else None, kl_logging_steps=2, max_steps=3)
    trainer.train()
    kls = [
        [entry.get(f"scale_{scale}/kl_to_reference") for scale in (1, 2, 3, 4)]
        for entry in trainer.state.log_history[:3]
    ]
    assert kls[0] == pytest.approx([0] * 4, abs=1e-6) and kls[1] == [None] * 4
    assert all(value > 0 for value in kls[2])


def test_sheets_of_the_same_prompts_and_seeds_are_saved_along_the_way(tmp_path):
    rows = [{"prompt": "a red circle"}, {"prompt": "one", "image": Image.new("RGB", (16, 16))}]
    grids = ImageGrids(tiny_processor(), rows, every=2, num_images=3)
    make_trainer(tmp_path, callbacks=[grids], max_steps=4, learning_rate=0.0, beta=0.0).train()
    sheets = sorted((tmp_path / "image_grids").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_00000.png", "step_00002.png", "step_00004.png"]
    images = [Image.open(sheet) for sheet in sheets]
    assert images[0].size == (3 * 20 + 4, 2 * 20 + 4)
    assert images[0].tobytes() == images[1].tobytes() == images[2].tobytes()


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_groups_without_variance_teach_nothing_and_are_counted(tmp_path):
    def flat(prompts, **_):
        return [0.1 if prompt == prompts[0] else float(index) for index, prompt in enumerate(prompts)]

    trainer = make_trainer(tmp_path, reward=flat)
    advantages = first_batch(trainer)["advantages"]
    assert (advantages == 0).sum() == 4 and trainer._metrics["train"]["frac_reward_zero_std"] == [0.5]


def test_a_image_that_no_reward_scores_is_left_out_and_counted(tmp_path):
    def picky(completions, **_):
        return [None if index % 4 == 0 else float(index) for index in range(len(completions))]

    trainer = make_trainer(tmp_path, reward=picky)
    advantages = first_batch(trainer)["advantages"]
    assert (advantages == 0).sum() == 4  # the unscored ones, and the middle of each group
    assert trainer._metrics["train"]["rewards/picky/skipped"] == [0.25]


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda n: None, "'broken' must return a list with one number for each image"),
        (lambda n: [1.0] * (n - 1), "'broken' returned 7 rewards for 8 images"),
        (lambda n: [1.0, float("nan")] + [0.0] * (n - 2), "'broken' is nan for image 1"),
        (lambda n: [float("inf")] * n, "'broken' is inf for image 0"),
        (lambda n: {index: 1.0 for index in range(n)}, "must return a list .* got dict"),
        (lambda n: [3e38, -3e38] * (n // 2), r"'broken' is 3e\+38 for image 0; rewards lie within ±1e\+15"),
        (lambda n: 1 / 0, "division by zero"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_broken_reward_ends_training_with_a_clear_error(is_async, answer, message, tmp_path):
    def broken(completions, **_):
        return answer(len(completions))

    async def broken_later(completions, **_):
        return answer(len(completions))

    broken_later.__name__ = "broken"
    trainer = make_trainer(tmp_path, reward=broken_later if is_async else broken)
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        trainer.train()


def test_rewards_are_lists_tensors_and_arrays_of_any_kind_of_number():
    kinds = [
        [1, 0.5, True, None], (np.float32(1), np.float64(0.5), np.True_, None), [torch.tensor(1), 0.5, 1, None],
        [torch.tensor([1.0]), np.array([0.5]), 1, None], iter([1, 0.5, 1, None]),
    ]  # fmt: skip
    for rewards in kinds:
        assert check_rewards("kind", rewards, 4) == [1.0, 0.5, 1.0, None]
    for rewards in (torch.tensor([1, 0.5]), torch.tensor([[1], [0.5]], dtype=torch.bfloat16), np.array([1, 0.5])):
        assert check_rewards("kind", rewards, 2) == [1.0, 0.5]


@pytest.mark.parametrize(
    "rewards, message",
    [
        ({0: 1.0, 1: 0.0}, "must return a list .* got dict"),
        ({0.0, 1.0}, "must return a list .* got set"),
        ("10", "must return a list .* got str"),
        (1.0, "must return a list .* got float"),
        (torch.tensor(1.0), "must return a list .* got Tensor"),
        (low_codes, "must return a list .* got function"),
        (["1", "0"], "'broken' is a str for image 0: a text is not a number"),
        ([0.0, [1.0]], "'broken' is a list for image 1"),
        (torch.ones(2, 2), "'broken' is a Tensor for image 0"),
        (np.ones((2, 2)), "'broken' is a ndarray for image 0"),
        ([1j, 0], "'broken' is a complex for image 0"),
        ([0, 10**400], "'broken' is a int for image 1"),
        (torch.tensor([0.0, torch.nan]), "'broken' is nan for image 1"),
        ([0.0, -1e300], r"'broken' is -1e\+300 for image 1"),
    ],
)
def test_answers_that_are_no_list_of_numbers_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        check_rewards("broken", rewards, 2)


@pytest.mark.parametrize("size", [1.0, 1e8, 1e15])
def test_rewards_of_any_size_teach_the_same(size, tmp_path):
    def reward(completions, **_):
        return [size * (index % 4) / 3 for index in range(len(completions))]

    advantages = first_batch(make_trainer(tmp_path, reward=reward))["advantages"]
    expected = torch.tensor([-1.1619, -0.3873, 0.3873, 1.1619]).repeat(2)
    torch.testing.assert_close(advantages.sort().values, expected.sort().values, atol=0.1, rtol=0)


def test_weights_that_bring_rewards_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reward_weights\[0\] must be a finite number, got inf"):
        make_trainer(tmp_path, reward_weights=[float("inf")])
    with pytest.raises(ValueError, match="reward_weights .* make rewards exceed .* make them smaller"):
        first_batch(make_trainer(tmp_path, reward_weights=[1e30]))


def test_the_soft_maximum_takes_the_smallest_eta():
    rewards = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    torch.testing.assert_close(_value_of_prefix(rewards, 1e-30), torch.tensor([3.0, 5.0]))


# First tries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_the_defaults_fit_the_model_at_hand(adapted, tmp_path):
    # As the bundled checkpoint: the last scales take the likeliest code.
    model = tiny_model()
    model.generation_config.image_sampling = {"temperature": [0.7, 0.7, 0.0, 0.0]}
    args = NextFlowGRPOConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    options = {"peft_config": lora()} if adapted else {}
    rows = Dataset.from_dict({"prompt": TEXTS})
    trainer = NextFlowGRPOTrainer(
        model, low_codes, args, train_dataset=rows, processing_class=tiny_processor(), **options
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.num_prefix_scales == 2 and trainer.num_generations == trainer._train_batch_size == 16
    assert trainer.args.learning_rate == (1e-5 if adapted else 1e-6)
    assert args.learning_rate is None and args.num_prefix_scales is None  # the next model may ask for others


def test_without_arguments_a_trainer_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_dict({"prompt": ["one"]})
    trainer = NextFlowGRPOTrainer(tiny_model(), low_codes, train_dataset=rows, processing_class=tiny_processor())
    assert trainer.num_prefix_scales == 4 and len(trainer.get_train_dataloader()) == 1


@pytest.mark.parametrize(
    "given, batch, group, evaluated",
    [
        ({"per_device_train_batch_size": 8}, 8, 8, 8),
        ({"per_device_train_batch_size": 24}, 24, 12, 12),
        ({"num_generations": 6}, 6, 6, 6),
        ({"num_generations": 32, "num_generations_eval": 2}, 32, 32, 2),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, 1, 8, 8),
        ({"generation_batch_size": 64}, 16, 16, 16),
        ({"generation_batch_size": 6}, 6, 6, 6),
    ],
)
def test_what_is_not_given_of_batches_and_groups_follows_from_what_is(given, batch, group, evaluated, tmp_path):
    config = NextFlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    assert (config.per_device_train_batch_size, config.num_generations) == (batch, group)
    assert config.per_device_eval_batch_size == evaluated


def test_evaluation_runs_with_the_defaults(tmp_path):
    rows = Dataset.from_dict({"prompt": ["one"]})
    args = NextFlowGRPOConfig(
        output_dir=str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1, num_generations=2, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = NextFlowGRPOTrainer(
        tiny_model(), low_codes, args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_processor()
    )
    trainer.train()
    assert any("eval_reward" in entry for entry in trainer.state.log_history)


def stream(rows) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("make", [Dataset.from_list, stream], ids=["table", "stream"])
def test_fewer_prompts_than_a_batch_takes_are_refused(make, tmp_path):
    options = {"per_device_train_batch_size": 8, "num_generations": 2}
    rows = [{"prompt": text} for text in TEXTS]
    assert make_trainer(tmp_path, rows=make(rows), **options)
    for few in (rows[:3], rows[:1]):
        with pytest.raises(ValueError, match=f"train_dataset has {len(few)} rows, but each batch takes 4 prompts"):
            make_trainer(tmp_path, rows=make(few), **options)


def test_rows_without_a_prompt_are_refused_by_number(tmp_path):
    rows = [{"prompt": text, "answer": "no"} for text in TEXTS]
    unnamed = [{"text": text} for text in TEXTS]
    for found, message in (
        (Dataset.from_list(unnamed), r"Row 0 of train_dataset has no 'prompt', only \['text'\]"),
        (Dataset.from_list([*rows, {"answer": "no"}]), "rows of train_dataset: Prompt 4 must be a string, got None"),
        (Dataset.from_list([*rows, {"prompt": " "}]), "rows of train_dataset: Prompt 4 is empty"),
        (stream([rows[0], {"answer": "no", "prompt": None}]), "Prompt 1 must be a string, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, rows=found)
    made = Dataset.from_list(rows)
    made.set_transform(lambda batch: {"text": batch["prompt"]})
    with pytest.raises(ValueError, match="Row 0 of train_dataset has no 'prompt'"):
        make_trainer(tmp_path, rows=made)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="Row 1 of the batch has no 'prompt'"):
        trainer._generate_and_score_completions([{"prompt": "one"}, {"text": "two"}])


def test_a_model_that_draws_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a NextFlowForConditionalGeneration, .* got Linear"):
        make_trainer(tmp_path, model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_prefix_scales": 5}, "num_prefix_scales is 5, but the model draws in 4"),
        ({"num_prefix_scales": 0}, "num_prefix_scales must be at least 1"),
        ({"beta": 0.0, "fine_beta": 0.1}, "compare with a reference"),
        ({"image_sampling": {"temperature": [1.0, 1.0, 0.0, 0.0]}}, "Scale 3 is drawn at temperature 0"),
        ({"image_sampling": {"top_k": [5, 5, 1, 1]}}, "top_k of 1: .* Set num_prefix_scales to 2, or another"),
        ({"image_sampling": {"temperature": 0.0}, "num_prefix_scales": None}, "cannot learn. Set another temperature"),
        ({"num_generations": None, "per_device_train_batch_size": 1}, "A batch of 1 rollouts cannot be divided"),
        ({"image_sampling": {"top_p": 2.0}}, "top_p must be above 0"),
        ({"max_prompt_length": 3}, "tokens with its images, and max_prompt_length is 3; shorten it"),
        ({"likelihood": "plain"}, "likelihood must be one of"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be one of"),
        ({"max_advantage": 0.0}, "max_advantage must be positive"),
        ({"temperature": 0.5}, "temperature=0.5 has no meaning for images"),
        ({"save_strategy": "steps", "save_steps": 1, "num_iterations": 2}, "use a multiple of 2"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_rewards_that_are_models_and_prompts_that_are_no_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="A reward of images is a function"):
        make_trainer(tmp_path, reward=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Prompt 0 must be a string"):
        first_batch(make_trainer(tmp_path, rows=[{"prompt": 5}] * 4))


def test_a_prompt_with_images_that_is_too_long_is_refused():
    rows = [{"prompt": "one", "image": Image.new("RGB", (16, 16))}]
    with pytest.raises(ValueError, match="with its images, and max_prompt_length is 20"):
        generate_rollouts(
            tiny_model(), tiny_processor(), rows, tiny_model().default_image_sampling, max_prompt_length=20
        )


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers_nextflow.trainers.rl.grpo_config")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install transformers-nextflow\[rl\]"):
        importlib.import_module("transformers_nextflow.trainers.rl.grpo_config")


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_a_killed_run_goes_on_exactly(adapted, tmp_path):
    # Four prompts, two a step: the third step is in the second epoch.
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}

    def train(checkpoint=None) -> dict[str, torch.Tensor]:
        model = tiny_model()
        trainer = make_trainer(tmp_path, model, peft_config=lora() if adapted else None, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = train()
    resumed = train(checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
