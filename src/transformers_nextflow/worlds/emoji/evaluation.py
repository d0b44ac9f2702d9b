"""Scores of a checkpoint on the emoji world: what `transformers-nextflow evaluate --suite emoji` prints.

Every suite runs the pipeline's own calls on held-out cases; a judge reads the drawn images. Beside the scores of a
suite there are two ceilings under the same names: `ceiling`, the judge's scores of the true renders, and
`reconstructed`, those of the tokenizer's reconstructions of the true renders.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...evaluation.image_metrics import decibels, generator_of, psnr, save_sheet, ssim, to_uint8
from ...generation.sampling import ImageSampling
from ...modeling_nextflow_vq import codebook_statistics
from ...pipeline_nextflow import NextFlowPipeline
from ...utils.devices import on_device
from ..conversations import Part, images_of
from ..score_tables import Score, metric_table
from .abilities import ABILITIES, WORDING, held_out_cases
from .art import Art
from .cases import Case, SceneCase
from .edits import STYLE_REQUESTS
from .judge import Judge, as_array
from .language import style_word
from .reading import reading_scores
from .scene import Scene, Sticker, World, random_scene, render


ART, JUDGE, WORLD = Path("runs/emoji/art.zip"), Path("runs/emoji/judge"), "world.json"
BATCH_SIZE = 50
MAX_IMAGES = 3  # of stories
MAX_NEW_TOKENS = 96
SHEET_ROWS = 12
TOKENIZER_SEED, TOKENIZER_SCENES = 7_000_000, 500
# Abilities by how they are answered.
DRAWN = ("drawing", "style", "editing", "subject", "in_context")
WRITTEN = ("caption", "question", "text")

Answers = list[tuple[Part, ...]]


class EmojiEvaluation:
    """The suites of the emoji world on one checkpoint, with its own sampling settings.

    Args:
        pipe: the pipeline of the checkpoint.
        world: the world of the scenes.
        judge: the judge that reads images.
        limit: cases of each suite; three times as many prompts to draw.
        seeds: answers to each case with drawn images, each with a seed of its own.
    """

    def __init__(self, pipe: NextFlowPipeline, world: World, judge: Judge, limit: int = 200, seeds: int = 1):
        self.pipe, self.world, self.judge, self.limit, self.seeds = pipe, world, judge, limit, seeds
        pipe.set_progress_bar_config(disable=True)
        pipe.model.eval()
        self._shown: dict[str, list[list[Image.Image]]] = {}

    def scores(self, abilities: Sequence[str] = tuple(ABILITIES)) -> dict[str, dict]:
        """The suites of some abilities: suite → category → score; see each method."""
        suites: dict[str, Callable[[], dict]] = {"tokenizer": self.tokenizer}
        if "drawing" in abilities:
            suites["text_to_image"] = lambda: self.suite("drawing", self.draw, count=3 * self.limit)
            for split in self.world.splits:
                suites[f"held_out_{split}"] = lambda split=split: self.suite("drawing", self.draw, split=split)
            suites["memorisation"] = self.memorisation
        for ability in abilities:
            if ability in DRAWN and ability != "drawing":
                suites[ability] = lambda ability=ability: self.suite(ability, self.draw)
            elif ability in WRITTEN:
                suites[ability] = lambda ability=ability: self.suite(ability, self.answer, seeds=1)
        if "style" in abilities:
            suites["style_retrieval"] = self.style_retrieval
        if "thinking" in abilities:
            suites["thinking"] = lambda: self.suite("thinking", self.think)
        if "story" in abilities:
            suites["story"] = lambda: self.suite("story", self.tell)
        return {name: suite() for name, suite in suites.items()}

    # --- Answers to cases, with the pipeline's calls -----------------------------------------------------------------

    def draw(self, cases: Sequence[Case], generators: list[torch.Generator], **options) -> Answers:
        """An image each, of the size of the right one; with `think=True` after a thought."""
        images = [[self.image(part) for part in images_of(case.asked)] for case in cases]
        height, width = self.world.size(images_of(cases[0].answer)[0].ratio)
        output = self.pipe(
            [case.asked[-1] for case in cases],
            image=images if any(images) else None,
            height=height,
            width=width,
            generator=generators,
            **options,
        )
        thoughts = output.thoughts or [None] * len(cases)
        return [(image,) if thought is None else (thought, image) for image, thought in zip(output.images, thoughts)]

    def think(self, cases: Sequence[Case], generators: list[torch.Generator]) -> Answers:
        """A thought and an image each."""
        return self.draw(cases, generators, think=True)

    def tell(self, cases: Sequence[Case], generators: list[torch.Generator]) -> Answers:
        """Images and sentences in turn; the model decides how many."""
        return self._chat(cases, max_images=MAX_IMAGES, generator=generators)

    def answer(self, cases: Sequence[Case], generators: list[torch.Generator]) -> Answers:
        """A text each, decoded greedily."""
        return self._chat(cases, max_images=0)

    def _chat(self, cases: Sequence[Case], **options) -> Answers:
        messages = [[{"role": "user", "content": [self._content(part) for part in case.asked]}] for case in cases]
        replies = self.pipe.chat(messages, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **options)
        return [tuple(part.get("image") or part["text"].strip() for part in reply["content"]) for reply in replies]

    def _content(self, part: Part) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image", "image": self.image(part)}

    def image(self, scene: Scene) -> Image.Image:
        return Image.fromarray(render(scene, self.world))

    # --- From cases to tables ----------------------------------------------------------------------------------------

    def suite(
        self,
        ability: str,
        answer: Callable[[Sequence[Case], list[torch.Generator]], Answers],
        split: str = WORDING,
        count: int | None = None,
        seeds: int | None = None,
    ) -> dict:
        """`metric_table` of an ability's held-out cases, with both ceilings if images are drawn."""
        cases = held_out_cases(ability, self.world, count or self.limit, split=split)
        return self.score(cases, answer, ability if split == WORDING else f"held_out_{split}", seeds)

    def score(self, cases: list[Case], answer: Callable, name: str, seeds: int | None = None) -> dict:
        """The table of given cases; `name` is that of their sheet."""
        results = []
        for seed, batch, generators in self._batches(cases, name, seeds or self.seeds):
            answers = answer(batch, generators)
            if seed == 0:
                self._show(name, batch, answers)
            results += self._results(batch, answers)
        table: dict = metric_table(results)
        if images_of(cases[0].answer):
            table["ceiling"] = metric_table(self._results(cases, [self._true(case) for case in cases]))
            table["reconstructed"] = metric_table(self._results(cases, self._reconstructed(cases)))
        return table

    def _batches(self, cases: list[Case], description: str, seeds: int):
        """(seed, cases whose images have one size and as many images before them, their generators)."""

        def form(numbered: tuple[int, Case]) -> tuple:
            drawn = images_of(numbered[1].answer)
            return (len(images_of(numbered[1].asked)), drawn[0].ratio if drawn else ())

        numbered = sorted(enumerate(cases), key=form)
        groups = [list(group) for _, group in itertools.groupby(numbered, key=form)]
        batches = [group[i : i + BATCH_SIZE] for group in groups for i in range(0, len(group), BATCH_SIZE)]
        for seed, batch in tqdm(list(itertools.product(range(seeds), batches)), desc=description):
            generators = [generator_of(seed, index) for index, _ in batch]
            yield seed, [case for _, case in batch], generators

    def _results(self, cases: Sequence[Case], answers: Answers) -> list[tuple[str, Score]]:
        """Each case's category and score; the images of all answers are read together."""
        images = [part for parts in answers for part in images_of(parts)]
        read = iter(self.judge.read(images)) if images else iter(())
        results = []
        for case, parts in zip(cases, answers):
            known = tuple(part if isinstance(part, str) else next(read) for part in parts)
            results.append((case.kind, case.score(known, self.world)))
        return results

    def _true(self, case: Case) -> tuple[Part, ...]:
        return tuple(part if isinstance(part, str) else render(part, self.world) for part in case.answer)

    def _reconstructed(self, cases: Sequence[Case]) -> Answers:
        scenes = [scene for case in cases for scene in images_of(case.answer)]
        images = iter(self.reconstruct([render(scene, self.world) for scene in scenes]))
        return [tuple(part if isinstance(part, str) else next(images) for part in case.answer) for case in cases]

    @torch.no_grad()
    def reconstruct(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The tokenizer's reconstructions of images (H, W, 3) uint8."""
        model, found = self.pipe.model.vq_model, {}
        for size in {image.shape for image in images}:
            indices = [index for index, image in enumerate(images) if image.shape == size]
            for start in range(0, len(indices), BATCH_SIZE):
                part = indices[start : start + BATCH_SIZE]
                pixels = _pixels([images[i] for i in part]).to(model.device)
                restored = model.decode(model.encode(pixels).image_tokens, model.schedule_of(pixels))
                found.update(zip(part, to_uint8(restored)))
        return [found[index] for index in range(len(images))]

    # --- Suites with their own metrics -------------------------------------------------------------------------------

    @torch.no_grad()
    def tokenizer(self) -> dict[str, float]:
        """Scores of the tokenizer's reconstructions of scenes of all concepts and styles: `psnr`, `ssim`, codebook
        statistics, and how well the judge reads reconstructions (`read_…`) and true renders (`read_…_ceiling`).
        """
        model, rng = self.pipe.model.vq_model, np.random.default_rng(TOKENIZER_SEED)
        count = min(TOKENIZER_SCENES, 5 * self.limit)
        scenes = [
            Scene(s.stickers, s.background, s.grid) for s in (random_scene(rng, self.world) for _ in range(count))
        ]
        images = [render(scene, self.world) for scene in scenes]
        pixels = _pixels(images)
        tokens = torch.cat([model.encode(part.to(model.device)).image_tokens for part in pixels.split(BATCH_SIZE)])
        schedule = model.schedule_of(pixels)
        restored = torch.cat([model.decode(part, schedule).cpu() for part in tokens.split(BATCH_SIZE)])
        read = reading_scores(self.judge, list(to_uint8(restored)), scenes)
        ceiling = reading_scores(self.judge, images, scenes)
        return {
            "psnr": float(psnr((restored + 1) / 2, (pixels + 1) / 2).mean()),
            "ssim": float(ssim((restored + 1) / 2, (pixels + 1) / 2).mean()),
            **{f"read_{name}": value for name, value in read.items()},
            **{f"read_{name}_ceiling": value for name, value in ceiling.items()},
            **codebook_statistics(tokens, schedule, model.config.codebook_size),
        }

    def style_retrieval(self) -> dict[str, float]:
        """Style transfer of one thing on white: the share of images that are nearest, in the judge's features, to the
        true target among all the world's drawings of that style. `ceiling`: that of reconstructed targets.
        """
        cases = self.retrieval_cases()
        drawn, restored = [], self.reconstruct([render(case.after, self.world) for case in cases])
        for _, batch, generators in self._batches(cases, "style retrieval", 1):
            answers = self.draw(batch, generators)
            drawn += [as_array(images_of(parts)[0]) for parts in answers]
        galleries = {style: self.judge.embed_images(self._portraits(style)) for style in self.world.styles}

        def share(images: Sequence[np.ndarray]) -> float:
            hits = []
            for case, vector in zip(cases, self.judge.embed_images(images)):
                (target,) = case.after.stickers
                nearest = int((galleries[target.style] @ vector).argmax())
                hits.append(self.world.concepts_in[target.style][nearest] == target.concept)
            return float(np.mean(hits))

        return {"retrieved": share(drawn), "ceiling": share(restored)}

    def retrieval_cases(self) -> list[SceneCase]:
        """Different held-out cases of `style_retrieval`, as many as the limit if there are so many.

        Raises:
            ValueError: if there are none.
        """
        found = []
        for concept in self.world.concepts:
            for styles in itertools.permutations(self.world.styles_of(concept), 2):
                before, after = (Scene((Sticker(concept, style),)) for style in styles)
                for request in STYLE_REQUESTS:
                    text = request.format(style_word(None, styles[1]))
                    case = SceneCase("retrieval", (before, text), (after,), after=after)
                    if case.held_out(self.world) == {WORDING}:
                        found.append(case)
        if not found:
            raise ValueError(
                "No style transfer of one thing on white is held out in this world; leave out the ability style."
            )
        return [found[i] for i in np.random.default_rng(11).permutation(len(found))[: self.limit]]

    def _portraits(self, style: str) -> list[np.ndarray]:
        """All concepts of a style on white."""
        return [render(Scene((Sticker(c, style),)), self.world) for c in self.world.concepts_in[style]]

    def memorisation(self) -> dict[str, float]:
        """The PSNR in dB between drawings of one thing on white and renders of the training: `to_nearest`, the mean to
        the nearest render, and `to_nearest_reconstructed`, the same for reconstructions of these renders, which is the
        best that the tokenizer can give. `is_asked`: share of the drawings whose nearest render shows what was asked
        for, in any style. Held-out pairs of concept and style are no renders of the training.
        """
        pairs = [pair for pair in self.world.pairs if not self.world.holds_out_style(*pair)]
        renders = np.stack([render(Scene((Sticker(*pair),)), self.world) for pair in pairs])
        asked = [pairs[i] for i in np.random.default_rng(5).permutation(len(pairs))[: self.limit]]
        prompts = [f"{self.world.name(c)}, {style_word(None, style)} style on a white background" for c, style in asked]
        scene = Scene((Sticker(*asked[0]),))
        cases = [Case("memorisation", (prompt,), (scene,)) for prompt in prompts]
        drawn: dict[int, np.ndarray] = {}
        for _, batch, generators in self._batches(cases, "memorisation", 1):
            for case, (image,) in zip(batch, self.draw(batch, generators)):
                drawn[next(i for i, one in enumerate(cases) if one is case)] = as_array(image)
        nearest = [_nearest(drawn[i], renders) for i in range(len(cases))]
        self._shown["memorisation"] = [
            [Image.fromarray(drawn[i]), Image.fromarray(renders[index])] for i, (index, _) in enumerate(nearest)
        ]
        restored = self.reconstruct([renders[pairs.index(pair)] for pair in asked])
        return {
            "to_nearest": float(np.mean([decibels for _, decibels in nearest])),
            "to_nearest_reconstructed": float(np.mean([_nearest(image, renders)[1] for image in restored])),
            "is_asked": float(np.mean([pairs[i][0] == pair[0] for (i, _), pair in zip(nearest, asked)])),
        }

    # --- Sheets ------------------------------------------------------------------------------------------------------

    def _show(self, name: str, cases: Sequence[Case], answers: Answers):
        rows = self._shown.setdefault(name, [])
        for case, parts in list(zip(cases, answers))[: SHEET_ROWS * SHEET_ROWS - len(rows)]:
            asked = [self.image(scene) for scene in images_of(case.asked)]
            row = [*asked, *(Image.fromarray(as_array(image)) for image in images_of(parts))]
            if row:
                rows.append(row)

    def save_sheets(self, folder: Path):
        """One sheet for each suite with images: the given images and then the drawn ones."""
        for name, rows in self._shown.items():
            if not rows:
                continue
            wide = len(rows[0]) == 1
            flat = [image for row in rows for image in row]
            shown = [flat[i : i + SHEET_ROWS] for i in range(0, len(flat), SHEET_ROWS)] if wide else rows[:SHEET_ROWS]
            save_sheet(shown, Path(folder) / f"{name}.png")


def _pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def _nearest(image: np.ndarray, renders: np.ndarray) -> tuple[int, float]:
    """The index of the render (n, H, W, 3) that is nearest to an image, and their PSNR in dB."""
    errors = np.array([np.square(np.float32(image) - one).mean() for one in renders])
    index = int(errors.argmin())
    return index, float(decibels(errors[index] / 255**2))


def evaluate_emoji(
    checkpoint: str,
    limit: int | None = None,
    seeds: int = 1,
    sheets: Path | None = None,
    device: str | torch.device | None = None,
    *,
    art: Path | str = ART,
    judge: Path | str = JUDGE,
    abilities: Sequence[str] = tuple(ABILITIES),
    sampling: ImageSampling | None = None,
) -> dict[str, dict]:
    """All suites on a checkpoint folder: suite → category → score, with ceilings.

    Args:
        checkpoint: folder or name for `from_pretrained`.
        limit: cases of each suite, default 200; three times as many prompts to draw.
        seeds: images for each prompt, two at most.
        sheets: folder for contact sheets.
        device: default: a GPU if there is one.
        art: the archive of drawings; see `examples/emoji/make_art.py`.
        judge: folder of the judge, in which `world.json` describes the scenes.
        abilities: the names of `ABILITIES` on which the checkpoint was trained.
        sampling: settings of the scale loop; default: the checkpoint's own.

    Raises:
        ValueError: if there is no archive or judge.
    """
    read_by = Judge.load(judge)
    pipe = NextFlowPipeline.from_pretrained(checkpoint)
    pipe = on_device(pipe, device)
    read_by.to(pipe.device)
    if sampling is not None:
        pipe.model.generation_config.image_sampling = sampling.to_dict()
    world = World.load(Path(judge) / WORLD, Art(art))
    evaluation = EmojiEvaluation(pipe, world, read_by, limit or 200, min(seeds, 2))
    scores = evaluation.scores(abilities)
    if sheets is not None:
        evaluation.save_sheets(Path(sheets))
    return scores
