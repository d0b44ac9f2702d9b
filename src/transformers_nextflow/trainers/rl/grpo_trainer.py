"""RL on the first scales of images: TRL's GRPO with images as completions (paper, section 3.2.5)."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import nn
from transformers import AutoProcessor

from ...generation.prefix_likelihood import PrefixColumns, PrefixLogProbabilities, prefix_log_probabilities
from ...generation.sampling import ImageSampling
from ...modeling_nextflow import NextFlowForConditionalGeneration
from ...processing_nextflow import NextFlowProcessor
from ...utils.folder_parts import load_model, load_part
from ..runs.averaged_weights import AveragedWeightsMixin
from ..runs.epochs import epoch_of
from ..runs.finite_training import FiniteTrainingMixin
from ..runs.resumable_training import ResumableTrainingMixin
from ..runs.trained_weights import (
    TrainedInFloat32Mixin,
    check_trained_weights,
    gathered_weights,
    prepare_sharding,
)
from ..runs.training_card import TrainingCardMixin
from .checked_reward import LARGEST_REWARD, validated_reward
from .grpo_config import NextFlowGRPOConfig
from .prefix_objective import Box, box_mask, kl_to_reference, policy_terms, scale_shares
from .prompt_rows import IMAGE_COLUMNS, check_dataset, check_rows, prompts_as_texts
from .rollouts import Rollout, check_lengths, continue_rollouts, generate_rollouts, likelihood_inputs


try:
    from trl import GRPOTrainer
    from trl.models import prepare_fsdp, unwrap_model_for_generation
    from trl.trainer.utils import RepeatSampler, disable_dropout_in_model, use_adapter
except ImportError as error:
    raise ImportError("RL needs trl: pip install transformers-nextflow[rl]") from error


# The paper's m, of 18 scales.
MAX_PREFIX_SCALES = 8


class PromptSampler(RepeatSampler):
    """TRL's sampler of groups, in an order that depends only on seed and epoch, so that a resumed run continues it."""

    def __init__(self, *args, epoch: Callable[[], int], **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        yield from super().__iter__()


class NextFlowGRPOTrainer(
    TrainingCardMixin,
    TrainedInFloat32Mixin,
    ResumableTrainingMixin,
    AveragedWeightsMixin,
    FiniteTrainingMixin,
    GRPOTrainer,
):
    """Trains a [`NextFlowForConditionalGeneration`] on rewards of the images that it draws.

    It works as TRL's `GRPOTrainer`, with these differences. A row of the dataset has `prompt`, a text or a conversation
    of one user's turn, of which the text is used; to edit images it also has `image` or `images`; `height` and `width`
    are optional. A reward function is called as `reward(prompts, completions, completion_ids, **columns)`:
    `completions` are PIL images, `completion_ids` their codes, and the columns are the other columns of the dataset and
    `image_grids`, the final grids. In training only the prompt and the first `num_prefix_scales` scales run through the
    model.

    Args:
        model: the model, a PEFT model around it, or the folder or repository of a checkpoint, which is loaded in
            float32.
        reward_funcs: one function or several, sync or async; see `args.reward_weights`.
        processing_class: the checkpoint's [`NextFlowProcessor`]; default, if `model` is a folder or repository: its
            own.
        peft_config: config of an adapter to train; the reference is then the model without it.
        boxes_func: a function with the arguments of a reward; it returns for each image the boxes that decided about
            its reward, (left, top, right, bottom) in shares of its sides: only codes in them are trained. `None` for
            the whole image.
        Others: as in TRL.

    Raises:
        ValueError: for settings or a processor that do not fit the model, trainable weights that are not float32, fewer
            prompts than a batch needs, a row without a prompt, a prompt that is too long, and rewards that are no
            numbers.
    """

    args: NextFlowGRPOConfig
    _tag_names = ["trl", "grpo", "nextflow"]

    def __init__(
        self,
        model: nn.Module | str | os.PathLike,
        reward_funcs: Callable | list[Callable],
        args: NextFlowGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        processing_class: NextFlowProcessor | None = None,
        peft_config=None,
        boxes_func: Callable | None = None,
        **kwargs,
    ):
        model, processing_class = _open_model(model, processing_class)
        base_model = _base_model(model)
        if train_dataset is not None:
            train_dataset = prompts_as_texts(train_dataset)
        if kwargs.get("eval_dataset") is not None:
            kwargs["eval_dataset"] = prompts_as_texts(kwargs["eval_dataset"])
        # A copy, in which missing settings are filled in to fit the model.
        args = copy.copy(args or NextFlowGRPOConfig(output_dir="nextflow-grpo"))
        self.sampling = base_model.default_image_sampling
        if args.image_sampling is not None:
            self.sampling = ImageSampling.from_dict(args.image_sampling)
        self.num_prefix_scales = args.num_prefix_scales = _prefix(args.num_prefix_scales, base_model, self.sampling)
        if train_dataset is not None:
            check_dataset("train_dataset", train_dataset, args.generation_batch_size // args.num_generations)
        self.boxes_func = boxes_func
        # The current batch: TRL's methods, which call ours, pass on only token ids.
        self._inputs: list[dict] = []
        self._rollouts: list[Rollout] = []
        self._rewards: torch.Tensor | None = None
        self._counted_codes: list[torch.Tensor] | None = None

        if peft_config is None:
            check_trained_weights(model, args)
        trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        is_adapted = peft_config is not None or is_peft_model(model)
        if args.learning_rate is None:
            args.learning_rate = 1e-5 if is_adapted else 1e-6
        reference = None if is_adapted or args.beta == 0 else _frozen_copy(model)
        # TRL would load the reference by the name of the model, but a model made in memory has none.
        beta, args.beta = args.beta, args.beta if is_adapted else 0.0
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(
            model=model, reward_funcs=[validated_reward(function, args.reward_timeout) for function in reward_funcs],
            args=args, train_dataset=train_dataset, processing_class=processing_class, peft_config=peft_config,
            **kwargs,
        )  # fmt: skip
        self.beta = args.beta = beta
        if args.deepspeed_plugin is None:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                    # TRL rounds the adapters of a quantised model.
                    parameter.data = trained.get(parameter, parameter.data).to(parameter.device, torch.float32)
        prepare_sharding(self)
        if reference is not None:
            disable_dropout_in_model(reference)
            if self.is_fsdp_enabled:
                self.ref_model = prepare_fsdp(reference, self.accelerator)
            else:
                self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if args.max_prompt_length is not None and isinstance(train_dataset, Dataset):
            # Checked now, so that a long run does not fail at such a prompt later.
            prompts = train_dataset.unique("prompt")
            rows = [[*row, processing_class.boi_token_id] for row in processing_class.prompt_ids(prompts)]
            check_lengths(prompts, rows, args.max_prompt_length)

    def _get_train_sampler(self, dataset=None) -> PromptSampler:
        return PromptSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            epoch=lambda: epoch_of(self.state),
        )

    def record_extras(self) -> dict:
        boxes = None if self.boxes_func is None else getattr(self.boxes_func, "__name__", "")
        return {"reference": self.ref_model, "rewards": self.reward_func_names, "boxes_func": boxes}

    # Rollouts ---------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        # TRL scores, compares and logs; it does not get the images of prompts, which are read here.
        check_rows("the batch", inputs)
        self._inputs = inputs
        hidden = [{name: value for name, value in row.items() if name not in IMAGE_COLUMNS} for row in inputs]
        output = super()._generate_and_score_completions(hidden)
        limit, advantages = self.args.max_advantage, output["advantages"].clone()
        advantages[self._in_groups_without_variance()] = 0
        self._log_diversity()
        if self.args.kl_logging_steps is not None and self.state.global_step % self.args.kl_logging_steps == 0:
            self._log_kl_of_scales()
        kept = {name: output[name] for name in ("old_per_token_logps", "ref_per_token_logps") if name in output}
        if self._counted_codes is not None:
            kept["counted"] = self._counted_codes
        return {"advantages": advantages.clamp(-limit, limit), "rollouts": self._rollouts} | kept

    def _generate(self, prompts: list[str]):
        self.check_weights()  # no code can be sampled with weights that are not finite
        with self._generation_model() as model:
            self._rollouts, images = generate_rollouts(
                model, self.processing_class, self._inputs, self.sampling, self.args.max_prompt_length
            )
        prompt_ids = [rollout.contexts[0] for rollout in self._rollouts]
        return prompt_ids, _codes(self._rollouts), None, images, None, {}, None, []

    @contextmanager
    def _generation_model(self):
        """The policy for drawing, with all weights on every process, since images of different sizes take different
        numbers of passes. It is in evaluation mode, since gradient checkpointing would drop the cache.
        """
        gathers = self.args.ds3_gather_for_generation
        with (
            gathered_weights(self.model_wrapped),
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, gathers) as model,
        ):
            was_training = model.training
            model.eval()
            try:
                yield _base_model(model)
            finally:
                model.train(was_training)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        grids = [rollout.schedule.final_grid for rollout in self._rollouts]
        rows = [row | {"image_grids": grid} for row, grid in zip(self._inputs, grids)]
        rewards = [super()._calculate_rewards(rows, prompts, completions, completion_ids_list)]
        for _ in range(self.args.num_continuations - 1):
            begun = [replace(rollout, image_tokens=self._prefix(rollout)) for rollout in self._rollouts]
            with self._generation_model() as model:
                others, images = continue_rollouts(model, self.processing_class, begun, self.sampling)
            rewards.append(super()._calculate_rewards(rows, prompts, images, _codes(others)))
        self._rewards = _value_of_prefix(torch.stack(rewards), self.args.continuation_eta)
        if bool(((self._rewards * self.reward_weights.to(self._rewards)).abs() > LARGEST_REWARD).any()):
            raise ValueError(
                f"reward_weights {self.reward_weights.tolist()} make rewards exceed ±{LARGEST_REWARD:.0e}; make them "
                "smaller."
            )
        for name, column in zip(self.reward_func_names, self._rewards.T):
            self._metrics[self._mode][f"rewards/{name}/skipped"].append(column.isnan().float().mean().item())
        if self.boxes_func is not None:
            columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
            columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list}
            self._counted_codes = self._codes_in_boxes(self.boxes_func(**columns))
        return self._rewards

    def _codes_in_boxes(self, boxes: Sequence[Sequence[Box] | None]) -> list[torch.Tensor]:
        if not isinstance(boxes, list | tuple) or len(boxes) != len(self._rollouts):
            found = f"{len(boxes)} lists" if isinstance(boxes, list | tuple) else f"a {type(boxes).__name__}"
            raise ValueError(f"boxes_func returned {found} for {len(self._rollouts)} images; return one each.")
        return [
            torch.ones(r.schedule.num_tokens, dtype=torch.bool) if own is None else box_mask(own, r.schedule)
            for own, r in zip(boxes, self._rollouts)
        ]

    def _in_groups_without_variance(self) -> torch.Tensor:
        """A mask of this process's images in groups with equal rewards, which advantages may not show after
        rounding.
        """
        count = self.num_generations if self._mode == "train" else self.num_generations_eval
        groups = self._rewards.nan_to_num(torch.inf).unflatten(0, (-1, count))
        flat = (groups == groups[:, :1]).flatten(1).all(1).repeat_interleave(count)
        start = self.accelerator.process_index * len(self._rollouts)
        return flat[start : start + len(self._rollouts)]

    def _log_diversity(self):
        """Log the share of prefix codes in which two images of a group differ; from a group with zero nothing is
        learned.
        """
        codes = gather_object([self._prefix(rollout).tolist() for rollout in self._rollouts])
        count = self.num_generations if self._mode == "train" else self.num_generations_eval
        shares = [
            sum(a != b for a, b in zip(one, other)) / len(one)
            for start in range(0, len(codes), count)
            for one, other in combinations(codes[start : start + count], 2)
        ]
        if shares:
            self._metrics[self._mode]["diversity"].append(sum(shares) / len(shares))

    def _prefix(self, rollout: Rollout) -> torch.Tensor:
        schedule = rollout.schedule
        return rollout.image_tokens[: schedule.offsets[min(self.num_prefix_scales, schedule.num_scales)]]

    # Likelihoods ------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model, *args, batch_size: int | None = None, **kwargs):
        """The log-probabilities of the prefixes of the current rollouts, a list of (n,). TRL calls this once for the
        old policy and once for the reference.
        """
        size, rows = batch_size or len(self._rollouts), []
        for start in range(0, len(self._rollouts), size):
            found = self._log_probabilities(model, self._rollouts[start : start + size])
            rows += [values[own] for values, own in zip(found.values, found.columns.occupied)]
        return rows, None, None

    def _log_probabilities(
        self, model: nn.Module, rollouts: Sequence[Rollout], num_scales: int | None = None
    ) -> PrefixLogProbabilities:
        base_model = _base_model(self.accelerator.unwrap_model(model))
        prompts, contexts, drawing = likelihood_inputs(rollouts, base_model, self.processing_class, self.sampling)
        return prefix_log_probabilities(
            base_model,
            prompts,
            [] if self.args.likelihood == "cond" else contexts,
            drawing,
            num_scales or self._num_seen_scales,
            truncate=self.args.likelihood == "guided_truncated",
            forward=model,
        )

    @property
    def _num_seen_scales(self) -> int:
        return self._num_scales if self.args.fine_beta else self.num_prefix_scales

    @torch.no_grad()
    def _log_kl_of_scales(self):
        """Log the KL of every scale; scales that are not trained change too, since weights are shared."""
        size, metrics = self.args.per_device_train_batch_size, self._metrics[self._mode]
        totals = torch.zeros(2, self._num_scales, device=self.accelerator.device)
        for start in range(0, len(self._rollouts), size):
            rollouts = self._rollouts[start : start + size]
            new = self._log_probabilities(self.model, rollouts, self._num_scales)
            with self._reference() as reference:
                old = self._log_probabilities(reference, rollouts, self._num_scales)
            totals += torch.stack(
                [new.columns.sums(kl_to_reference(new.values, old.values)), new.columns.counts()]
            ).sum(1)
        sums, counts = self.accelerator.reduce(totals, reduction="sum")
        for scale, mean in enumerate((sums / counts).tolist(), start=1):
            metrics[f"scale_{scale}/kl_to_reference"].append(mean)

    @contextmanager
    def _reference(self):
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    # The loss ---------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict) -> torch.Tensor:
        rollouts, advantages = inputs["rollouts"], inputs["advantages"]
        found = self._log_probabilities(model, rollouts)
        columns, new = found.columns, found.values
        # Without them the current policy is the one that drew.
        old = columns.place(inputs["old_per_token_logps"]) if "old_per_token_logps" in inputs else new.detach()
        schedules, alpha = [rollout.schedule for rollout in rollouts], self.args.scale_alpha
        in_prefix = columns.scales <= self.num_prefix_scales
        weights = scale_shares(schedules, columns, alpha, in_prefix)
        counted = columns.place(inputs["counted"]) if "counted" in inputs else columns.occupied
        trained = scale_shares(schedules, columns, alpha, counted & in_prefix)
        level, epsilon = self.args.importance_sampling_level, (self.epsilon_low, self.epsilon_high)
        terms, ratios, is_clipped = policy_terms(new - old, advantages, trained, columns, level, epsilon, counted)
        loss = -terms.sum(1).mean()
        self.note({"policy_loss": loss})
        values = {"entropy": found.entropies, "ratio": ratios.detach(), "clip_ratio": is_clipped.float()}
        if self.beta != 0:
            kl = kl_to_reference(new, columns.place(inputs["ref_per_token_logps"]))
            penalty = self.beta * weights
            if self.args.fine_beta:
                penalty = penalty + self.args.fine_beta * scale_shares(schedules, columns, alpha, ~in_prefix)
            kl_loss = (kl * penalty).sum(1).mean()
            self.note({"kl_loss": kl_loss})
            loss = loss + kl_loss
            values["kl"] = kl.detach()
        self._log_scales(values, columns)
        return loss / (self.current_gradient_accumulation_steps if self._mode == "train" else 1)

    def _log_scales(self, values: dict[str, torch.Tensor], columns: PrefixColumns):
        """Log means over the codes of each scale and over all of the prefix, and the largest ratio of each scale."""
        metrics, counts = self._metrics[self._mode], columns.counts().sum(0)
        totals = torch.stack([columns.sums(value).sum(0) for value in values.values()] + [counts])
        *sums, counts = self.accelerator.reduce(totals, reduction="sum")
        ratios = values["ratio"].masked_fill(~columns.occupied, 0).amax(0)
        largest = ratios.new_zeros(columns.num_scales).scatter_reduce(0, columns.scales - 1, ratios, "amax")
        largest = self.accelerator.gather(largest[None]).amax(0)
        for name, per_scale in zip(values, sums):
            metrics[name].append((per_scale.sum() / counts.sum()).item())
            for scale, mean in enumerate((per_scale / counts).tolist(), start=1):
                metrics[f"scale_{scale}/{name}"].append(mean)
        for scale, ratio in enumerate(largest.tolist(), start=1):
            metrics[f"scale_{scale}/ratio_max"].append(ratio)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _num_scales(self) -> int:
        return len(self.model.config.vq_config.scales)


