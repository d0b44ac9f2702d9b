"""The evaluation of a checkpoint on the shapes world, from its folder to the table of scores."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.worlds.shapes import CATEGORIES, DESCRIPTIONS, tokenizer_suite, understanding_cases
from transformers_nextflow.worlds.shapes import evaluation as shapes_evaluation
from transformers_nextflow.worlds.shapes.evaluation import ShapesEvaluation, evaluate_shapes
from transformers_nextflow.worlds.shapes.questions import QUESTIONS
from transformers_nextflow.worlds.shapes.suites import HELD_OUT_CATEGORIES


SEMANTIC_ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
SCENES = 12


@pytest.fixture(scope="module")
def model():
    """Draws the shapes world's canvas: 4x4 cells of 16 pixels."""
    return tiny_model(vq_config={"patch_size": 16, "semantic_config": SEMANTIC_ENCODER})


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(patch_size=16)


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    """A checkpoint with its scores and sheets."""
    folder = tmp_path_factory.mktemp("checkpoint")
    NextFlowPipeline(model, processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scores(folder):
    with pytest.MonkeyPatch.context() as patch:
        # As the real thing, on fewer scenes.
        patch.setattr(tokenizer_suite, "PROBE_SCENES", 40)
        patch.setattr(tokenizer_suite, "PROBE_STEPS", 5)
        fewer = partial(tokenizer_suite.evaluate_tokenizer, count=SCENES)
        patch.setattr(shapes_evaluation, "evaluate_tokenizer", fewer)
        return evaluate_shapes(str(folder), limit=2, seeds=1, sheets=folder / "sheets")


def test_all_suites_are_scored_between_0_and_1(scores):
    assert list(scores) == ["text_to_image", "held_out_combinations", "understanding", "tokenizer", "oracle"]
    for suite in ("text_to_image", "held_out_combinations", "understanding", "oracle"):
        assert all(0 <= score <= 1 for score in scores[suite].values())


@pytest.mark.parametrize(
    "suite, categories", [("text_to_image", CATEGORIES), ("held_out_combinations", HELD_OUT_CATEGORIES)]
)
def test_drawing_has_every_category_under_both_rules(scores, suite, categories):
    names = {*categories, "overall"}
    assert set(scores[suite]) == names | {f"{name}_strict" for name in names}
    for suffix in ("", "_strict"):
        mean = np.mean([scores[suite][category + suffix] for category in categories])
        assert scores[suite]["overall" + suffix] == pytest.approx(mean)
    assert all(scores[suite][f"{name}_strict"] <= scores[suite][name] for name in names)


def test_understanding_has_every_kind_of_question_and_captions(scores):
    assert set(scores["understanding"]) == {*QUESTIONS, *DESCRIPTIONS, "questions", "overall"}


def test_the_oracle_is_asked_for_every_number_of_true_scales(scores):
    assert list(scores["oracle"]) == [f"first_{given}_scales_true" for given in range(4)]


def test_the_tokenizer_has_its_gates_and_its_codebook_statistics(scores):
    probes = {"linear_probe_shape", "linear_probe_color"}
    names = probes | {f"{probe}_with_last_scale" for probe in probes}
    names |= {"psnr", "ssim", "exact_scenes", "usage", "perplexity"}
    names |= {f"{name}_scale_{scale}" for name in ("usage", "perplexity") for scale in range(1, 5)}
    assert names < set(scores["tokenizer"])
    assert 0 < scores["tokenizer"]["psnr"] < 30 and 0 < scores["tokenizer"]["usage"] <= 1


def test_the_sheets_show_a_row_for_each_category(scores, folder):
    for suite, rows in (("text_to_image", 6), ("held_out_combinations", 4)):
        with Image.open(folder / "sheets" / f"{suite}.png") as sheet:
            assert sheet.size == (2 * (128 + 4) + 4, rows * (128 + 4) + 4)


def test_a_image_depends_on_its_seed_and_not_on_its_batch(model, processor, monkeypatch):
    evaluation = ShapesEvaluation(model, processor)
    prompts = ["a red circle", "two blue squares and a green star", "one"]
    together = evaluation.draw(prompts, seed=0)
    assert together.shape == (3, 64, 64, 3) and together.dtype == np.uint8
    assert not np.array_equal(together, evaluation.draw(prompts, seed=1))
    monkeypatch.setattr(shapes_evaluation, "BATCH_SIZE", 2)
    np.testing.assert_array_equal(evaluation.draw(prompts, seed=0), together)


def test_the_oracle_keeps_the_codes_that_it_is_given(model, processor):
    schedule = model.config.vq_config.scale_schedules.for_size(64, 64)
    given = torch.randint(32, (2, schedule.offsets[3]), generator=torch.Generator().manual_seed(0))
    drawn = []
    generate = model.generate_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate_images", lambda **kwargs: drawn.append(generate(**kwargs)) or drawn[0])
        ShapesEvaluation(model, processor).draw(["a red circle", "one"], seed=0, given_codes=given)
    assert torch.equal(drawn[0].image_tokens[:, : given.shape[1]], given)


def test_right_answers_score_one_and_others_count_against_their_own_kind(model, processor, monkeypatch):
    monkeypatch.setattr(shapes_evaluation, "BATCH_SIZE", 3)
    cases = understanding_cases(shapes_evaluation.WORLD, 2, seed=0)
    evaluation = ShapesEvaluation(model, processor, limit=2)
    for wrong_kind in ("none", "color", "caption"):
        texts = iter("?" if case.kind == wrong_kind else case.answer[0] for case in cases)
        monkeypatch.setattr(evaluation, "answer", lambda images, questions, t=texts: [next(t) for _ in questions])
        table = evaluation.understanding()
        assert {kind for kind, score in table.items() if score == 0} == {wrong_kind} - {"none"}
        assert table["questions"] == pytest.approx(1 - (wrong_kind == "color") / len(QUESTIONS))
        assert table["overall"] == pytest.approx(1 - (wrong_kind != "none") / (len(QUESTIONS) + len(DESCRIPTIONS)))
