"""RL on the shapes world: its prompts, its settings, a toy run, its notebook, and the benchmarks around it."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from processes import CONTEXT


pytest.importorskip("trl")
sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("examples/shapes", "benchmarks")]
import rl  # noqa: E402
import rl_cost  # noqa: E402
import rl_prefix  # noqa: E402
import rl_runs  # noqa: E402
import rl_self_reward  # noqa: E402

from transformers_nextflow import ImageSampling  # noqa: E402
from transformers_nextflow.worlds.shapes import CATEGORIES, is_reserved, parse_caption  # noqa: E402


def test_prompts_to_train_on_are_of_all_categories_and_not_kept_for_evaluation():
    rows = rl.training_prompts(60, seed=0)
    assert rows["category"] == [*CATEGORIES] * 10
    assert not any(map(is_reserved, rows["prompt"])) and all(map(parse_caption, rows["prompt"], [rl.WORLD] * 60))
    assert rl.training_prompts(60, seed=1)["prompt"] != rows["prompt"]


def test_prompts_go_to_the_categories_whose_groups_differ_in_reward():
    rewards = torch.zeros(12, 4)  # two prompts of each category in turn
    rewards[CATEGORIES.index("position"), :2] = 1
    rewards[CATEGORIES.index("counting") + 6, :1] = 1
    shares = rl.teaching_shares(rewards, focus=0.75)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["position"] > shares["counting"] > shares["colors"] == pytest.approx(0.25 / 6)
    assert rl.teaching_shares(torch.ones(6, 4), focus=0.75)["colors"] == pytest.approx(1 / 6)
    drawn = rl.training_prompts(300, 0, shares)["category"]
    assert drawn.count("position") / 300 == pytest.approx(shares["position"], abs=0.1)
    assert not any(map(is_reserved, rl.training_prompts(60, 0, shares)["prompt"]))


def test_trained_scales_are_drawn_with_chance_and_the_others_as_before():
    sampling = ImageSampling(guidance_scale=2.0, temperature=[0.7, 0.8, 0.0, 0.0])
    assert rl.exploring(sampling, 3, 4) == ImageSampling(guidance_scale=2.0, temperature=[0.7, 0.8, 0.7, 0.0])
    assert rl.exploring(ImageSampling(temperature=0.0), 1, 2).temperature == [1.0, 0.0]


def test_the_summary_tells_gains_of_drawing_and_losses_of_understanding():
    # Colors only had bad luck on the scored prompts.
    drawn = {category: 0.9 for category in CATEGORIES} | {"position": 0.3, "colors": 0.2, "overall": 0.8}
    understood = {"questions": 0.7, "caption": 0.6, "located_caption": 0.5}
    before = {"text_to_image": drawn, "understanding": understood, "weakest_category": "position"}
    after = {
        "text_to_image": drawn | {"position": 0.4, "overall": 0.85},
        "understanding": understood | {"questions": 0.69, "caption": 0.65},
    }
    found = rl.summary(before, after)
    assert found.pop("weakest_category") == "position"
    assert found == pytest.approx({"weakest_category_gain": 0.1, "overall_gain": 0.05, "understanding_drop": 0.01})


def test_the_weakest_category_is_the_one_least_often_right():
    rewards = torch.ones(2 * len(CATEGORIES), 4)  # two prompts of each category in turn
    rewards[CATEGORIES.index("colors")] = 0.5  # right, and more than was asked for
    rewards[CATEGORIES.index("position") + len(CATEGORIES), :2] = 0
    assert rl.weakest_of(rewards) == "position"


# Toy runs -------------------------------------------------------------------------------------------------------------


def arguments_of(folder, **settings) -> argparse.Namespace:
    """One step on two prompts, and next to nothing scored."""
    toy = {"steps": 1, "groups": 1, "num_generations": 2, "limit": 1, "reading_limit": 1, "curve_limit": 1}
    toy |= {"output_dir": str(folder), "reward": "checker", "prefix": 5, "seed": 0} | settings
    return argparse.Namespace(**vars(rl.training_parser("").parse_args([])) | toy)


@pytest.fixture(scope="module")
def in_the_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        patch.setattr(rl, "PROBED", 1)
        yield patch


@pytest.fixture(scope="module")
def toy_run(in_the_root, tmp_path_factory):
    """Arguments, the scores before, what the run returned."""
    arguments = arguments_of(tmp_path_factory.mktemp("run"))
    before = rl.scores_before(arguments)
    return arguments, before, rl.run(arguments, before)


def test_a_run_writes_what_it_returns_and_is_found_finished(toy_run):
    arguments, before, values = toy_run
    written = json.loads((Path(arguments.output_dir) / "rl.json").read_text())
    assert {name: written[name] for name in values} == json.loads(json.dumps(values))
    assert values["steps"] == 1 and [point["step"] for point in values["curve"]] == [0, 1]
    assert values["curve"][1]["seconds"] > 0 and set(values["shares"]) == set(CATEGORIES)
    assert rl.summary(values["before"], values["after"]).items() <= values.items()
    assert (Path(arguments.output_dir) / "model.safetensors").exists()
    assert rl_runs.run_all([arguments], before, processes=1) == [written]
    for changed, of in ((arguments_of(arguments.output_dir, beta=0.5), before), (arguments, before | {"weights": "0"})):
        with pytest.raises(ValueError, match="remove its folder"):
            rl_runs.finished(changed, of)
    assert rl_runs.finished(arguments_of(Path(arguments.output_dir) / "other"), before) is None


def test_the_notebook_runs_from_top_to_bottom(in_the_root, tmp_path):
    notebook = json.loads((Path(rl.__file__).parent / "rl.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    in_the_root.setenv("MPLBACKEND", "Agg")
    values = {}
    for cell in cells:
        exec("".join(cell["source"]), values)
        if "parameters" in cell["metadata"].get("tags", ()):
            values |= {"STEPS": 1, "GROUPS": 1, "IMAGES": 2, "PROMPTS": 1, "QUESTIONS": 1, "OUTPUT": str(tmp_path)}
    assert values["values"]["steps"] == 1 and (tmp_path / "rl.json").exists()


# Benchmarks -----------------------------------------------------------------------------------------------------------


BEFORE = {
    "weakest_category": "position",
    "text_to_image": {category: 0.9 for category in CATEGORIES} | {"position": 0.3, "overall": 0.8},
    "understanding": {"questions": 0.7, "caption": 0.6, "located_caption": 0.5},
}


def fake_run(run: argparse.Namespace, before: dict, gain: float, last: int, seconds: float, understood=0.0):
    """Leaves behind what a run would that gained so much up to its last step."""
    after = {suite: dict(BEFORE[suite]) for suite in ("text_to_image", "understanding")}
    for name in ("position", "overall"):
        after["text_to_image"][name] += gain
    after["understanding"]["caption"] -= understood
    curve = [
        {"step": step, "seconds": seconds * step / last, "overall": 0.8 + gain * step / last, "position": 0.3}
        for step in (0, last // 2, last)
    ]
    values = rl.summary(before, after) | {"steps": last, "seconds": seconds, "before": before, "after": after}
    log = [{"reward": 0.5}, {"reward": 0.6}, {"loss": 0.0}, {"reward": 0.7}]
    values |= {"curve": curve, "settings": vars(run), "log": log}
    Path(run.output_dir).mkdir(parents=True)
    (Path(run.output_dir) / "rl.json").write_text(json.dumps(values))


def benchmark_arguments(name: str, folder: Path) -> argparse.Namespace:
    folders = {key: folder / key for key in ("output_dir", "results", "figures")}
    return argparse.Namespace(**vars(rl_runs.benchmark_parser("", name).parse_args([])) | folders | {"seeds": 2})


def run_main(benchmark, arguments: argparse.Namespace, monkeypatch, *more: str) -> dict:
    """The result file of a benchmark all of whose runs are finished."""
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "before.json").write_text(json.dumps(BEFORE | rl.start_of(arguments)))
    folders = [text for key in ("output_dir", "results", "figures") for text in (f"--{key}", str(vars(arguments)[key]))]
    monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", "--seeds", "2", *folders, *more])
    benchmark.main()
    return json.loads((arguments.results / f"{benchmark.__name__}.json").read_text())


def test_prefixes_are_compared_at_equal_steps_and_at_equal_time(in_the_root, tmp_path, monkeypatch):
    arguments = benchmark_arguments("rl_prefix", tmp_path)
    before = BEFORE | rl.start_of(arguments)
    for prefix, last, seconds, gain in ((5, 100, 60, 0.1), (8, 50, 60, 0.02)):
        for seed, understood in enumerate((0.0, 0.02)):
            run = rl_runs.job(arguments, f"prefix_{prefix}-seed_{seed}", reward="checker", prefix=prefix, seed=seed)
            fake_run(run, before, gain + 0.02 * seed, last, seconds, understood)
    written = run_main(rl_prefix, arguments, monkeypatch, "--prefixes", "5", "8")
    assert written["weakest_category"] == "position" and written["num_prefix_scales"] == 5
    gains = {"weakest_category_gain": 0.11, "overall_gain": 0.11, "understanding_drop": 0.01}
    assert {name: written[name] for name in gains} == pytest.approx(gains)
    assert [seed["overall_gain"] for seed in written["arms"]["all scales"]["seeds"]] == pytest.approx([0.02, 0.04])
    # Half of the way of the first 5 scales, and all of the way of all scales.
    assert written["at_equal_steps"]["step"] == 50
    assert written["at_equal_steps"]["first 5 scales"]["overall"] == pytest.approx(0.855)
    assert written["at_equal_steps"]["all scales"]["overall"] == pytest.approx(0.83)
    assert written["at_equal_seconds"]["first 5 scales"]["overall"] == pytest.approx(0.91)
    curve = written["arms"]["first 5 scales"]["curves"]["step"]
    assert (curve["step"][-1], curve["overall"][-1], len(curve["overall"])) == (100, 0.91, rl_runs.POINTS)
    assert (arguments.figures / "rl_prefix.png").stat().st_size > 0


def test_a_reward_that_rises_while_the_checker_falls_is_told(in_the_root, tmp_path, monkeypatch):
    arguments = argparse.Namespace(**vars(benchmark_arguments("rl_self_reward", tmp_path)) | {"prefix": 5})
    before = BEFORE | rl.start_of(arguments)
    for seed, gain in enumerate((0.06, -0.02)):
        fake_run(rl_runs.job(arguments, f"seed_{seed}", reward="reading", seed=seed), before, gain, 10, 60)
    written = run_main(rl_self_reward, arguments, monkeypatch)
    assert written["checker_rises"] is False and written["overall_gain"] == pytest.approx(0.02)
    assert written["reading_gain"] == pytest.approx(0.2)
    assert (arguments.figures / "rl_self_reward.png").exists()


def test_scores_of_other_weights_are_not_taken_for_these(in_the_root, tmp_path):
    arguments = benchmark_arguments("rl_prefix", tmp_path)
    arguments.output_dir.mkdir()
    (arguments.output_dir / "before.json").write_text(json.dumps(BEFORE | rl.start_of(arguments) | {"weights": "0"}))
    with pytest.raises(ValueError, match="remove the folder"):
        rl_runs.scores_before(arguments)


def peak_of_a_large_tensor() -> int:
    with rl_cost.PeakMemory("cpu") as memory:
        torch.ones(50_000_000).sum()
    return memory.bytes


def test_a_step_on_the_prefix_reads_its_codes_alone_and_the_peak_is_seen():
    figures = rl_cost.measure("random", (1, 2, 3, 4), 2, "cpu", torch.float32, batch=2, repeats=1)
    assert figures["codes"] == 5 and figures["seconds"] > 0
    with CONTEXT.Pool(1) as pool:  # here, other tests left memory that can be taken again
        assert pool.apply(peak_of_a_large_tensor) >= 190_000_000
