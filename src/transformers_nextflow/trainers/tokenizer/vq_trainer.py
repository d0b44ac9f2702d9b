"""Training of the vision tokenizer on `Trainer`, in the paper's stages (section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ...evaluation.image_metrics import contact_sheet, psnr, ssim, to_uint8
from ...modeling_nextflow_vq import NextFlowVQModel, NextFlowVQOutput, codebook_statistics, leave_out_of_sharding
from ...utils.atomic_files import atomic_write
from ..runs.averaged_weights import AveragedWeightsMixin
from ..runs.checked_arguments import FROM_ONE, NOT_NEGATIVE, SHARE, CheckedArguments
from ..runs.epochs import SetEpochCallback
from ..runs.finite_training import FiniteTrainingMixin
from ..runs.resumable_training import ResumableTrainingMixin
from ..runs.trained_weights import TrainedInFloat32Mixin, check_trained_weights
from ..runs.training_card import TrainingCardMixin
from .adversarial import Adversary
from .codebook_maintenance import initialize_codebook, revive_dead_codes
from .image_batches import OneSizeSampler
from .stages import STAGES


CONTACT_SHEET_COLUMNS = 12
TRAINER_FILE = "vq_trainer.pt"


@dataclass
class NextFlowVQTrainingArguments(CheckedArguments, TrainingArguments):
    """`TrainingArguments` and arguments of the tokenizer's stages; see also [`CheckedArguments`].

    Args:
        stage: a name of `STAGES`, which says what is trained and with which losses: "pixel" trains the pixel branch as
            a plain autoencoder; "joint" all parts; "codebook" starts the codebooks from k-means and trains them and the
            decoders with frozen encoders; "decoder" trains only the pixel decoder, with frozen encoders and codes.
        autoencoder_share: share of the joint stage's steps before codes are used. Then the codebooks start from k-means
            over the latents. With 0 training continues with the codebooks as they are; with 1 the joint stage uses no
            codes and leaves them to the codebook stage.
        scale_dropout: share of the images that are decoded from only some of their first scales; how many is sampled
            uniformly, so with 1 half of all scales are dropped on average.
        latent_noise: standard deviation of the noise on the latents while no codes are used.
        pixel_weight, semantic_weight, codebook_weight, perceptual_weight, adversarial_weight: weights of the losses;
            with a semantic_weight of 0 no teacher is needed.
        adversarial_start: share of the steps after which the adversarial loss begins.
        revive_every: number of steps after which codes that were not used since are moved to vectors of the batch; 0:
            never.
        kmeans_images: how many images, the first of the training set, k-means uses.
        kmeans_shares: number of codes that each scale gets at the start; default: equal shares.
    """

    rules = (
        (("autoencoder_share", "scale_dropout", "adversarial_start"), *SHARE),
        (("latent_noise", "pixel_weight", "semantic_weight", "codebook_weight"), *NOT_NEGATIVE),
        (("perceptual_weight", "adversarial_weight", "revive_every"), *NOT_NEGATIVE),
        (("kmeans_images",), *FROM_ONE),
    )

    stage: str = field(default="joint")
    autoencoder_share: float = field(default=0.4)
    scale_dropout: float = field(default=0.5)
    latent_noise: float = field(default=0.1)
    pixel_weight: float = field(default=1.0)
    semantic_weight: float = field(default=1.0)
    codebook_weight: float = field(default=1.0)
    perceptual_weight: float = field(default=0.0)
    adversarial_weight: float = field(default=0.0)
    adversarial_start: float = field(default=0.5)
    revive_every: int = field(default=100)
    kmeans_images: int = field(default=4096)
    kmeans_shares: list[int] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {tuple(STAGES)}, got {self.stage!r}.")


class ImageCollator:
    """Stacks the tensors of dict rows. Raises `ValueError` for `pixel_values` (3, H, W) of different sizes."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
        shapes = sorted({tuple(image.shape) for image in columns["pixel_values"]})
        if len(shapes) > 1:
            raise ValueError(f"Images of a batch must have one size, got {shapes}; resize them, or batch by size.")
        return {name: torch.stack(column) for name, column in columns.items()}


