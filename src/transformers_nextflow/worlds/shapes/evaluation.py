"""Scores of a checkpoint on the shapes world: what `transformers-nextflow evaluate --suite shapes` prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoProcessor

from ...evaluation.image_metrics import generator_of, save_sheet, to_uint8
from ...generation.sampling import ImageSampling
from ...modeling_nextflow import NextFlowForConditionalGeneration
from ...processing_nextflow import NextFlowProcessor
from ...utils.checkpoint_checks import loading_errors
from ...utils.devices import on_device
from ...utils.folder_parts import load_model, load_part
from . import (
    CheckResult,
    Prompt,
    World,
    check,
    drawing_example,
    drawing_score_table,
    held_out_combinations,
    metric_table,
    read,
    render,
    text_to_image_suite,
    understanding_cases,
)
from .questions import QUESTIONS
from .tokenizer_suite import evaluate_tokenizer, pixels_of


WORLD = World()
BATCH_SIZE = 50
SHEET_COLUMNS = 10
SHEET_ENLARGEMENT = 2


class ShapesEvaluation:
    """The suites of the shapes world on one checkpoint.

    Args:
        model, processor: the checkpoint.
        limit: prompts of each category, and cases of each kind of question.
        seeds: images drawn for each prompt, each with a seed of its own.
        sampling: settings of the scale loop; default: the checkpoint's own.
    """

    def __init__(
        self,
        model: NextFlowForConditionalGeneration,
        processor: NextFlowProcessor,
        limit: int = 100,
        seeds: int = 4,
        sampling: ImageSampling | None = None,
    ):
        self.model, self.processor = model.eval(), processor
        self.limit, self.seeds = limit, seeds
        self.sampling = sampling or model.default_image_sampling

    def text_to_image(self, sheet: Path | None = None) -> dict[str, float]:
        return self._score_prompts(text_to_image_suite(WORLD, self.limit, seed=0), "text to image", sheet)

    def held_out_combinations(self, sheet: Path | None = None) -> dict[str, float]:
        prompts = held_out_combinations(WORLD, self.limit, seed=0)
        return self._score_prompts(prompts, "held-out combinations", sheet)

    def oracle(self) -> dict[str, dict[str, float]]:
        """Drawing scores with the true codes of the first k scales given, which show the scales that decide."""
        rng = np.random.default_rng(3)
        examples = [drawing_example(rng, WORLD) for _ in range(self.limit)]
        pixels = pixels_of([scene for _, scene in examples], WORLD).to(self.model.device)
        true_codes = self.model.vq_model.encode(pixels).image_tokens
        schedule = self.model.config.vq_config.scale_schedules.for_size(WORLD.canvas, WORLD.canvas)
        result = {}
        for given in range(schedule.num_scales):
            images = self.draw(
                [text for text, _ in examples], seed=0, given_codes=true_codes[:, : schedule.offsets[given]]
            )
            exact = [
                sorted((o.shape, o.color) for o in read(image, WORLD).objects)
                == sorted((o.shape, o.color) for o in scene.objects)
                for image, (_, scene) in zip(images, examples)
            ]
            result[f"first_{given}_scales_true"] = float(np.mean(exact))
        return result

    def understanding(self) -> dict[str, float]:
        """Share of right answers for each kind of question and description; `questions` is the mean of the former."""
        cases = understanding_cases(WORLD, self.limit, seed=0)
        results = []
        for start in tqdm(range(0, len(cases), BATCH_SIZE), desc="understanding"):
            batch = cases[start : start + BATCH_SIZE]
            scenes, questions = zip(*(case.asked for case in batch))
            answers = self.answer([render(scene, WORLD) for scene in scenes], list(questions))
            results += [(case.kind, case.score((text,), WORLD)) for case, text in zip(batch, answers)]
        table = metric_table(results)
        return table | {"questions": float(np.mean([table[kind] for kind in QUESTIONS]))}

    def tokenizer(self) -> dict[str, float]:
        return evaluate_tokenizer(self.model.vq_model, WORLD)

    @torch.no_grad()
    def draw(self, prompts: list[str], seed: int, given_codes: torch.Tensor | None = None) -> np.ndarray:
        """Images (n, H, W, 3) uint8; image i of a seed depends only on its prompt, i and the seed."""
        images = []
        for start in range(0, len(prompts), BATCH_SIZE):
            texts = prompts[start : start + BATCH_SIZE]
            inputs = self.processor.apply_image_prompt(texts).to(self.model.device)
            empty = self.processor.apply_image_prompt([""] * len(texts), allow_empty=True).to(self.model.device)
            output = self.model.generate_images(
                **inputs,
                negative_input_ids=empty.input_ids,
                negative_attention_mask=empty.attention_mask,
                image_sizes=[(WORLD.canvas, WORLD.canvas)] * len(texts),
                sampling=self.sampling,
                generator=[generator_of(seed, start + i) for i in range(len(texts))],
                given_image_tokens=None if given_codes is None else given_codes[start : start + BATCH_SIZE],
            )
            images += self.model.decode_image_tokens(output.image_tokens, output.image_grids)
        return to_uint8(torch.stack(images))

    @torch.no_grad()
    def answer(self, images: list[np.ndarray], questions: list[str]) -> list[str]:
        """The model's answers to questions, each on one image."""
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        shown = [[Image.fromarray(image)] for image in images]
        # pyrefly: ignore[unexpected-keyword]
        inputs = self.processor(text=texts, images=shown, padding=True, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answers = self.processor.tokenizer.batch_decode(
            output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        return [answer.strip() for answer in answers]

    def _score_prompts(self, prompts: list[Prompt], description: str, sheet: Path | None) -> dict[str, float]:
        results: list[tuple[str, CheckResult]] = []
        shown: dict[str, list[Image.Image]] = {}
        for seed in tqdm(range(self.seeds), desc=description):
            for prompt, image in zip(prompts, self.draw([prompt.text for prompt in prompts], seed)):
                results.append((prompt.category, check(read(image, WORLD), prompt.requirement)))
                row = shown.setdefault(prompt.category, [])
                if seed == 0 and len(row) < SHEET_COLUMNS:
                    row.append(Image.fromarray(image))
        if sheet is not None:
            size = WORLD.canvas * SHEET_ENLARGEMENT
            rows = [[p.resize((size, size), Image.Resampling.NEAREST) for p in row] for row in shown.values()]
            save_sheet(rows, sheet)
        return drawing_score_table(results)


def evaluate_shapes(
    checkpoint: str,
    limit: int | None = None,
    seeds: int = 4,
    sheets: Path | None = None,
    device: str | torch.device | None = None,
) -> dict[str, dict[str, float]]:
    """All suites on a checkpoint folder: suite → category → score.

    Args:
        checkpoint: folder or repository of a model, a pipeline or an adapter.
        limit: prompts of each category and questions of each kind, default 100; cases of each ability, default 200.
        seeds: images for each prompt; of abilities two at most.
        sheets: folder for contact sheets.
        device: default: a GPU if there is one.
    """
    model = on_device(load_model(NextFlowForConditionalGeneration, checkpoint), device)
    with loading_errors(checkpoint):
        processor = load_part(AutoProcessor, "processor", checkpoint)
    evaluation = ShapesEvaluation(model, processor, limit or 100, seeds)
    suites: dict[str, Callable[[], dict]] = {
        "text_to_image": lambda: evaluation.text_to_image(sheets and Path(sheets) / "text_to_image.png"),
        "held_out_combinations": lambda: evaluation.held_out_combinations(
            sheets and Path(sheets) / "held_out_combinations.png"
        ),
        "understanding": evaluation.understanding,
        "tokenizer": evaluation.tokenizer,
        "oracle": evaluation.oracle,
    }
    has_abilities = processor.think_prefix is not None
    if has_abilities:  # first, since it needs the extra `pipelines`
        from ...pipeline_nextflow import NextFlowPipeline
        from .abilities_evaluation import AbilitiesEvaluation
    scores = {name: suite() for name, suite in suites.items()}
    if has_abilities:
        abilities = AbilitiesEvaluation(NextFlowPipeline(model, processor), limit or 200, min(seeds, 2))
        scores |= abilities.scores()
        if sheets is not None:
            abilities.save_sheets(Path(sheets))
    return scores
