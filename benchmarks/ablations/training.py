"""The training that all ablations share: it makes rows of the shapes world, trains a small transformer on them and
returns its curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from jobs import Budget, Cache, Point
from shapes_recipe import FEATURES, images_in, make_processor, model_config, row
from transformers import PrinterCallback, Qwen2_5_VLTextConfig, TrainerCallback

from transformers_nextflow import (
    ImageSampling,
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowProcessor,
    NextFlowVQModel,
    SelfCorrection,
)
from transformers_nextflow.data import encoded_images, tokenizer_fingerprint
from transformers_nextflow.evaluation.image_metrics import generator_of, to_uint8
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.worlds.shapes import (
    Exchange,
    Prompt,
    World,
    check,
    drawing_score_table,
    held_out_cases,
    read,
    text_to_image_suite,
    training_case,
)
from transformers_nextflow.worlds.shapes.scene import COLORS, SHAPES
from transformers_nextflow.worlds.shapes.tokenizer_suite import pixels_of


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes"
# The part of the shapes world that a small model learns within minutes: three shapes and colours, up to three objects.
WORLD = World(shapes=SHAPES[:3], colors=COLORS[:3], max_objects=3, held_out_pairs=())
TEXT_WORLD = World()  # riddles and facts name all shapes
SIZE = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "layer_types": None,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
BATCH_SIZE, ENCODING_BATCH, DRAWING_BATCH = 32, 250, 120
LEARNING_RATE, DECAY_SHARE, WARMUP_SHARE = 2e-3, 0.4, 0.05
CURVE_POINTS = 5
# The default of `examples/shapes/make_data.py`.
CORRECTION_TOP_K = 4
# Held-out rows of each kind, for every prompt of a category that is drawn.
HELD_OUT_ROWS = {"drawing": 4, "text": 2}
DATA_SEED, HELD_OUT_SEED = 0, 1
# Arguments of every training: a job keeps only its curve, and only the command shows a progress bar.
QUIET = {"save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": []}


# --- Data ------------------------------------------------------------------------------------------------------------


def bundled_tokenizer() -> NextFlowVQModel:
    return NextFlowForConditionalGeneration.from_pretrained(CHECKPOINT).vq_model.eval()


@torch.no_grad()
def rows_of(
    exchanges: Sequence[Exchange], vq_model: NextFlowVQModel, world: World, correction_share: float = 0.0
) -> Dataset:
    """Makes rows with codes. For self-correction a share `correction_share` of each scale's input codes is sampled."""
    correction = SelfCorrection(CORRECTION_TOP_K, correction_share) if correction_share else None
    generator = torch.Generator().manual_seed(DATA_SEED)
    scenes = [scene for scene, _ in images_in(exchanges)]
    codes = []
    for start in range(0, len(scenes), ENCODING_BATCH):
        pixels = pixels_of(scenes[start : start + ENCODING_BATCH], world)
        codes += encoded_images(vq_model.encode(pixels, correction, generator))
    schedule = vq_model.config.scale_schedules.for_size(world.canvas, world.canvas)
    grid, length, remaining = list(schedule.final_grid), schedule.sequence_length(), iter(codes)
    return Dataset.from_list([row([one], remaining, grid, length) for one in exchanges], features=FEATURES)


def training_exchanges(world: World, count: int, text_share: float = 0.0) -> list[Exchange]:
    """Returns captions with their images and a share `text_share` of text-only tasks; none is kept for evaluation."""
    rng = np.random.default_rng(DATA_SEED)
    return [
        training_case(rng, TEXT_WORLD, "text").exchange if is_text else training_case(rng, world, "drawing").exchange
        for is_text in rng.random(count) < text_share
    ]


def held_out_exchanges(world: World, budget: Budget) -> list[Exchange]:
    """Returns held-out exchanges, the same for all arms, whatever they are trained on."""
    counts = {ability: count * budget.prompts for ability, count in HELD_OUT_ROWS.items()}
    cases = held_out_cases("drawing", world, counts["drawing"], HELD_OUT_SEED)
    cases += held_out_cases("text", TEXT_WORLD, counts["text"], HELD_OUT_SEED)
    return [case.exchange for case in cases]


# --- Model and training ----------------------------------------------------------------------------------------------


def small_model(
    vq_model: NextFlowVQModel,
    processor: NextFlowProcessor,
    seed: int,
    model_class: type[NextFlowForConditionalGeneration] = NextFlowForConditionalGeneration,
    **settings,
) -> NextFlowForConditionalGeneration:
    """Makes a transformer of width 96 with 4 layers and random weights; `settings` are those of `NextFlowConfig`."""
    config = small_config(model_config(vq_model, processor), **settings)
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="eager")
    model.load_vision_tokenizer(vq_model)
    return model