class NextFlowVQTrainer(
    TrainingCardMixin, TrainedInFloat32Mixin, ResumableTrainingMixin, AveragedWeightsMixin, FiniteTrainingMixin, Trainer
):
    """Trains a [`NextFlowVQModel`].

    Rows hold `pixel_values` (3, H, W) in [-1, 1] and whatever `semantic_loss` reads. A data set of images of several
    sizes says which each has by `sizes`, and each batch has images of one.

    Args:
        teacher: frozen module that maps pixels (B, 3, H, W) to features (B, h, w, D), which the semantic decoder learns
            to predict. A subclass with better targets may override `semantic_loss` instead.
        perceptual: callable (reconstruction, pixels) → (B,) or scalar distance, such as LPIPS.
        discriminator: see [`PatchDiscriminator`]; trained beside the model when `adversarial_weight` > 0.
    """

    args: NextFlowVQTrainingArguments

    def __init__(
        self,
        model: NextFlowVQModel,
        args: NextFlowVQTrainingArguments,
        train_dataset: Dataset,
        teacher: nn.Module | None = None,
        perceptual: Callable | None = None,
        discriminator: nn.Module | None = None,
        **kwargs,
    ):
        if args.perceptual_weight and perceptual is None:
            raise ValueError("perceptual_weight > 0 needs `perceptual=`, for instance what load_perceptual gives.")
        if args.adversarial_weight and discriminator is None:
            raise ValueError("adversarial_weight > 0 needs `discriminator=`, for instance PatchDiscriminator().")
        self.stage = STAGES[args.stage]
        self.stage.freeze(model)
        # It may come from a model, in which it was frozen.
        leave_out_of_sharding(model, False)
        check_trained_weights(model, args)
        kwargs.setdefault("data_collator", ImageCollator())
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.teacher, self.perceptual = teacher, perceptual
        if isinstance(perceptual, nn.Module):
            perceptual.to(args.device)
        self.adversary = None
        if args.adversarial_weight:
            self.adversary = Adversary(discriminator.to(args.device), learning_rate=args.learning_rate)
        self.model_accepts_loss_kwargs = False
        # Sum and number of each loss since the last log; they stay on the device until they are logged.
        self._losses: dict[str, tuple[torch.Tensor | float, int]] = {}
        # Codes in use since the last revival.
        self._used: torch.Tensor | None = None
        self._begins_step = True

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sizes = getattr(self.train_dataset if train_dataset is None else train_dataset, "sizes", None)
        if sizes is None or len(set(sizes)) < 2:
            return super()._get_train_sampler(train_dataset)
        # Of the loader: `auto_find_batch_size` makes it smaller than the arguments'.
        sampler = OneSizeSampler(sizes, self._train_batch_size, self.args.world_size, self.args.seed)
        self.add_callback(SetEpochCallback(sampler))
        return sampler

    # Which losses -----------------------------------------------------------------------------------------------------

    def pixel_loss(self, output: NextFlowVQOutput, inputs: dict) -> torch.Tensor:
        return F.mse_loss(output.reconstruction, inputs["pixel_values"])

    def semantic_loss(self, output: NextFlowVQOutput, inputs: dict) -> torch.Tensor:
        """One minus the cosine to the teacher's features (TokenFlow, section 3.2)."""
        if self.teacher is None:
            raise ValueError(
                "The joint stage needs `teacher=` (or a subclass with its own `semantic_loss`), or semantic_weight=0."
            )
        with torch.no_grad():
            target = self.teacher(inputs["pixel_values"])
        return 1 - F.cosine_similarity(output.semantic_features, target.float(), dim=-1).mean()

    @property
    def progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    @property
    def quantizes(self) -> bool:
        """Whether codes are used at this step."""
        return self.stage.quantizes and self.state.global_step >= self._first_quantized_step

    @property
    def _first_quantized_step(self) -> int:
        return self.stage.first_quantized_step(self.args.autoencoder_share, self.state.max_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, pixels = self.args, inputs["pixel_values"]
        noise = args.latent_noise if self.model.training else 0.0
        output = model(pixels, num_scales=self._draw_num_scales(pixels), quantize=self.quantizes, latent_noise=noise)
        losses = {"pixel_loss": args.pixel_weight * self.pixel_loss(output, inputs)}
        if self.stage.learns_codes:
            if args.semantic_weight:
                losses["semantic_loss"] = args.semantic_weight * self.semantic_loss(output, inputs)
            codebook_loss = output.codebook_loss + self._core.config.commitment_weight * output.commitment_loss
            losses["codebook_loss"] = args.codebook_weight * codebook_loss
        if args.perceptual_weight:
            losses["perceptual_loss"] = args.perceptual_weight * self.perceptual(output.reconstruction, pixels).mean()
        if self.adversary and self.progress >= args.adversarial_start:
            losses["adversarial_loss"] = args.adversarial_weight * self.adversary.loss(output.reconstruction, pixels)
        self.note(losses)
        for name, value in losses.items():
            self._add_to_log(name, value.detach())
        if self.model.training and output.image_tokens is not None:
            self._count_codes(output.image_tokens)
        loss = sum(losses.values())
        return (loss, output) if return_outputs else loss

    def _draw_num_scales(self, pixels: torch.Tensor) -> torch.Tensor | None:
        if not self.stage.learns_codes or not self.model.training:
            return None
        num_scales = self._core.schedule_of(pixels).num_scales
        sampled = torch.randint(1, num_scales + 1, (len(pixels),), device=pixels.device)
        dropped = torch.rand(len(pixels), device=pixels.device) < self.args.scale_dropout
        return torch.where(dropped, sampled, num_scales)

    # Care of the codebook ---------------------------------------------------------------------------------------------

    @property
    def _core(self) -> NextFlowVQModel:
        return self.accelerator.unwrap_model(self.model)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # With gradient accumulation a step has several calls.
        if self._begins_step:
            self._care_for_codes(inputs["pixel_values"])
        self._begins_step = self.accelerator.sync_gradients
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.adversary and self.progress >= self.args.adversarial_start:
            values = self.adversary.step(self.current_gradient_accumulation_steps, self.accelerator.sync_gradients)
            self.note(values)
            self._add_to_log("discriminator_loss", values["discriminator_loss"])
        return loss

    def _care_for_codes(self, pixels: torch.Tensor):
        """At the beginning of a step: starts the codebooks from k-means, or revives codes, when it is time."""
        args, step = self.args, self.state.global_step
        if self.stage.starts_codebook(args.autoencoder_share) and step == self._first_quantized_step:
            initialize_codebook(self._core, self._first_images(), args.kmeans_shares, seed=args.seed)
            self.restart_averages("quantizer.")
        revives = self.stage.learns_codes and args.revive_every and step % args.revive_every == 0
        if revives and self._used is not None:
            used = self.accelerator.reduce(self._used, "sum")
            revived = revive_dead_codes(self._core, pixels, used == 0, seed=args.seed + step)
            self.restart_averages("quantizer.", used == 0)
            self._add_to_log("revived_codes", revived)
            self._used = None

    def _first_images(self) -> Iterator[torch.Tensor]:
        """The images from which the codebooks start, in batches (B, 3, H, W) of one size as a step takes them."""
        waiting: dict[torch.Size, list[torch.Tensor]] = {}
        for number in range(min(self.args.kmeans_images, len(self.train_dataset))):
            image = torch.as_tensor(self.train_dataset[number]["pixel_values"])
            held = waiting.setdefault(image.shape, [])
            held.append(image)
            if len(held) == self.args.per_device_train_batch_size:
                yield torch.stack(waiting.pop(image.shape))
        for held in waiting.values():
            yield torch.stack(held)

    def _count_codes(self, image_tokens: torch.Tensor):
        counts = torch.bincount(image_tokens.flatten(), minlength=self._core.config.codebook_size)
        self._used = counts if self._used is None else self._used + counts

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def record_extras(self) -> dict:
        extras = {"teacher": self.teacher, "perceptual": self.perceptual}
        if self.adversary:
            # Its weights are those of the checkpoint.
            weights = self.adversary.discriminator.state_dict()
            extras["discriminator"] = {name: list(weight.shape) for name, weight in weights.items()}
        return extras

    def _save_optimizer_and_scheduler(self, output_dir: str):
        super()._save_optimizer_and_scheduler(output_dir)
        used = None if self._used is None else self.accelerator.reduce(self._used, "sum")
        state = {"used_codes": used}
        if self.adversary:
            state["adversary"] = self.adversary.state_dict()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / TRAINER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not (file := Path(checkpoint) / TRAINER_FILE).is_file():
            return  # allowed by resume_with_changes
        state = torch.load(file, map_location=self.args.device, weights_only=True)
        self._used = state["used_codes"]
        if self._used is not None and not self.is_world_process_zero():
            # The first process continues with the sum over all processes, the others with zero.
            self._used = torch.zeros_like(self._used)
        if self.adversary and "adversary" in state:
            self.adversary.load_state_dict(state["adversary"], self.args.learning_rate)

    # Logs -------------------------------------------------------------------------------------------------------------

    def _add_to_log(self, name: str, value: torch.Tensor | float):
        total, count = self._losses.get(name, (0.0, 0))
        self._losses[name] = total + value, count + 1

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= {name: float(total / count) for name, (total, count) in self._losses.items()}
            self._losses.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """PSNR, SSIM and codebook usage of reconstructions from all scales; writes a contact sheet in the output
        folder.
        """
        model = self._core.eval()
        scores, tokens, sheet = {"psnr": [], "ssim": []}, [], None
        for inputs in dataloader:
            pixels = inputs["pixel_values"].to(self.args.device)
            output = model(pixels, quantize=self.quantizes)
            restored = (output.reconstruction.clamp(-1, 1) + 1) / 2
            originals = (pixels + 1) / 2
            for name, metric in (("psnr", psnr), ("ssim", ssim)):
                scores[name].append(self.accelerator.gather_for_metrics(metric(restored, originals)))
            if output.image_tokens is not None:
                tokens.append(self.accelerator.gather_for_metrics(output.image_tokens))
            sheet = sheet or [to_uint8(x[:CONTACT_SHEET_COLUMNS]) for x in (pixels, output.reconstruction)]
        metrics = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
        if tokens:
            metrics |= codebook_statistics(torch.cat(tokens), model.schedule_of(pixels), model.config.codebook_size)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "contact_sheets" / f"step_{self.state.global_step}.png"
            with atomic_write(path) as partial:
                contact_sheet([[Image.fromarray(image) for image in row] for row in sheet]).save(partial)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))
