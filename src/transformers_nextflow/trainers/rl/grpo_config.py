"""Settings of RL on images: TRL's settings, and those that images add."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from ...generation.sampling import ImageSampling
from ...utils.typed_values import is_of_type
from ..runs.checked_arguments import NOT_NEGATIVE, CheckedArguments
from .prefix_objective import RATIO_LEVELS


try:
    from accelerate.utils import get_int_from_env
    from trl import GRPOConfig
except ImportError as error:
    raise ImportError("RL needs trl: pip install transformers-nextflow[rl]") from error


# "cond": without guidance and truncation; "guided": with guidance; "guided_truncated": the sampler's own policy.
LIKELIHOODS = ("cond", "guided", "guided_truncated")
# Images of a group if neither batches nor groups are given (arXiv 2601.02256); smaller batches make smaller groups.
GROUP_SIZE = 16
# What batches and groups are divided by.
COUNTS = (
    "num_generations", "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size",
    "gradient_accumulation_steps", "per_device_train_batch_size",
)  # fmt: skip
# What TRL has for texts, or for losses other than the one here.
NOT_FOR_IMAGES = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "cache_implementation",
    "max_completion_length", "use_vllm", "use_transformers_continuous_batching", "chat_template_kwargs",
    "model_init_kwargs", "cast_lm_head_to_fp32", "loss_type", "delta", "top_entropy_quantile", "entropy_coef",
    "use_adaptive_entropy", "off_policy_mask_threshold", "use_bias_correction_kl", "mask_truncated_completions",
    "sync_ref_model", "log_completions",
)  # fmt: skip


@dataclass
class NextFlowGRPOConfig(CheckedArguments, GRPOConfig):
    """TRL's `GRPOConfig` and settings for images. If the paper (section 3.2.5) gives no value, the default is ours.
    See also [`CheckedArguments`].

    `epsilon`, `epsilon_high`, `beta`, `num_iterations`, `scale_rewards`, `reward_weights` and all settings of batches
    have the same meaning as in TRL. Settings for texts raise an error if they are set.

    Args:
        num_generations: images of a group, which share a prompt; default: the largest number up to 16 that divides the
            batch of rollouts.
        per_device_train_batch_size, per_device_eval_batch_size: images of a process's batch; default: one group.
        learning_rate: default: 1e-6, or 1e-5 if an adapter is trained.
        num_prefix_scales: how many of the first scales are trained (the paper's m); only these run through the model in
            training. Default: the paper's 8, or fewer if the checkpoint has fewer scales before its first scale at
            temperature 0.
        scale_alpha: a code of an h x w grid has the weight (h·w)^-scale_alpha.
        likelihood: the probabilities that are compared: "guided_truncated", those from which codes were sampled;
            "guided", without top-k and top-p; "cond", without guidance too, at a half or a third of the cost.
        importance_sampling_level: the ratio that is clipped: of each "token", "scale_mean" or "scale_product".
        image_sampling: settings of the rollouts, those of [`ImageSampling`]; default: the checkpoint's own.
        num_continuations: draw this many images from each prefix, and reward the prefix by their common value: eta ·
            log(mean(exp(reward / eta))), the "value as middle return" of arXiv 2601.02256.
        continuation_eta: the eta in this formula: with small values the best image counts most, with large ones the
            mean.
        fine_beta: penalty on the KL of the scales after the prefix, which the same weights draw; above 0 all scales run
            through the model in training.
        kl_logging_steps: number of steps after which the KL of all scales is logged, `scale_k/kl_to_reference`; it
            costs two passes over all scales.
        max_advantage: advantages are clipped at this many standard deviations.
        max_prompt_length: in tokens, the slots of images included; a longer prompt raises an error, before training if
            the text is too long, else when the image is drawn.
        reward_timeout: seconds after which an async reward that has not returned ends the training; `None` waits for
            ever. A reward that is not async cannot be interrupted.
    """

    rules = ((("beta", "fine_beta", "epsilon", "epsilon_high", "continuation_eta"), *NOT_NEGATIVE),)

    num_generations: int | None = field(default=None)
    per_device_train_batch_size: int | None = field(default=None)
    per_device_eval_batch_size: int | None = field(default=None)
    learning_rate: float | None = field(default=None)
    adam_beta2: float = field(default=0.95)
    weight_decay: float = field(default=0.05)
    max_grad_norm: float = field(default=1.0)
    beta: float = field(default=0.01)
    disable_dropout: bool = field(default=True)
    num_prefix_scales: int | None = field(default=None)
    scale_alpha: float = field(default=0.9)
    likelihood: str = field(default="guided_truncated")
    importance_sampling_level: str = field(default="token")
    image_sampling: dict | None = field(default=None)
    num_continuations: int = field(default=1)
    continuation_eta: float = field(default=1.0)
    fine_beta: float = field(default=0.0)
    kl_logging_steps: int | None = field(default=None)
    max_advantage: float = field(default=5.0)
    max_prompt_length: int | None = field(default=None)
    reward_timeout: float | None = field(default=1800)

    def __post_init__(self):
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False  # TRL's default would be an error on a machine without an accelerator
        for name in COUNTS:
            if (value := getattr(self, name)) is not None and not (is_of_type(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}.")
        self._fill_batches_with_groups()
        super().__post_init__()
        for name, allowed in (("likelihood", LIKELIHOODS), ("importance_sampling_level", RATIO_LEVELS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("num_prefix_scales", "num_continuations", "kl_logging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("max_advantage", "continuation_eta", "reward_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.beta == 0 and (self.fine_beta or self.kl_logging_steps):
            raise ValueError(
                "fine_beta and kl_logging_steps compare with a reference, which beta=0 leaves out; set beta."
            )
        defaults = {f.name: f.default for f in fields(self)}
        for name in NOT_FOR_IMAGES:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for images; leave it out. How they are drawn is "
                    "set by image_sampling."
                )
        cycle = self.steps_per_generation * self.num_iterations
        saved = self.save_steps * self.gradient_accumulation_steps
        if self.save_strategy == "steps" and self.save_steps >= 1 and saved % cycle:
            raise ValueError(
                f"save_steps={self.save_steps} would save between the steps that share one batch of rollouts, from "
                f"which no run can be resumed exactly; use a multiple of {cycle} / gradient_accumulation_steps steps."
            )
        ImageSampling.from_dict(self.image_sampling or {})  # raises for invalid values

    def _fill_batches_with_groups(self):
        """Choose missing sizes of batches and groups so that they fit the given ones: a batch holds whole groups."""
        processes = get_int_from_env(("WORLD_SIZE",), 1)
        if self.per_device_train_batch_size is None:
            group = self.num_generations or GROUP_SIZE
            share = group if self.generation_batch_size is None else self.generation_batch_size // processes
            self.per_device_train_batch_size = _largest_divisor(share, group)
        if self.num_generations is None:
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            batch = self.generation_batch_size or self.per_device_train_batch_size * processes * steps
            self.num_generations = _largest_divisor(batch, GROUP_SIZE)
            if self.num_generations == 1:
                raise ValueError(
                    f"A batch of {batch} rollouts cannot be divided into groups of 2 to {GROUP_SIZE}; give another "
                    "per_device_train_batch_size, or num_generations."
                )
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.num_generations_eval or self.num_generations


def _largest_divisor(number: int, most: int) -> int:
    return next((divisor for divisor in range(min(number, most), 1, -1) if number % divisor == 0), 1)