def small_config(config: NextFlowConfig, **settings) -> NextFlowConfig:
    """Makes a config with a backbone of width 96 with 4 layers; `settings` are those of `NextFlowConfig`."""
    config.text_config = Qwen2_5_VLTextConfig(**(config.text_config.to_dict() | SIZE))
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def train(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    world: World,
    rows: Dataset,
    held_out: Dataset,
    seed: int,
    budget: Budget,
    curve: Curve | None = None,
) -> list[Point]:
    """Trains on the rows for the budget's steps. Returns the curve: scores before, during and after training.

    `curve` scores images of other worlds than the shapes world.
    """
    curve = curve or Curve(processor, world, budget, seed)
    with TemporaryDirectory() as folder:
        args = NextFlowTrainingArguments(
            output_dir=folder,
            max_steps=budget.steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=4 * BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={
                "num_decay_steps": round(DECAY_SHARE * budget.steps),
                "decay_type": "linear",
                "min_lr_ratio": 0.0,
            },
            warmup_steps=round(WARMUP_SHARE * budget.steps),
            weight_decay=0.01,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            muon=True,
            eval_strategy="steps",
            eval_steps=max(1, budget.steps // CURVE_POINTS),
            eval_on_start=True,
            seed=seed,
            **QUIET,
        )
        trainer = NextFlowTrainer(
            model,
            args,
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=NextFlowCollator(processor),
            processing_class=processor,
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)  # the command shows a bar of its own
        trainer.train()
        if curve.points[-1]["step"] < budget.steps:
            trainer.evaluate()
    return curve.points


class Curve(TrainerCallback):
    """Records scores at every evaluation: losses on held-out rows, and scores of images drawn from held-out prompts."""

    def __init__(self, processor: NextFlowProcessor, world: World, budget: Budget, seed: int):
        self.processor, self.world, self.seed = processor, world, seed
        self.prompts = text_to_image_suite(world, budget.prompts)
        self.points: list[Point] = []

    def image_size(self) -> tuple[int, int]:
        """Returns height and width of all images."""
        return self.world.canvas, self.world.canvas

    def drawing_scores(self, model: NextFlowForConditionalGeneration) -> dict[str, float]:
        """Returns the scores of drawn images."""
        return drawing_scores(model, self.processor, self.world, self.prompts, self.seed)

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        schedule = model.config.vq_config.scale_schedules.for_size(*self.image_size())
        scales = [metrics[f"eval_scale_{scale}_loss"] for scale in range(1, schedule.num_scales + 1)]
        # Without text in the training data there is no text loss.
        words = {"text_loss": metrics["eval_text_loss"]} if "eval_text_loss" in metrics else {}
        losses = words | code_losses(scales, schedule.tokens_per_scale)
        self.points.append({"step": state.global_step} | self.drawing_scores(model.eval()) | losses)


def code_losses(scale_losses: Sequence[float], tokens_per_scale: Sequence[int]) -> dict[str, float]:
    """Returns the mean loss of a code over all scales, over the coarse and the fine half, and over each scale."""

    def mean(scales: slice) -> float:
        return float(np.average(scale_losses[scales], weights=tokens_per_scale[scales]))

    half = len(scale_losses) // 2
    losses = {"code_loss": mean(slice(None)), "coarse_loss": mean(slice(half)), "fine_loss": mean(slice(half, None))}
    return losses | {f"scale_{scale}_loss": loss for scale, loss in enumerate(scale_losses, start=1)}


@torch.no_grad()
def drawing_scores(
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    world: World,
    prompts: Sequence[Prompt],
    seed: int,
) -> dict[str, float]:
    """Returns `drawing` by GenEval's rule and `exact_drawing`, which forbids anything else; means over the categories.

    All codes are sampled from the model's own probabilities, without guidance, so that its errors accumulate.
    """
    results = []
    for start in range(0, len(prompts), DRAWING_BATCH):
        batch = prompts[start : start + DRAWING_BATCH]
        output = model.generate_images(
            **processor.apply_image_prompt([prompt.text for prompt in batch]),
            image_sizes=[(world.canvas, world.canvas)] * len(batch),
            sampling=ImageSampling(),
            generator=[generator_of(seed, start + i) for i in range(len(batch))],
        )
        images = to_uint8(torch.stack(model.decode_image_tokens(output.image_tokens, output.image_grids)))
        results += [
            (prompt.category, check(read(image, world), prompt.requirement)) for prompt, image in zip(batch, images)
        ]
    table = drawing_score_table(results)
    return {"drawing": table["overall"], "exact_drawing": table["overall_strict"]}


def train_small_model(
    vq_model: NextFlowVQModel,
    rows: Dataset,
    seed: int,
    budget: Budget,
    model_class: type[NextFlowForConditionalGeneration] = NextFlowForConditionalGeneration,
    **settings,
) -> list[Point]:
    """Returns the curve of a small model on rows of `WORLD`; `settings` are those of `NextFlowConfig`."""
    processor = make_processor(vq_model, tokenizer_of=str(CHECKPOINT))
    model = small_model(vq_model, processor, seed, model_class, **settings)
    held_out = rows_of(held_out_exchanges(WORLD, budget), vq_model, WORLD)
    return train(model, processor, WORLD, rows, held_out, seed, budget)


def train_on_bundled_codes(
    seed: int, budget: Budget, cache: Cache, text_share: float = 0.0, correction_share: float = 0.0, **options
) -> list[Point]:
    """Returns the curve of a small model on the codes of the shapes tokenizer; `options` as in `train_small_model`.

    The rows are the same for all seeds. The seed decides about the weights, the order of the rows and the sampling.
    """
    vq_model = bundled_tokenizer()
    data = {"count": BATCH_SIZE * budget.steps, "text_share": text_share, "correction_share": correction_share}
    data["tokenizer"] = tokenizer_fingerprint(vq_model)

    def make(folder: Path):
        exchanges = training_exchanges(WORLD, data["count"], text_share)
        rows_of(exchanges, vq_model, WORLD, correction_share).save_to_disk(folder)

    rows = load_from_disk(cache.folder("rows", data, make))
    return train_small_model(vq_model, rows, seed, budget, **options)
