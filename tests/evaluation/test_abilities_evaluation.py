"""The evaluation of the abilities: what is asked of the pipeline, and what its answers score."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.worlds.shapes import abilities_evaluation, held_out_cases, images_of, render, texts_of
from transformers_nextflow.worlds.shapes.abilities_evaluation import WORLD, AbilitiesEvaluation


LIMIT = 12
DRAWN = ("editing", "subject", "in_context", "thinking")
SEMANTIC_ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}


def make_image(scene):
    return Image.fromarray(render(scene, WORLD))


@cache
def known_cases():
    abilities = (*DRAWN, "story", "video", "video_question", "caption", "text")
    return [case for ability in abilities for case in held_out_cases(ability, WORLD, LIMIT)]


class KnowingPipeline:
    """Answers every held-out case as it should be answered; keeps the names of its calls."""

    def __init__(self):
        self.model, self.calls = torch.nn.Module(), []
        self.known = {self.key(case.asked): case for case in known_cases()}

    def set_progress_bar_config(self, disable):
        pass

    @staticmethod
    def key(parts):
        shown = [p if isinstance(p, str | Image.Image) else make_image(p) for p in parts]
        return tuple(p if isinstance(p, str) else np.asarray(p).tobytes() for p in shown)

    def find(self, prompts, images):
        return [self.known[self.key((*row, text))] for text, row in zip(prompts, images or [()] * len(prompts))]

    def __call__(self, prompt, image=None, generator=None, think=False, mask_image=None, paste_back=False):
        self.calls.append("draw")
        assert len(generator) == len(prompt) and len({g.initial_seed() for g in generator}) == len(prompt)
        cases = self.find(prompt, image)
        images = [make_image(images_of(case.answer)[0]) for case in cases]
        thoughts = [(texts_of(case.answer) or [": ".join(case.drawn_from)])[0] for case in cases] if think else None
        return SimpleNamespace(images=images, thoughts=thoughts)

    def video(self, prompt, image, num_frames, generator):
        self.calls.append("video")
        cases = self.find(prompt, image and [[own] for own in image])
        assert {len(case.frames) for case in cases} == {num_frames}
        return SimpleNamespace(
            frames=[[make_image(frame) for frame in case.frames] for case in cases],
            transitions=[texts_of(case.answer) for case in cases],
        )

    def chat(self, messages, max_images, **options):
        self.calls.append("chat")
        asked = [[part.get("image") or part["text"] for part in turn[0]["content"]] for turn in messages]
        return [
            {"role": "assistant", "content": [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": make_image(p)}
                for p in self.known[self.key(parts)].answer
            ]}
            for parts in asked
        ]  # fmt: skip


@pytest.fixture
def evaluation():
    return AbilitiesEvaluation(KnowingPipeline(), limit=LIMIT, seeds=2)


@pytest.mark.parametrize("suite", DRAWN)
def test_right_images_score_one(suite, evaluation, monkeypatch):
    monkeypatch.setattr(abilities_evaluation, "BATCH_SIZE", 5)
    assert set(evaluation._score(suite, evaluation.draw).values()) == {1.0}
    assert evaluation.pipe.calls == ["draw"] * 6  # two seeds, batches of 5, 5 and 2


def test_thoughts_are_scored_beside_the_images(evaluation):
    table = evaluation._score("thinking", evaluation.think)
    assert table["overall"] == table["overall_thought"] == table["overall_plan"] == 1


def test_right_stories_videos_and_answers_score_one(evaluation):
    for ability, answer in (("story", evaluation.tell), ("video_question", evaluation.answer),
                            ("caption", evaluation.answer), ("text", evaluation.answer)):  # fmt: skip
        assert set(evaluation._score(ability, answer).values()) == {1.0}
    table = evaluation._score("video", evaluation.video, lambda case: (len(case.frames), case.first_given))
    assert set(table.values()) == {1.0}


def test_masked_edits_are_compared_outside_of_their_masks(evaluation, monkeypatch):
    monkeypatch.setattr(evaluation, "reconstruct", lambda scenes: np.stack([render(s, WORLD) // 2 for s in scenes]))
    table = evaluation.masked_editing()
    assert table["overall"] == table["pasted_equal"] == 1 and table["psnr_outside"] == pytest.approx(100)
    assert 0 < table["psnr_outside_bound"] < 20


def test_the_sheets_show_what_was_given_and_what_was_drawn(evaluation, tmp_path):
    evaluation._score("in_context", evaluation.draw)
    evaluation.save_sheets(tmp_path)
    with Image.open(tmp_path / "in_context.png") as sheet:
        assert sheet.size == (4 * (128 + 4) + 4, 4 * (128 + 4) + 4)


def test_all_suites_run_on_a_real_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(abilities_evaluation, "MAX_NEW_TOKENS", 4)
    processor = tiny_processor(patch_size=16)
    processor.think_prefix = "think:"
    pipe = NextFlowPipeline(
        tiny_model(vq_config={"patch_size": 16, "semantic_config": SEMANTIC_ENCODER}), processor
    )  # fmt: skip
    evaluation = AbilitiesEvaluation(pipe, limit=3, seeds=1)
    scores = evaluation.scores()
    assert set(scores) == {
        "editing", "masked_editing", "subject", "in_context", "thinking", "thinking_without", "thinking_plainly",
        "interleaved", "video", "ranking", "captions", "video_questions", "text",
    }  # fmt: skip
    assert all(0 <= value <= 1 for suite in scores.values() for key, value in suite.items() if "psnr" not in key)
    evaluation.save_sheets(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} >= {*DRAWN, "thinking_without", "video", "masked_editing"}
