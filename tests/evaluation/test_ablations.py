"""The ablations: every one from end to end at a toy size, the arithmetic of their results, and what a kill leaves."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import tiny_emoji
import torch
from tiny import tiny_config, tiny_vq_config


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "ablations"))
pytest.importorskip("matplotlib")
import codebooks  # noqa: E402
import experiment  # noqa: E402
import heads  # noqa: E402
import report  # noqa: E402
import training  # noqa: E402
from jobs import Budget, Cache, Job, do_jobs  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from transformers_nextflow import NextFlowVQModel  # noqa: E402
from transformers_nextflow.sequence.loss import LossTargets  # noqa: E402
from transformers_nextflow.worlds.emoji.judge import Judge, Vocabulary  # noqa: E402


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 1, "num_key_value_heads": 1}
ARMS = {
    "a": {0: [{"step": 0, "s": 9.0}, {"step": 2, "s": 1.0}], 1: [{"step": 0, "s": 9.0}, {"step": 2, "s": 2.0}]},
    "b": {0: [{"step": 0, "s": 9.0}, {"step": 2, "s": 3.0}], 1: [{"step": 0, "s": 9.0}, {"step": 2, "s": 4.1}]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where all ablations keep their jobs and results, as they do in the repository."""
    root = tmp_path_factory.mktemp("ablations")
    return {name: root / name for name in ("runs", "results", "figures")}


def train_tiny_models_on_few_rows(module, monkeypatch):
    for of in (training, module):
        monkeypatch.setattr(of, "BATCH_SIZE", 8, raising=False)
    for name, value in TINY.items():
        monkeypatch.setitem(training.SIZE, name, value)
    monkeypatch.setattr(codebooks, "IMAGES", 1000)


def use_tiny_emoji_world(emoji, folder: Path, monkeypatch):
    """Makes the ablation of the emoji world use a random checkpoint and judge, and drawings of the tests."""
    world = tiny_emoji.tiny_world(side=16, plain=True)
    torch.manual_seed(0)
    NextFlowVQModel(tiny_vq_config()).save_pretrained(folder / "tokenizer")
    Judge(Vocabulary(world.concepts, world.styles), width=4).save(folder / "judge")
    world.save(folder / "judge" / "world.json")
    size = emoji.DATA.SIZES["small"]
    emoji.DATA.write_start(str(folder / "tokenizer"), size, world, folder / "checkpoint", count=20)
    for name in ("MODEL", "PROCESSOR"):
        monkeypatch.setattr(emoji, name, folder / "checkpoint")
    monkeypatch.setattr(emoji, "JUDGE", folder / "judge")
    monkeypatch.setattr(emoji, "ART", tiny_emoji.FIXTURES / "art.zip")
    monkeypatch.setattr(emoji, "HELD_OUT_ROWS", 8)