def _codes(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [rollout.image_tokens.tolist() for rollout in rollouts]


def _value_of_prefix(rewards: torch.Tensor, eta: float) -> torch.Tensor:
    """Rewards (K, …) of images that continue the same prefix → the value of the prefix; of one image its reward."""
    best = rewards.amax(0)  # the others are relative to it, so that no quotient overflows
    return best + eta * (((rewards - best) / eta).logsumexp(0) - math.log(len(rewards)))


def _open_model(
    model: nn.Module | str | os.PathLike, processor: NextFlowProcessor | None
) -> tuple[nn.Module, NextFlowProcessor]:
    """The model and its processor; a folder or repository is loaded. Raises `ValueError` for a model that RL does not
    train, and for the processor of another model.
    """
    if isinstance(model, str | os.PathLike):
        processor = processor or load_part(AutoProcessor, "processor", model)
        model = load_model(NextFlowForConditionalGeneration, model, dtype=torch.float32)
    if not isinstance(processor, NextFlowProcessor):
        raise ValueError(f"processing_class must be a NextFlowProcessor, got {type(processor).__name__}.")
    base_model = _base_model(model) if isinstance(model, nn.Module) else model
    if not isinstance(base_model, NextFlowForConditionalGeneration):
        raise ValueError(
            "model must be a NextFlowForConditionalGeneration, or a PEFT model around it, got "
            f"{type(base_model).__name__}."
        )
    if (base_model.tp_size or 1) > 1:
        raise ValueError(
            f"The model is sharded over {base_model.tp_size} processes (tensor parallel), which RL does not draw "
            "with; load it without tp_plan, and shard it by FSDP2 (recipes/accelerate/fsdp2.yaml)."
        )
    processor.check_fits(base_model.config)
    return model, processor


def _base_model(model: nn.Module) -> nn.Module:
    """The model inside of a PEFT model; its layers still hold the adapter."""
    return model.get_base_model() if is_peft_model(model) else model


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the vision tokenizer, which is never trained."""
    return copy.deepcopy(model, {id(model.vq_model): model.vq_model}).requires_grad_(False).eval()


def _prefix(asked: int | None, model: nn.Module, sampling: ImageSampling) -> int:
    """How many scales are trained. Raises `ValueError` for more scales than the model draws, and for a prefix with a
    scale at temperature 0.
    """
    most = len(model.config.vq_config.scales)
    count = min(MAX_PREFIX_SCALES, most) if asked is None else asked
    if count > most:
        raise ValueError(f"num_prefix_scales is {count}, but the model draws in {most}; use at most {most}.")
    for _, num_scales in model.config.vq_config.scale_schedules.levels:
        certain = [scale for scale in range(min(count, num_scales)) if not sampling.is_sampled_at(scale, num_scales)]
        if certain and (asked is not None or certain[0] == 0):
            fewer = f"Set num_prefix_scales to {certain[0]}, or" if certain[0] else "Set"
            raise ValueError(
                f"Scale {certain[0] + 1} is drawn at temperature 0, or with a top_k of 1: all images of a group take "
                f"the same codes, and it cannot learn. {fewer} another temperature and top_k in image_sampling."
            )
        count = min([count, *certain])
    return count
