"""Scores of the abilities other than drawing from captions and questions: editing, thinking, stories, videos and
others.

Every suite runs the pipeline's own calls on held-out cases, with a few seeds each, and scores the answers with exact
checks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...evaluation.image_metrics import decibels, generator_of, save_sheet, to_uint8
from ...pipeline_nextflow import NextFlowPipeline
from ..conversations import Part
from . import (
    Case,
    Scene,
    World,
    changed_region,
    check,
    drawing_score_table,
    held_out_cases,
    images_of,
    metric_table,
    read,
    read_images,
    render,
    sequence,
    text_to_image_suite,
)
from .language import CATEGORIES
from .tokenizer_suite import pixels_of


WORLD = World()
BATCH_SIZE = 50
NUM_CANDIDATES = 4
RANKING_PROMPTS = 4  # times the limit: the gain is a few hundredths, as large as the noise with 200 prompts
MAX_IMAGES = 4  # of stories
MAX_NEW_TOKENS = 128
SHEET_ROWS = 4  # of each suite that draws
SHEET_ENLARGEMENT = 2

Answers = list[tuple[Part, ...]]


class AbilitiesEvaluation:
    """The suites of the shapes world's abilities on one checkpoint, with its own sampling settings.

    Args:
        pipe: the pipeline of the checkpoint.
        limit: cases of each suite; four times as many prompts for ranking.
        seeds: answers to each case with drawn images, each with a seed of its own.
    """

    def __init__(self, pipe: NextFlowPipeline, limit: int = 200, seeds: int = 2):
        self.pipe, self.limit, self.seeds = pipe, limit, seeds
        pipe.set_progress_bar_config(disable=True)
        pipe.model.eval()
        self._shown: dict[str, list[list[Image.Image]]] = {}

    def scores(self) -> dict[str, dict[str, float]]:
        """All suites: suite → category → score; see each method."""
        suites: dict[str, Callable[[], dict[str, float]]] = {
            "editing": lambda: self._score("editing", self.draw),
            "masked_editing": self.masked_editing,
            "subject": lambda: self._score("subject", self.draw),
            "in_context": lambda: self._score("in_context", self.draw),
            "thinking": lambda: self._score("thinking", self.think),
            "thinking_without": lambda: self._score("thinking", self.draw, sheet="thinking_without"),
            "thinking_plainly": lambda: self._score("drawing", self.think, sheet="thinking_plainly"),
            "interleaved": lambda: self._score("story", self.tell),
            "video": lambda: self._score("video", self.video, lambda case: (len(case.frames), case.first_given)),
            "ranking": self.ranking,
            "captions": lambda: self._score("caption", self.answer, seeds=1),
            "video_questions": lambda: self._score("video_question", self.answer, seeds=1),
            "text": lambda: self._score("text", self.answer, seeds=1),
        }
        return {name: suite() for name, suite in suites.items()}

    # --- Answers to cases, with the pipeline's calls ---------------------------------------------------------------

    def think(self, cases: Sequence[Case], generators: list[torch.Generator]) -> Answers:
        """A thought and an image each."""
        return self.draw(cases, generators, think=True)

    def draw(self, cases: Sequence[Case], generators: list[torch.Generator], **options) -> Answers:
        """An image each; with `think=True` after a thought."""
        images = [[_pil(part) for part in images_of(case.asked)] for case in cases]
        output = self.pipe(
            [case.asked[-1] for case in cases], image=images if any(images) else None, generator=generators, **options
        )
        thoughts = output.thoughts or [None] * len(cases)
        return [(image,) if thought is None else (thought, image) for image, thought in zip(output.images, thoughts)]

    def video(self, cases: Sequence[Case], generators: list[torch.Generator]) -> Answers:
        """Videos of one length, all with a first frame or all without."""
        given, count = cases[0].first_given, len(cases[0].frames)
        output = self.pipe.video(
            [case.asked[-1] for case in cases],
            image=[_pil(case.asked[0]) for case in cases] if given else None,
            num_frames=count,
            generator=generators,
        )
        videos = zip(output.frames, output.transitions)
        return [sequence("", frames, texts, first_given=given).answer for frames, texts in videos]

    def tell(self, cases: Sequence[Case], generators: list[torch.Generator]) -> Answers:
        """Images and sentences in turn; the model decides how many."""
        return self._chat(cases, max_images=MAX_IMAGES, generator=generators)

    def answer(self, cases: Sequence[Case], generators: list[torch.Generator]) -> Answers:
        """A text each, decoded greedily."""
        return self._chat(cases, max_images=0)

    def _chat(self, cases: Sequence[Case], **options) -> Answers:
        messages = [[{"role": "user", "content": [_content(part) for part in case.asked]}] for case in cases]
        replies = self.pipe.chat(messages, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **options)
        return [tuple(part.get("image") or part["text"].strip() for part in reply["content"]) for reply in replies]

    # --- Suites with their own metrics -------------------------------------------------------------------------------

    def masked_editing(self) -> dict[str, float]:
        """Edits, other than those of the background, inside the mask of what is to change.

        Beside the scores: `psnr_outside`, the PSNR in dB outside of the masks against the input's pixels;
        `psnr_outside_bound`, that of the tokenizer's own reconstruction of the input; `pasted_equal`, the share of
        images that equal the input outside of the mask if its pixels are pasted back.
        """
        cases = [c for c in self._cases("editing") if c.before.background == c.after.background]
        errors, bounds, equal, results = [], [], [], []
        for seed, batch, generators in self._batches(cases, "masked editing"):
            inputs = np.stack([render(case.before, WORLD) for case in batch])
            outside = ~np.stack([changed_region(case.before, case.after, WORLD) for case in batch])
            masks = [Image.fromarray(np.uint8(~kept) * 255) for kept in outside]
            answers = self.draw(batch, generators, mask_image=masks)
            results += self._results(batch, answers, "masked_editing" if seed == 0 else None)
            drawn = np.stack([np.asarray(image) for (image,) in answers])
            errors.append(np.square(np.float32(drawn) - inputs)[outside])
            bounds.append(np.square(np.float32(self.reconstruct([case.before for case in batch])) - inputs)[outside])
            again = self._generators(seed, batch, cases)
            pasted = np.stack(
                [np.asarray(p) for (p,) in self.draw(batch, again, mask_image=masks, paste_back=True)]
            )  # fmt: skip
            equal += [np.array_equal(a[kept], b[kept]) for a, b, kept in zip(pasted, inputs, outside)]
        return metric_table(results) | {
            "psnr_outside": float(decibels(np.concatenate(errors).mean() / 255**2)),
            "psnr_outside_bound": float(decibels(np.concatenate(bounds).mean() / 255**2)),
            "pasted_equal": float(np.mean(equal)),
        }

    @torch.no_grad()
    def reconstruct(self, scenes: list[Scene]) -> np.ndarray:
        """The tokenizer's reconstructions of the scenes' images: (n, H, W, 3) uint8."""
        tokenizer, pixels = self.pipe.model.vq_model, pixels_of(scenes, WORLD)
        pixels = pixels.to(tokenizer.device)
        return to_uint8(tokenizer.decode(tokenizer.encode(pixels).image_tokens, tokenizer.schedule_of(pixels)))

    def ranking(self) -> dict[str, float]:
        """Drawing scores of one candidate, and of the best of four by the model's own judgement, with the same
        seeds.
        """
        prompts = text_to_image_suite(WORLD, max(1, RANKING_PROMPTS * self.limit // len(CATEGORIES)))
        table = {}
        for name, count in (("one_candidate", 1), ("best_of_four", NUM_CANDIDATES)):
            results = []
            for seed, start in itertools.product(range(self.seeds), range(0, len(prompts), BATCH_SIZE)):
                batch = prompts[start : start + BATCH_SIZE]
                generators = [
                    generator_of(seed, NUM_CANDIDATES * (start + i) + candidate)
                    for i, candidate in itertools.product(range(len(batch)), range(count))
                ]
                texts = [prompt.text for prompt in batch]
                images = self.pipe(texts, num_candidates=count, generator=generators).images
                results += [
                    (prompt.category, check(read(image, WORLD), prompt.requirement))
                    for prompt, image in zip(batch, images)
                ]
            scores = drawing_score_table(results)
            table |= {name: scores["overall"], f"{name}_strict": scores["overall_strict"]}
        return table

    # --- From cases to tables ----------------------------------------------------------------------------------------

    def _score(
        self,
        ability: str,
        answer: Callable[[Sequence[Case], list[torch.Generator]], Answers],
        group: Callable[[Case], tuple] = lambda case: (),
        seeds: int | None = None,
        sheet: str | None = None,
    ) -> dict[str, float]:
        """`metric_table` of an ability's cases; those of one batch have one `group`."""
        results = []
        cases = sorted(self._cases(ability), key=group)
        for _, same in itertools.groupby(cases, key=group):
            for seed, batch, generators in self._batches(list(same), ability, seeds):
                answers = answer(batch, generators)
                results += self._results(batch, answers, (sheet or ability) if seed == 0 else None)
        return metric_table(results)

    def _cases(self, ability: str) -> list[Case]:
        return held_out_cases(ability, WORLD, self.limit)

    def _batches(self, cases: list[Case], description: str, seeds: int | None = None):
        """(seed, cases, their generators)."""
        starts = range(0, len(cases), BATCH_SIZE)
        for seed, start in tqdm(list(itertools.product(range(seeds or self.seeds), starts)), desc=description):
            batch = cases[start : start + BATCH_SIZE]
            yield seed, batch, self._generators(seed, batch, cases)

    def _generators(self, seed: int, batch: list[Case], cases: list[Case]) -> list[torch.Generator]:
        first = next(index for index, case in enumerate(cases) if case is batch[0])
        return [generator_of(seed, first + index) for index in range(len(batch))]

    def _results(self, cases: Sequence[Case], answers: Answers, sheet: str | None) -> list[tuple[str, dict]]:
        """Each case's category and score; `sheet` names the rows in which the first are shown."""
        if sheet is not None:
            rows = self._shown.setdefault(sheet, [])
            for case, parts in list(zip(cases, answers))[: SHEET_ROWS - len(rows)]:
                rows.append([_pil(image) for image in images_of((*case.asked, *parts))])
        return [(case.kind, case.score(read_images(parts, WORLD), WORLD)) for case, parts in zip(cases, answers)]

    def save_sheets(self, folder: Path):
        """One sheet for each suite with images: a row holds the given images and then the drawn ones."""
        size = WORLD.canvas * SHEET_ENLARGEMENT
        for name, rows in self._shown.items():
            rows = [[p.resize((size, size), Image.Resampling.NEAREST) for p in row] for row in rows if row]
            if rows:
                save_sheet(rows, folder / f"{name}.png")


def _pil(image: Scene | Image.Image) -> Image.Image:
    return Image.fromarray(render(image, WORLD)) if isinstance(image, Scene) else image


def _content(part: Part) -> dict:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": _pil(part)}
