"""The command line: images and answers, and errors in one line."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from command_line import run_command as run
from PIL import Image
from tiny import tiny_model, tiny_processor
from tiny_diffusion import tiny_decoder
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

import transformers_nextflow
from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.utils.provenance import read_provenance


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_model(), tiny_processor()
    model.generation_config.eos_token_id = -1
    processor.think_prefix = "think:"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_refused(result, message):
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1] and result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.stderr


def test_a_diffusion_decoder_is_named_or_the_one_of_the_pipelines_folder(checkpoint, tmp_path):
    pipe = NextFlowPipeline.from_pretrained(checkpoint)
    decoder = tiny_decoder(pipe.model.vq_model, upsampling=2)
    decoder.save_pretrained(tmp_path / "decoder")
    NextFlowPipeline(pipe.model, pipe.processor, decoder).save_pretrained(tmp_path / "pipe")
    Image.new("RGB", (16, 16)).save("own.png")
    calls = {"generate": ["a"], "edit": ["a", "--image", "own.png"], "video": ["a", "--num-frames", 2]}
    calls["vary"] = ["a", "--image", "own.png", "--num-images", 1]
    for command, arguments in calls.items():
        drawn = []
        for model, named in ((checkpoint, tmp_path / "decoder"), (tmp_path / "pipe", "diffusion")):
            output = f"{command}-{len(drawn)}.{'gif' if command == 'video' else 'png'}"
            options = ["--decoder", named, "--decoder-steps", 2, "--output", output]
            done = run(command, *arguments, "--model", model, *options)
            assert done.exit_code == 0, done.output
            drawn.append(np.asarray(Image.open(output)))
        assert drawn[0].shape[:2] == (32, 32) and (drawn[0] == drawn[1]).all()
    assert read_provenance("edit-0.png")["settings"]["decoder_steps"] == 2
    assert_refused(run("generate", "a", "--model", checkpoint, "--decoder", "no/folder"), "decoder no/folder")
    assert_refused(run("generate", "a", "--model", checkpoint, "--decoder", "diffusion"), "no diffusion decoder")
    assert_refused(run("generate", "a", "--model", checkpoint, "--decoder-steps", 2), "decoder_steps")
    # 16 pixels a side, and 32 by this decoder.
    large = run("generate", "a", "--model", checkpoint, "--decoder", tmp_path / "decoder", "--scale", 257)
    assert_refused(large, "use 256 at most")


def test_help_lists_all_commands():
    shown = run("--help").output
    assert all(name in shown for name in ("generate", "edit", "vary", "video", "describe", "score", "evaluate"))


def test_without_a_command_it_shows_a_tour_whose_commands_are_there(checkpoint, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_NEXTFLOW_MODEL", checkpoint)
    tour = run()
    assert tour.exit_code == 0 and len(tour.output.splitlines()) < 15 and f"Here it is {checkpoint}." in tour.output
    for line in tour.output.splitlines():
        if line.startswith("  "):
            command, *_ = re.split(r"   +", line.strip())
            result = run(*shlex.split(command))
            assert result.exit_code == 0, (command, result.output)


def test_files_say_what_drew_them_unless_they_shall_not(checkpoint):
    assert run("generate", "a red circle", "--model", checkpoint, "--seed", 3, "--scale", 2).exit_code == 0
    assert read_provenance("nextflow.png")["seed"] == 3
    assert run("--no-provenance", "generate", "a red circle", "--model", checkpoint).exit_code == 0
    assert read_provenance("nextflow.png") is None


def test_it_says_its_version():
    assert run("--version").output == f"transformers-nextflow {transformers_nextflow.__version__}\n"


def test_without_a_model_it_says_where_one_is_looked_for(checkpoint, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NEXTFLOW_MODEL", raising=False)
    result = run("generate", "a red circle")
    assert result.exit_code == 2 and "TRANSFORMERS_NEXTFLOW_MODEL" in " ".join(result.stderr.split())
    Path("checkpoints").mkdir()
    Path("checkpoints", "nextflow-emoji").symlink_to(checkpoint)
    assert run("generate", "a red circle", "--output", "own.png").exit_code == 0
    assert run("edit", "make it blue", "--image", "own.png").exit_code == 2
    Path("checkpoints", "nextflow-shapes").symlink_to(checkpoint)
    assert run("edit", "make it blue", "--image", "own.png").exit_code == 0


def test_generate_writes_the_image_that_the_pipeline_draws(checkpoint, tmp_path):
    result = run("generate", "a red circle", "--model", checkpoint, "--output", "new/out.png", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "new/out.png" in result.stdout and "Drawn in" in result.stdout
    pipe = NextFlowPipeline.from_pretrained(checkpoint)
    [expected] = pipe("a red circle", generator=torch.Generator().manual_seed(3)).images
    np.testing.assert_array_equal(np.asarray(Image.open("new/out.png")), np.asarray(expected))


def test_generate_numbers_the_images_of_several_prompts(checkpoint, tmp_path):
    options = ["--num-images", 2, "--guidance-scale", 2, "--negative-prompt", "one", "--height", 8, "--width", 32]
    result = run("generate", "a red circle", "two blue squares", "--model", checkpoint, *options)
    assert result.exit_code == 0, result.output
    names = [f"nextflow-{i}.png" for i in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Image.open(names[0]).size == (32, 8)
    # The second image of the first prompt has the next seed.
    run("generate", "a red circle", "--model", checkpoint, "--seed", 1, *options[2:])
    np.testing.assert_array_equal(np.asarray(Image.open("nextflow.png")), np.asarray(Image.open(names[1])))


def test_generate_saves_a_preview_of_each_scale_and_enlarges_pixels(checkpoint, tmp_path):
    result = run("generate", "a red circle", "--model", checkpoint, "--previews", "previews", "--scale", 3)
    assert result.exit_code == 0, result.output
    names = [f"nextflow-scale-{number}.png" for number in range(1, 5)]
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == names
    image = np.asarray(Image.open("nextflow.png"))
    assert image.shape == (48, 48, 3)
    np.testing.assert_array_equal(image, image[::3, ::3].repeat(3, 0).repeat(3, 1))
    np.testing.assert_array_equal(image, np.asarray(Image.open(f"previews/{names[-1]}")))


def test_previews_are_those_of_the_best_candidates_and_have_their_numbers(checkpoint, tmp_path):
    arguments = ["a red circle", "two blue squares", "--num-candidates", 2, "--previews", "previews"]
    result = run("generate", *arguments, "--model", checkpoint)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "previews").iterdir())) == 2 * 4
    for number in range(2):
        whole = Image.open(f"previews/nextflow-scale-4-{number}.png")
        np.testing.assert_array_equal(np.asarray(Image.open(f"nextflow-{number}.png")), np.asarray(whole))


def test_a_model_that_only_draws_describes_nothing(checkpoint, monkeypatch):
    Image.new("RGB", (16, 16)).save("own.png")
    pipe = NextFlowPipeline(tiny_t2i_model(), tiny_t2i_processor())
    monkeypatch.setattr("transformers_nextflow.cli._load_pipeline", lambda *_: pipe)
    assert_refused(run("describe", "own.png", "--model", checkpoint), "describe takes a model that reads images")


def test_a_rate_that_no_video_has_is_refused_before_it_is_drawn(checkpoint, tmp_path):
    result = run("video", "a", "--num-frames", 2, "--model", "no model", "--frames-per-second", 1000)
    assert result.exit_code == 2 and "--frames-per-second" in result.stderr and "no model" not in result.stderr


def test_generate_takes_a_dtype_and_a_device(checkpoint):
    result = run("generate", "a red circle", "--model", checkpoint, "--dtype", "bfloat16", "--device", "cpu")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "Prompt 0 is empty"),
        (["a", "--height", "16", "--width", "144"], "outside 1:4 to 4:1"),
        (["a", "--height", "17"], "the nearest that is: 16x16"),
        (["a", "--guidance-scale", "-1"], "guidance_scale must be at least 0"),
        (["a", "--num-images", "0"], "num_images_per_prompt must be a whole number from 1"),
        (["a", "--output", "image.doc"], "image.doc has no extension of an image"),
        (["a", "--output", "image"], "image has no extension of an image"),
        (["a", "--dtype", "int8"], "dtype must be one of"),
        (["a", "--device", "nowhere"], "Device 'nowhere' cannot be used"),
        (["a", "--model", "no/folder"], "No model can be loaded from no/folder"),
    ],
)
def test_generate_tells_what_is_wrong_in_one_line(checkpoint, tmp_path, arguments, message):
    assert_refused(run("generate", "--model", checkpoint, *arguments), message)
    assert not list(tmp_path.iterdir())


def test_without_diffusers_it_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers_nextflow.pipeline_nextflow")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = run("generate", "a", "--model", checkpoint)
    assert_refused(result, "pip install transformers-nextflow[pipelines]")


def test_the_script_draws_what_the_command_draws(checkpoint, tmp_path, monkeypatch):
    script = Path(__file__).parents[2] / "pipelines" / "text_to_image.py"
    options = ["a red circle", "--model", checkpoint, "--seed", "2", "--output", "script.png"]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    run("generate", *options[:-1], "command.png")
    np.testing.assert_array_equal(np.asarray(Image.open("script.png")), np.asarray(Image.open("command.png")))
    assert len(list(tmp_path.glob("script-scale-*.png"))) == 4


def test_generate_shows_the_thought_and_keeps_the_best_candidate(checkpoint):
    options = ["--model", checkpoint, "--think", "--num-candidates", 2]
    result = run("generate", "a red circle", *options)
    assert result.exit_code == 0, result.output
    assert "Thought: " in result.stdout and Path("nextflow.png").is_file()


def test_edit_video_vary_and_score_do_what_the_pipeline_does(checkpoint):
    pipe = NextFlowPipeline.from_pretrained(checkpoint)
    colors = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(colors).save("own.png")
    Image.new("L", (16, 16), 255).save("mask.png")
    model = ["--model", checkpoint]

    def equal(path, image):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))

    def seed():
        return torch.Generator().manual_seed(0)

    options = ["--image", "own.png", "--mask", "mask.png", "--paste-back", "--guidance-scale", 2]
    assert run("edit", "make it red", *options, *model).exit_code == 0
    settings = {"image": "own.png", "mask_image": "mask.png", "guidance_scale": 2.0, "generator": seed()}
    equal("edited.png", pipe("make it red", paste_back=True, **settings).images[0])

    result = run("vary", "a star", "--image", "own.png", "--keep-scales", 2, "--num-images", 2, *model)
    assert result.exit_code == 0, result.output
    equal("varied-0.png", pipe("a star", image="own.png", num_kept_scales=2, generator=seed()).images[0])

    result = run("video", "a star", "it moves", "--first-frame", "own.png", *model)
    assert result.exit_code == 0 and "Frame 2: it moves" in result.stdout, result.output
    assert Image.open("video.gif").n_frames == 2
    assert_refused(run("video", "a star", *model), "num_frames, or a text for each frame")
    assert_refused(run("video", "a", "b", "--output", "video.avi", "--model", "no/folder"), "written as .gif or .mp4")
    result = run("video", "a", "b", "--output", "new/folder/video.gif", *model)
    assert result.exit_code == 0 and Path("new/folder/video.gif").is_file(), result.output

    result = run("score", "a star", "--image", "own.png", "--image", "varied-1.png", *model)
    assert result.exit_code == 0, result.output
    expected = pipe.score(["own.png"], ["a star"])
    row = result.stdout.splitlines()[1].split("\t")
    assert row[0] == f"{float(expected.text_given_image[0]):.2f}" and row[2] == "own.png"
    described = run("describe", "video.gif", "own.png", *model, "--max-new-tokens", 3)
    assert described.exit_code == 0, described.output


BUNDLED = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes"


def test_variations_of_the_bundled_checkpoint_vary_or_the_message_says_why_they_cannot():
    options = ["a red circle", "--image", "circle.png", "--model", BUNDLED]
    assert run("generate", "a red circle", "--output", "circle.png", "--model", BUNDLED).exit_code == 0
    result = run("vary", *options, "--output", "varied.png")
    assert result.exit_code == 0, result.output
    assert len({Path(f"varied-{number}.png").read_bytes() for number in range(4)}) == 4
    assert_refused(run("vary", *options, "--keep-scales", 5), "give a temperature above 0")
    result = run("vary", *options, "--keep-scales", 5, "--temperature", 5, "--output", "warm.png")
    assert result.exit_code == 0 and len({Path(f"warm-{number}.png").read_bytes() for number in range(4)}) > 1
    with pytest.warns(UserWarning, match="All 4 variations for prompt 0 are the same image"):
        run("vary", *options, "--keep-scales", 4)


@pytest.mark.parametrize(
    ("script", "arguments", "written"),
    [
        ("edit_image.py", ["make it red", "own.png", "--mask", "mask.png"], "edited.png"),
        ("draw_from_images.py", ["do the same", "own.png", "own.png"], "drawn.png"),
        ("vary_image.py", ["a star", "own.png", "--keep-scales", "2"], "variation-3.png"),
        ("vary_image.py", ["a star", "own.png", "--temperature", "0.5"], "variation-3.png"),
        ("think_and_draw.py", ["a star"], "image.png"),
        ("draw_the_best.py", ["a star", "--candidates", "2"], "image.png"),
        ("video.py", ["a star", "--frames", "2"], "video.gif"),
        ("story.py", ["a star", "--images", "1"], None),
        ("describe_images.py", ["what is it?", "own.png"], None),
    ],
)
def test_each_script_runs_and_writes_its_images(checkpoint, monkeypatch, script, arguments, written):
    Image.new("RGB", (16, 16), "red").save("own.png")
    Image.new("L", (16, 16), 255).save("mask.png")
    path = Path(__file__).parents[2] / "pipelines" / script
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--model", checkpoint])
    runpy.run_path(str(path), run_name="__main__")
    assert written is None or Path(written).is_file()


def test_describe_gives_the_answer_of_the_model(checkpoint):
    Image.new("RGB", (16, 16), "red").save("red.png")
    answers = [run("describe", "red.png", "--model", checkpoint, "--max-new-tokens", 6) for _ in range(2)]
    assert answers[0].exit_code == 0, answers[0].output
    assert answers[0].stdout == answers[1].stdout
    asked = run("describe", "red.png", "--model", checkpoint, "--question", "how many circles are there?")
    assert asked.exit_code == 0, asked.output


def test_describe_refuses_what_is_no_image(checkpoint, tmp_path):
    assert_refused(run("describe", "none.png", "--model", checkpoint), "There is no image file none.png")
    (tmp_path / "text.png").write_text("no image")
    assert_refused(run("describe", "text.png", "--model", checkpoint), "text.png")


def test_evaluate_prints_and_writes_the_scores(monkeypatch):
    calls = []
    module = ModuleType("shapes_evaluation")
    module.evaluate_shapes = lambda checkpoint, **options: calls.append((checkpoint, options)) or {"overall": 0.5}
    monkeypatch.setitem(sys.modules, "transformers_nextflow.worlds.shapes.evaluation", module)
    result = run("evaluate", "folder", "--suite", "shapes", "--limit", 2, "--seeds", 1, "--json", "out/scores.json")
    assert result.exit_code == 0, result.output
    assert calls == [("folder", {"limit": 2, "seeds": 1, "sheets": None, "device": None})]
    with open("out/scores.json") as file:
        written = json.load(file)
    assert json.loads(result.stdout) == {"overall": 0.5}
    assert written["overall"] == 0.5 and {"command", "commit", "machine"} < set(written)


def test_evaluate_knows_its_suites():
    assert_refused(run("evaluate", "folder", "--suite", "photos"), "There is no suite 'photos'")


def test_a_image_that_cannot_be_written_to_its_end_leaves_the_one_before(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "out.png").write_bytes(b"before")

    def full(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run("generate", "a star", "--output", "out.png", "--model", checkpoint).exit_code != 0
    assert (tmp_path / "out.png").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_recipes_are_named_and_copied(tmp_path):
    result = run("recipes", "--copy", str(tmp_path / "mine"))
    assert result.exit_code == 0 and "sft" in result.output.split()
    assert (tmp_path / "mine" / "accelerate" / "fsdp2.yaml").is_file() and (tmp_path / "mine" / "sft.yaml").is_file()
    result = run("recipes", "--copy", str(tmp_path / "mine"))
    assert result.exit_code == 2 and "already exists" in result.output
