"""From a folder of captioned images to a LoRA that draws them, by commands only, at small size (docs/own_images.md)."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import command_named, run_command
from library_versions import loads_whole_parts
from PIL import Image
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowPipeline, NextFlowVQModel
from transformers_nextflow.data import tokenizer_fingerprint
from transformers_nextflow.trainers import recipe_trainers
from transformers_nextflow.trainers.new_model import Machine, create_model, examine_rows
from transformers_nextflow.trainers.recipe_trainers import has_new_codes, make_trainer
from transformers_nextflow.trainers.recipes import load_recipe


peft = pytest.importorskip("peft")
NAMES = ["lake", "forest", "street", "harbour"]
CPU = Machine(gpu=None, memory=8 * 2**30, bfloat16=False, cores=2)
GPU = Machine(gpu="a GPU", memory=80 * 2**30, bfloat16=True, cores=16)


def run(*arguments) -> str:
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def changes(**values) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four captioned images of soft colours, larger than the model draws."""
    folder = tmp_path_factory.mktemp("own") / "photos"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for name in NAMES:
        coarse = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8))
        coarse.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": f"a photo of a {name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def psnr_to(image: Image.Image, other: Path) -> float:
    first, second = (np.asarray(one.convert("RGB"), float) for one in (image, Image.open(other).resize(image.size)))
    return -10 * np.log10(np.square(first - second).mean() / 255**2)


@loads_whole_parts
def test_a_folder_becomes_a_lora_that_draws_its_images(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = run("init", "--data", photos, "--preset", "tiny", "--output", "start")
    assert "16 pixels" in told and "train tokenizer --model start" in told
    assert "It does not reconstruct these images well enough" in run("inspect", "start", "--data", photos)
    steps = changes(max_steps=120, learning_rate=8e-3, disable_tqdm="true", save_strategy="'no'")
    run("train", "tokenizer", "--model", "start", "--data", photos, "--output", "tokenizer", *steps)
    fitting = run("inspect", "tokenizer/final", "--data", photos, "--sheet", "sheet.png")
    assert "It reconstructs these images well enough" in fitting and Image.open("sheet.png").size == (
        4 * 20 + 4,
        2 * 20 + 4,
    )
    steps = changes(max_steps=150, learning_rate=2e-2, disable_tqdm="true", save_strategy="'no'")
    run("train", "--lora", "--model", "tokenizer/final", "--data", photos, "--output", "lora", *steps)
    # An adapter, and the parts that read and write the codes, which were new to the transformer.
    assert (Path("lora/final/adapter_model.safetensors")).is_file() and not Path(
        "lora/final/model.safetensors"
    ).exists()
    prompts = [f"a photo of a {name}" for name in NAMES]
    run("generate", *prompts, "--model", "lora/final", "--output", "drawn.png")
    # At temperature 1 an image in twenty is another prompt's, since a tenth of the training had empty prompts.
    pipe = NextFlowPipeline.from_pretrained("lora/final")
    for number, drawn in enumerate(pipe(prompts, temperature=0).images):
        assert Image.open(f"drawn-{number}.png").size == drawn.size
        to_each = [psnr_to(drawn, photos / f"{other}.png") for other in NAMES]
        assert np.argmax(to_each) == number, to_each


def test_codes_that_are_only_rounded_were_never_trained_on():
    model = tiny_model()
    model.load_vision_tokenizer(model.vq_model)
    codes = model.model.visual_embedding.codes.weight.data
    codes.copy_(codes.bfloat16())  # as converted models are saved
    assert not torch.equal(codes, model.vq_model.quantizer.codebook) and has_new_codes(model)
    codes[0] += 0.05
    assert not has_new_codes(model)


def test_init_chooses_what_fits_data_and_machine_and_says_why(photos, tmp_path):
    choices = create_model(photos, tmp_path / "small", "small", machine=CPU)
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "small")
    vq_config = model.config.vq_config
    assert list(vq_config.scales) == [1, 2, 3, 4] and vq_config.scale_schedules.resolutions == (32,)  # of 48 pixels
    assert vq_config.codebook_size == 64  # four images of thirty codes
    assert has_new_codes(model) is False  # nothing was taken over so far
    assert NextFlowPipeline.from_pretrained(tmp_path / "small")("a photo").images[0].size == (32, 32)
    recipe = load_recipe("tokenizer", model=tmp_path / "small")
    assert recipe.arguments["use_cpu"] and recipe.arguments["per_device_train_batch_size"] == 4
    assert recipe.arguments["warmup_steps"] == 30 and recipe.arguments["max_steps"] == 600
    for told in ("32 pixels: half of the images have 48", "64 codes", "batches of 4 on 2 CPU cores", "lora: 200 steps"):
        assert any(told in choice for choice in choices), choices
    create_model(photos, tmp_path / "again", "small", machine=CPU)
    names = [path.relative_to(tmp_path / "small") for path in (tmp_path / "small").rglob("*") if path.is_file()]
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "small" / name).read_bytes() for name in names)
    create_model(photos, tmp_path / "gpu", "small", machine=GPU)
    values = yaml.safe_load((tmp_path / "gpu" / "recipes" / "transformer.yaml").read_text())
    assert values["arguments"]["bf16"] and "use_cpu" not in values["arguments"]


