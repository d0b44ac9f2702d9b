"""The evaluator beside a training: each checkpoint is scored once, whole or not at all."""

import csv
import json
import shutil
import time
from functools import partial
from multiprocessing.process import BaseProcess
from types import ModuleType

import pytest
import torch
from command_line import run_command
from PIL import Image
from processes import CONTEXT
from test_resuming import make
from test_shapes_evaluation import SEMANTIC_ENCODER
from tiny import tiny_model
from transformers import TrainerCallback

from transformers_nextflow.cli import app
from transformers_nextflow.evaluation.suites import SUITES
from transformers_nextflow.trainers.runs.atomic_checkpoints import SUPERSEDED
from transformers_nextflow.trainers.runs.scored_checkpoints import CheckpointScores
from transformers_nextflow.worlds.shapes import evaluation, tokenizer_suite


@pytest.fixture
def suite(monkeypatch):
    """A suite that reads its score from the checkpoint, and notes what it was asked."""
    module, asked = ModuleType("counted_suite"), []

    def evaluate(checkpoint, limit=None, seeds=4, sheets=None, device=None):
        asked.append((checkpoint.rpartition("-")[2], limit, seeds))
        Image.new("RGB", (8, 8)).save(sheets / "text_to_image.png")
        with open(f"{checkpoint}/score") as file:
            return {"drawing": {"overall": float(file.read()), "psnr": 29.5}}

    module.evaluate = evaluate
    monkeypatch.setitem(__import__("sys").modules, "counted_suite", module)
    monkeypatch.setitem(SUITES.places, "counted", "counted_suite:evaluate")
    return asked


def checkpoint(run, step: int, score: float):
    (run / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
    (run / f"checkpoint-{step}" / "score").write_text(str(score))


def test_checkpoints_are_scored_once_in_order_with_sheets_and_a_curve(suite, tmp_path):
    checkpoint(tmp_path, 20, 0.5)
    checkpoint(tmp_path, 3, 0.25)
    checkpoint(tmp_path, 40, 0.0)
    (tmp_path / "checkpoint-40" / SUPERSEDED).touch()
    (tmp_path / "partial-checkpoint").mkdir()
    evaluator = CheckpointScores(tmp_path, "counted", limit=2, seeds=1)
    assert list(evaluator.update()) == [3, 20] and suite == [("3", 2, 1), ("20", 2, 1)]
    folder = tmp_path / "evaluation" / "counted"
    assert {path.name for path in (folder / "checkpoint-20").iterdir()} == {"scores.json", "text_to_image.png"}
    assert {"command", "commit", "machine"} < set(json.loads((folder / "checkpoint-20" / "scores.json").read_text()))
    with open(folder / "curve.csv") as file:
        assert list(csv.reader(file)) == [
            ["step", "drawing/overall", "drawing/psnr"],
            ["3", "0.25", "29.5"],
            ["20", "0.5", "29.5"],
        ]
    assert Image.open(folder / "curve.png").size[0] == 640
    again = CheckpointScores(tmp_path, "counted", limit=2, seeds=1)
    assert list(again.update()) == []
    # What a rotation takes away stays scored.
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert list(again.update()) == [] and list(again.scores()) == [3, 20]
    assert list(CheckpointScores(tmp_path, "counted", limit=1, seeds=1).update()) == [20]


def test_weights_that_are_written_again_are_scored_anew(suite, tmp_path):
    checkpoint(tmp_path, 1, 0.5)
    evaluator = CheckpointScores(tmp_path, "counted")
    list(evaluator.update())
    time.sleep(0.01)
    checkpoint(tmp_path, 1, 0.75)
    assert list(evaluator.update()) == [1]
    assert evaluator.scores()[1]["drawing"]["overall"] == 0.75


def test_a_failed_score_leaves_nothing_and_one_of_a_rotated_checkpoint_is_passed_over(suite, tmp_path):
    checkpoint(tmp_path, 1, 0.5)
    (tmp_path / "checkpoint-1" / "score").write_text("none")
    evaluator = CheckpointScores(tmp_path, "counted")
    with pytest.raises(ValueError):
        list(evaluator.update())
    assert list((tmp_path / "evaluation" / "counted").iterdir()) == []
    checkpoint(tmp_path, 2, 1.0)
    evaluate, evaluator.evaluate = (
        evaluator.evaluate,
        lambda folder, **options: (
            (shutil.rmtree(folder) if folder.endswith("-1") else None) or evaluate(folder, **options)
        ),
    )
    assert list(evaluator.update()) == [2]


def test_watching_ends_when_the_final_weights_stand_and_all_is_scored(suite, tmp_path, monkeypatch):
    checkpoint(tmp_path, 1, 0.5)
    waited = []

    def train(seconds):
        waited.append(seconds)
        checkpoint(tmp_path, 2, 0.75)
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "score").write_text("1")

    monkeypatch.setattr(time, "sleep", train)
    assert list(CheckpointScores(tmp_path, "counted").watch(every=5)) == [1, 2] and waited == [5]


def test_the_command_scores_what_is_there(suite, tmp_path):
    checkpoint(tmp_path, 1, 0.5)
    result = run_command("evaluate-run", tmp_path, "--suite", "counted", "--once")
    assert result.exit_code == 0 and "checkpoint-1" in result.output, result.output
    result = run_command("evaluate-run", tmp_path / "none", "--once")
    assert result.exit_code == 2 and "none is not a folder" in result.output


def test_a_checkpoint_in_parts_is_refused_by_name(suite, tmp_path):
    (tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint-3 holds sharded weights.*FULL_STATE_DICT"):
        list(CheckpointScores(tmp_path, "counted").update())


# Another process and a training ---------------------------------------------------------------------------------------


def evaluate_run(folder: str):
    """The command with the suite of the shapes world as it is, on fewer scenes of its tokenizer."""
    torch.set_num_threads(1)
    tokenizer_suite.PROBE_SCENES, tokenizer_suite.PROBE_STEPS = 40, 5
    evaluation.evaluate_tokenizer = partial(tokenizer_suite.evaluate_tokenizer, count=12)
    app(["evaluate-run", folder, "--limit", "1", "--seeds", "1", "--every", "1", "--device", "cpu"])


class WaitsFor(TrainerCallback):
    """The step after the first checkpoint begins when that has its scores."""

    def __init__(self, scores, evaluator: BaseProcess):
        self.scores, self.evaluator = scores, evaluator

    def on_step_begin(self, args, state, control, **kwargs):
        while state.global_step == 2 and not self.scores.exists():
            assert self.evaluator.is_alive()
            time.sleep(0.1)


def test_a_training_is_scored_as_it_goes_by_another_process_that_ends_with_it(tmp_path):
    evaluator = CONTEXT.Process(target=evaluate_run, args=(str(tmp_path),))
    evaluator.start()
    try:
        scores = tmp_path / "evaluation" / "shapes" / "checkpoint-2" / "scores.json"
        model = tiny_model(vq_config={"patch_size": 16, "semantic_config": SEMANTIC_ENCODER})
        trainer = make(tmp_path, model, patch_size=16)
        trainer.add_callback(WaitsFor(scores, evaluator))
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        evaluator.join(timeout=300)
    finally:
        evaluator.kill()
    assert evaluator.exitcode == 0
    assert [int(step) for step in CheckpointScores(tmp_path, limit=1, seeds=1).scores()] == [2, 4]
    with open(tmp_path / "evaluation" / "shapes" / "curve.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]
    assert Image.open(scores.parent / "text_to_image.png").size[0] > 0