@pytest.mark.parametrize("name", report.ABLATIONS)
def test_an_ablation_runs_from_end_to_end_and_fills_its_part_of_the_page(name, folders, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    train_tiny_models_on_few_rows(module, monkeypatch)
    if name == "emoji_features":
        use_tiny_emoji_world(module, tmp_path, monkeypatch)
    toy = ["--steps", "2", "--seeds", "1", "--prompts", "1", "--workers", "1"]
    options = [text for option, folder in folders.items() for text in (f"--{option}", str(folder))]
    monkeypatch.setattr(sys, "argv", [f"benchmarks/ablations/{name}.py", *toy, *options])
    module.ABLATION.main(module.__doc__)
    result = json.loads((folders["results"] / f"ablation_{name}.json").read_text())
    assert list(result["arms"]) == list(result["summary"]) == list(module.ABLATION.arms)
    curves = [result["arms"][arm]["0"] for arm in result["arms"]]
    assert all([point["step"] for point in curve] == [0, 1, 2] for curve in curves)
    # Different arms end differently, from the same data and seed.
    assert len({curve[-1]["code_loss"] for curve in curves}) == len(curves)
    assert (folders["figures"] / f"{name}.png").stat().st_size > 10_000
    section = report.section(module.ABLATION, module.__doc__, result)
    assert all(f"| {arm} | " in section for arm in result["arms"]) and section.count("**undecided**") == len(
        module.ABLATION.claims
    )
    assert "Not run yet" in report.section(module.ABLATION, module.__doc__, None)


def test_the_single_codebook_tells_codes_apart_by_pixels_alone(folders):
    tokenizers = [load_file(path) for path in (folders["runs"] / "tokenizers").glob("*/model.safetensors")]
    dual, single = sorted(tokenizers, key=lambda state: -state["quantizer.semantic_codebook.weight"].shape[1])
    assert dual["quantizer.semantic_codebook.weight"].std() > 0.1
    assert not single["quantizer.semantic_codebook.weight"].any()
    assert single["quantizer.pixel_codebook.weight"].std() > 0.1


def test_the_summary_has_means_and_standard_deviations_of_the_last_points():
    summary = experiment.summarize(ARMS)
    assert summary["a"]["s"] == {"mean": 1.5, "spread": pytest.approx(0.5**0.5)}
    assert experiment.in_words(summary["a"]["s"]) == "1.500 ± 0.707"
    one = experiment.summarize({"a": {0: ARMS["a"][0]}})["a"]["s"]
    assert one == {"mean": 1.0, "spread": None} and experiment.in_words(one) == "1.000"


@pytest.mark.parametrize(
    ("differences", "paper", "found", "verdict"),
    [
        ((0.2, 0.3, 0.25), "above", "above", experiment.AS_IN_PAPER),
        ((0.2, 0.3, 0.25), "below", "above", experiment.CONTRARY),
        ((0.2, 0.3, 0.25), "level", "above", experiment.CONTRARY),
        ((-0.2, -0.3, -0.25), "below", "below", experiment.AS_IN_PAPER),
        ((-0.2, 0.3, 0.25), "above", "level", experiment.OPEN),
        ((0.01, 0.9, 0.02), "above", "level", experiment.OPEN),
        ((0.01, -0.02, 0.02), "level", "level", experiment.AS_IN_PAPER),
        ((0.4,), "above", "above", experiment.OPEN),
    ],
)
def test_a_difference_counts_only_with_one_sign_and_above_two_standard_errors(differences, paper, found, verdict):
    arms = {
        "x": {seed: [{"step": 1, "s": 1 + value}] for seed, value in enumerate(differences)},
        "y": {seed: [{"step": 1, "s": 1.0}] for seed in range(len(differences))},
    }
    result = experiment.Claim("s", "x", "y", paper).test(arms)
    assert (result["found"], result["verdict"]) == (found, verdict)
    assert result["differences"] == pytest.approx(list(differences))


def test_the_image_has_a_panel_for_every_score_that_the_curves_have(tmp_path):
    path = experiment.plot(ARMS, {"s": "a score", "psnr": "of the tokenizer alone"}, tmp_path / "new" / "x.png")
    assert path.stat().st_size > 5_000


def test_a_killed_run_goes_on_with_the_jobs_that_are_not_done(tmp_path):
    done, fails = [], True

    def run(seed, budget, cache, arm):
        if fails and (arm, seed) == ("y", 0):
            raise KeyboardInterrupt
        done.append((arm, seed))
        return [{"step": budget.steps, "s": float(seed)}]

    cache, budget = Cache(tmp_path), Budget(steps=2, prompts=1)
    jobs = [Job(run, {"arm": arm}, seed, budget) for seed in (0, 1) for arm in ("x", "y")]
    with pytest.raises(KeyboardInterrupt):
        do_jobs(jobs, cache, workers=1)
    assert done == [("x", 0)] and jobs[1].curve(cache) is None
    fails = False
    do_jobs(jobs, cache, workers=1)
    assert done == [("x", 0), ("y", 0), ("x", 1), ("y", 1)]
    assert jobs[3].curve(cache) == [{"step": 2, "s": 1.0}]
    # Another budget is another job.
    assert Job(run, {"arm": "x"}, 0, Budget(steps=3, prompts=1)).curve(cache) is None


def test_two_processes_do_every_job_once(tmp_path, monkeypatch):
    (tmp_path / "toy_run.py").write_text(
        "def run(seed, budget, cache, arm):\n"
        "    made = cache.folder('shared', {'arm': arm}, lambda folder: folder.mkdir())\n"
        "    (made / str(seed)).touch(exist_ok=False)\n"
        "    return [{'step': budget.steps, 's': seed}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run, cache = importlib.import_module("toy_run").run, Cache(tmp_path / "runs")
    jobs = [Job(run, {"arm": arm}, seed, Budget(1, 1)) for arm in ("x", "x", "y") for seed in range(2)]
    for _ in range(2):
        do_jobs(jobs, cache, workers=2)
    assert [job.curve(cache)[0]["s"] for job in jobs] == [0, 1] * 3
    assert len(list((tmp_path / "runs" / "jobs").iterdir())) == 4


def test_what_was_half_made_when_a_run_was_killed_is_made_anew(tmp_path):
    def make(folder: Path):
        folder.mkdir()
        (folder / "first").touch()
        if not whole:
            raise KeyboardInterrupt
        (folder / "second").touch()

    cache, whole = Cache(tmp_path), False
    with pytest.raises(KeyboardInterrupt):
        cache.folder("rows", {"x": 1}, make)
    whole = True
    assert len(list(cache.folder("rows", {"x": 1}, make).iterdir())) == 2
    assert cache.folder("rows", {"x": 1}, None) != cache.path("rows", {"x": 2})


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="start at 1, got 0 and 40"):
        Budget(0, 40)


def test_two_heads_choose_among_their_own_classes():
    torch.manual_seed(0)
    model, text = heads.TwoHeads(tiny_config()), tiny_config().text_config.vocab_size
    hidden_states = torch.randn(3, 32)
    classes = torch.tensor([4, text + 7, text])
    targets = LossTargets(None, classes, torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0, 1, 3]))
    total, losses, correct = model._cross_entropy(hidden_states, targets)
    logits = model.head(hidden_states)
    words, codes = logits[:, :text].log_softmax(-1), logits[:, text:].log_softmax(-1)
    expected = -torch.stack([words[0, 4], codes[1, 7], codes[2, 0]])
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, expected @ targets.weights)
    assert correct.tolist() == [words[0].argmax() == 4, codes[1].argmax() == 7, codes[2].argmax() == 0]


def test_losses_of_codes_are_means_over_codes_of_all_and_of_either_half_of_the_scales():
    losses = training.code_losses([1.0, 2.0, 3.0, 5.0], (1, 1, 4, 16))
    assert losses["coarse_loss"] == 1.5 and losses["fine_loss"] == pytest.approx((4 * 3 + 16 * 5) / 20)
    assert losses["code_loss"] == pytest.approx((1 + 2 + 4 * 3 + 16 * 5) / 22) and losses["scale_4_loss"] == 5.0


def test_self_correction_changes_what_is_read_of_drawings_and_keeps_a_quarter_of_text():
    vq_model = training.bundled_tokenizer()
    exchanges = training.training_exchanges(training.WORLD, 60, text_share=0.25)
    plain, drawn = (training.rows_of(exchanges, vq_model, training.WORLD, share) for share in (0.0, 1.0))
    assert 5 <= sum(not row["image_tokens"] for row in plain) <= 25
    assert all(row["image_tokens"] == row["image_labels"] for row in plain)
    images = [row for row in drawn if row["image_tokens"]]
    changed = torch.tensor([row["image_tokens"] for row in images]) != torch.tensor(
        [row["image_labels"] for row in images]
    )
    assert 0.3 < changed.float().mean() < 0.8