def test_init_names_columns_in_the_recipes_that_it_writes(tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"photo": "a.png", "title": "a"}))
    command = ["init", "--data", tmp_path / "rows.jsonl", "--preset", "tiny", "--output", tmp_path / "start"]
    run(*command, "--image-column", "photo", "--caption-column", "title")
    columns = load_recipe("transformer", model=tmp_path / "start").columns
    assert (columns.image, columns.caption) == ("photo", "title")
    assert examine_rows(tmp_path / "rows.jsonl", columns).ratios == [1.5]
    assert load_recipe("transformer", model=tmp_path / "start", caption_column="other").columns.caption == "other"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "huge"], "preset must be one of ('tiny', 'small', 'base'), got 'huge'"),
        (["--data", "nowhere"], "There is no file or folder nowhere"),
        (["--output", "."], ". already exists; name a new folder"),
    ],
)
def test_init_tells_in_one_line_what_is_wrong(arguments, message, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"--data": str(photos), "--output": "start"} | dict(zip(arguments[::2], arguments[1::2]))
    result = run_command("init", *(part for pair in values.items() for part in pair))
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def start(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def pipeline(tmp_path) -> Path:
    NextFlowPipeline(tiny_model(), tiny_processor()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


SHORT = {"max_steps": 1, "use_cpu": "true", "disable_tqdm": "true", "warmup_steps": 0, "save_strategy": "'no'"}


def test_a_tokenizer_out_of_a_model_comes_back_into_it_with_its_codes(pipeline, photos, tmp_path):
    run("train", "tokenizer", "--model", pipeline, "--data", photos, "--output", tmp_path / "new", *changes(**SHORT))
    before, after = (NextFlowPipeline.from_pretrained(f).model for f in (pipeline, tmp_path / "new" / "final"))
    assert tokenizer_fingerprint(before.vq_model) != tokenizer_fingerprint(after.vq_model)
    assert has_new_codes(after) and not has_new_codes(before)
    own = before.model.language_model.state_dict()
    assert all((value == own[name]).all() for name, value in after.model.language_model.state_dict().items())
    assert after.config.trained_on["lowest_psnr"] < 20
    # The decoder's stage leaves the codes, and what the transformer knows of them, as they are.
    steps = changes(**SHORT, level=16, per_device_train_batch_size=2, report_to="none")
    run("train", "tokenizer_decoder", "--model", pipeline, "--data", photos, "--output", tmp_path / "wide", *steps)
    wide = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "wide" / "final")
    assert wide.config.vq_config.pixel_decoder_channels == 2 * before.config.vq_config.pixel_decoder_channels
    assert (wide.model.visual_embedding.codes.weight == before.model.visual_embedding.codes.weight).all()


def test_a_tokenizer_by_itself_stays_one(photos, tmp_path):
    tiny_model().vq_model.save_pretrained(tmp_path / "vq")
    run(
        "train",
        "tokenizer",
        "--model",
        tmp_path / "vq",
        "--data",
        photos,
        "--output",
        tmp_path / "new",
        *changes(**SHORT),
    )
    assert NextFlowVQModel.from_pretrained(tmp_path / "new" / "final")


@pytest.mark.filterwarnings("ignore:An adapter cannot draw what its tokenizer")  # which nothing has trained
@loads_whole_parts
def test_adapters_are_what_lora_trains_and_named_parts_are_saved_whole_with_them(start, pipeline, photos, tmp_path):
    for parts, whole in (("[backbone]", set()), ("[backbone, visual_embedding]", {"visual_embedding"})):
        recipe = load_recipe("lora", [f"train={parts}", "report_to=none", "use_cpu=true"])
        model = make_trainer(recipe, start, photos, tmp_path / "out").model
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name.split("modules_to_save")[0].split(".")[-2] for name in trained if "lora_" not in name} == whole
    run("train", "alignment", "--lora", "--model", pipeline, "--data", photos, "--output", tmp_path / "out", *changes(
        **SHORT, level=16, bf16="false", packing="padding", packing_budget="null", report_to="none",
    ))  # fmt: skip
    config = peft.PeftConfig.from_pretrained(tmp_path / "out" / "final")
    assert config.r == 16 and set(config.modules_to_save) == {"visual_embedding", "lm_head", "visual_head"}
    # A pipeline's model is named as a path that is loaded by itself.
    assert NextFlowForConditionalGeneration.from_pretrained(config.base_model_name_or_path)
    run("generate", "a photo", "--model", tmp_path / "out" / "final", "--output", tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").is_file()


def test_a_lora_on_images_that_the_tokenizer_cannot_hold_warns(start, photos, tmp_path):
    recipe = load_recipe("lora", ["report_to=none", "use_cpu=true"])
    with pytest.warns(UserWarning, match="cannot draw what its tokenizer cannot reconstruct, and .* dB on average"):
        make_trainer(recipe, start, photos, tmp_path / "out")


def test_a_sheet_that_cannot_be_drawn_costs_no_training(start, photos, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(recipe_trainers, "generate_rollouts", broken)
    run("train", "--model", start, "--data", photos, "--output", tmp_path / "out", *changes(**SHORT))
    final = tmp_path / "out" / "final"
    assert (final / "model.safetensors").is_file() and (final / "README.md").is_file()


def test_a_wide_image_that_a_tokenizer_is_trained_on_keeps_no_outcome_from_being_written(start, tmp_path):
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (160, 16), "red").save(tmp_path / "wide" / "a.png")
    run(
        "train",
        "tokenizer",
        "--model",
        start,
        "--data",
        tmp_path / "wide",
        "--output",
        tmp_path / "out",
        *changes(**SHORT),
    )
    assert (tmp_path / "out" / "final" / "reconstructions.png").is_file()
    result = run_command("inspect", start, "--data", tmp_path / "wide")
    assert result.exit_code == 2 and "row 0, messages[1].content[0].image: " in result.stderr


def test_streamed_rows_train_the_same_model(start, photos, tmp_path):
    weights = []
    for streaming in ([], ["--streaming"]):
        output = tmp_path / f"out{len(weights)}"
        steps = changes(**SHORT | {"max_steps": 2}, per_device_train_batch_size=2, train_sampling_strategy="sequential")
        run("train", "--model", start, "--data", photos, "--output", output, *steps, *streaming)
        weights.append((output / "final" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_rl_from_the_command_line_takes_prompts_captions_and_rewards_of_ones_own(pipeline, photos, tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle", "weight": 2}\n{"prompt": "one", "weight": 3}\n')
    (tmp_path / "rewards.py").write_text(
        "def bright(prompts, completions, weight=None, **_):\n"
        "    assert weight is None or set(weight) <= {2, 3}\n"
        "    return [float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in completions]\n"
    )
    steps = changes(**SHORT, per_device_train_batch_size=2, num_generations=2)
    for number, (data, options) in enumerate(
        [(tmp_path / "prompts.jsonl", ["--reward", f"{tmp_path}/rewards.py:bright"]), (photos, ["--lora"])]
    ):
        output = tmp_path / f"rl{number}"
        run("train", "--rl", "--model", pipeline, "--data", data, "--output", output, *options, *steps)
        pipe = NextFlowPipeline.from_pretrained(output / "final")
        assert pipe("one").images[0].size == (16, 16)
    assert (tmp_path / "rl1" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["lora", "--rl"], "The recipe lora is of the kind 'transformer'; --rl takes one of the kind 'rl'"),
        (["tokenizer", "--lora"], "lora_rank is for the transformer"),
        (["--reward", "reading"], "A reward is for the kind 'rl'"),
        (["--rl", "--reward", "beauty"], "There is no reward 'beauty'; choose one of reading, shapes"),
        (["--rl", "--reward", "none.py:f"], "There is no file none.py with a reward"),
        (["tokenizer", "--streaming"], "A tokenizer training needs its rows by number"),
        (["--set", "lora_rank=-1"], "starts at 1; got -1"),
        (["--caption-column", "title"], "--caption-column 'title' is not a column; the columns are image, text"),
    ],
)
def test_trainings_that_make_no_sense_are_refused_in_one_line(arguments, message, start, photos, tmp_path):
    pytest.importorskip("trl")
    command = ["train", *arguments, "--model", str(start), "--data", str(photos), "--output", str(tmp_path / "out")]
    result = run_command(*command, *changes(use_cpu="true"))
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1], result.output


def test_the_page_takes_ten_commands_at_most_which_the_command_line_knows():
    page = (Path(__file__).parents[2] / "docs" / "own_images.md").read_text()
    first, *others = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert len(first.splitlines()) <= 10
    lines = [line for block in (first, *others) for line in block.splitlines()]
    for line in lines:
        program, *words = shlex.split(line)
        if program == "transformers-nextflow":
            command_named(words[0]).make_context(words[0], words[1:])  # raises for options that are not there
