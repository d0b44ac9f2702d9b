"""The recipe of the emoji world (`examples/emoji`): its scripts on tiny models, and what its full size comes to."""

import argparse
import importlib
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Features, Value, load_from_disk
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model, tiny_processor, tiny_vq_config
from tiny_emoji import FIXTURES, key, tiny_art, tiny_world

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowPipeline, NextFlowVQModel
from transformers_nextflow.data import tokenizer_fingerprint, validate_rows
from transformers_nextflow.diffusion_decoder import small_decoder
from transformers_nextflow.modeling_nextflow_vq import CODE_PARTS
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainingArguments, NextFlowVQTrainingArguments
from transformers_nextflow.trainers.diffusion.arguments import NextFlowDiffusionTrainingArguments
from transformers_nextflow.trainers.recipes import load_recipe
from transformers_nextflow.utils.training_domain import TrainingDomain
from transformers_nextflow.utils.typed_values import read_typed
from transformers_nextflow.worlds.conversations import images_of
from transformers_nextflow.worlds.emoji import RATIOS, Item, Requirement, Scene, Sticker, statement
from transformers_nextflow.worlds.emoji.cases import Case
from transformers_nextflow.worlds.emoji.judge import Judge, Vocabulary
from transformers_nextflow.worlds.emoji.rewards import judge_reward
from transformers_nextflow.worlds.emoji.scene import SQUARE
from transformers_nextflow.worlds.generated_rows import write_generated_rows
from transformers_nextflow.worlds.held_out import is_reserved


FOLDER = Path(__file__).parents[2] / "examples" / "emoji"
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
SCRIPTS = (
    "sizes",
    "make_data",
    "train_tokenizer",
    "train_judge",
    "lora",
    "rl",
    "make_checkpoint",
    "make_decoder",
    "make_images",
    "two_cores",
)
WORLD = tiny_world(side=16)


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name; other recipes have scripts of the same names, which are left as they were."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = {name: sys.modules.pop(name, None) for name in SCRIPTS}
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "tokenizer"
    torch.manual_seed(0)
    NextFlowVQModel(tiny_vq_config()).save_pretrained(folder)
    return str(folder)


def tiny_size(sizes):
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]},
    }
    return replace(sizes.FULL, text=text, vocabulary=400)


# --- Recipes and sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_arguments_that_there_are(path):
    recipe = load_recipe(path)
    kind = {
        "transformer": NextFlowTrainingArguments,
        "tokenizer": NextFlowVQTrainingArguments,
        "diffusion_decoder": NextFlowDiffusionTrainingArguments,
    }[recipe.kind]
    assert set(recipe.arguments) <= {field.name for field in fields(kind)}
    assert recipe.level in (64, 128)
    kind(output_dir="unused", **(recipe.arguments | {"bf16": False, "use_cpu": True}))


def test_the_full_checkpoint_fits_into_48_mib(script):
    sizes = script("sizes")
    tokenizer = tiny_processor().tokenizer
    with torch.device("meta"):
        text = sizes.text_config(sizes.FULL, tokenizer)
        text.vocab_size = sizes.FULL.vocabulary
        model = NextFlowForConditionalGeneration(
            NextFlowConfig(
                text_config=text,
                vq_config=sizes.tokenizer_config(sizes.FULL),
                boi_token_id=0,
                eoi_token_id=1,
                image_token_id=2,
                tie_word_embeddings=True,
            )
        )
    total = 0
    for name, weight in model.named_parameters():
        of_codes = ".vq_model." in f".{name}" and any(part in name for part in CODE_PARTS)
        total += weight.numel() * (4 if of_codes else 2)
    assert 35 * 2**20 < total < 47.5 * 2**20, total / 2**20


def test_both_sizes_draw_the_images_of_their_worlds(script):
    sizes = script("sizes")
    for size in (sizes.SMALL, sizes.FULL):
        schedules = sizes.tokenizer_config(size).scale_schedules
        for side in size.sides:
            world = sizes.world_of(size, tiny_art(), side)
            assert all(world.size(ratio) in schedules.all_sizes() for ratio in world.ratios)
            assert sizes.KEPT_STYLE not in world.styles


# --- Scripts ------------------------------------------------------------------------------------------------------


def test_rows_of_all_abilities_are_valid_and_train(script, tokenizer, tmp_path, monkeypatch):
    make_data, sizes = script("make_data"), script("sizes")
    monkeypatch.setattr(make_data, "_world", lambda *_: WORLD)
    monkeypatch.setitem(make_data.MIXTURES, "full", dict.fromkeys(make_data.MIXTURES["full"], 0.1))
    correction = make_data.SelfCorrection(4, 0.3)
    rows = list(make_data.rows(tokenizer, "full", "unused", 16, 40, 0, [0], correction))
    make_data.write_start(tokenizer, tiny_size(sizes), WORLD, tmp_path / "start", count=50)
    pipe = NextFlowPipeline.from_pretrained(tmp_path / "start")
    fingerprint = tokenizer_fingerprint(pipe.model.vq_model)
    report = validate_rows(rows, codebook_size=32, fingerprint=fingerprint, processor=pipe.processor)
    assert report.rows == 40 and not report.problems
    assert pipe.processor.caption_request == "describe the image." and pipe.processor.think_prefix == "think:"
    assert pipe.model.config.tie_word_embeddings
    loss = pipe.model(**NextFlowCollator(pipe.processor)(rows[:8])).loss
    assert torch.isfinite(loss)


def test_scenes_of_several_sizes_are_encoded_in_their_order(script, tokenizer):
    make_data = script("make_data")
    world = tiny_world(side=16, ratios=((16, 16), (12, 20)))
    model = NextFlowVQModel.from_pretrained(tokenizer).eval()
    scenes = [Scene((Sticker(key(n), "3d"),), ratio=r) for n in ("dog", "cat") for r in ((16, 16), (12, 20))]
    with torch.no_grad():
        together = make_data.encode_scenes(model, scenes, world, None, torch.Generator())
        alone = [make_data.encode_scenes(model, [scene], world, None, torch.Generator())[0] for scene in scenes]
    assert together == alone


@pytest.mark.parametrize("stage", ["small_tokenizer", "small_decoder"])
def test_a_stage_of_the_tokenizer_trains(script, tokenizer, tmp_path, monkeypatch, stage):
    train_tokenizer = script("train_tokenizer")
    monkeypatch.setattr(train_tokenizer, "world_of", lambda *_: tiny_world(side=16, ratios=((16, 16), (12, 20))))
    torch.manual_seed(0)
    Judge(Vocabulary(WORLD.concepts, WORLD.styles), width=4).save(tmp_path / "judge")
    config = tiny_vq_config(semantic_target_dim=train_tokenizer.SEMANTIC_DIM)
    NextFlowVQModel(config).save_pretrained(tmp_path / "model")
    changes = ["max_steps=2", "per_device_train_batch_size=4", "kmeans_images=16", "kmeans_shares=null", "use_cpu=true"]
    changes += ["logging_steps=1", "eval_strategy='no'", "adversarial_weight=0.1", "adversarial_start=0.0"]
    arguments = argparse.Namespace(
        recipe=FOLDER / "recipes" / f"{stage}.yaml",
        changes=changes,
        size="small",
        art=None,
        model=tmp_path / "model",
        output=tmp_path / "out",
        judge=tmp_path / "judge",
    )
    trainer = train_tokenizer.make_trainer(arguments)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name.split(".")[0] for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])}
    parts = {"pixel_decoder"} if stage == "small_decoder" else {"pixel_encoder", "semantic_encoder", "semantic_decoder"}
    assert parts <= moved and (stage != "small_decoder" or moved == parts)
    logged = set().union(*trainer.state.log_history)
    wanted = {"small_tokenizer": "semantic_loss", "small_decoder": "perceptual_loss"}[stage]
    assert {"pixel_loss", "adversarial_loss", wanted} <= logged


def rows_of_file(path: str, shards: list[int]):
    yield from ({"content": Path(path).read_text()} for _ in shards)


def test_data_are_made_anew_where_only_the_content_of_a_folder_has_changed(tmp_path):
    for content in ("one", "two"):
        (tmp_path / "tokenizer").write_text(content)
        features, settings = Features({"content": Value("string")}), {"path": str(tmp_path / "tokenizer")}
        write_generated_rows(rows_of_file, tmp_path / "data", features, processes=1, shards=[0, 1], **settings)
        assert load_from_disk(tmp_path / "data")["content"][:] == [content] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "data"}


def test_a_batch_that_begins_with_square_images_is_square(script):
    images, world = script("train_tokenizer").EmojiImages, tiny_world(ratios=RATIOS)
    for seed in range(10):
        assert {images(world, 100, seed, batch_size=4, square=1)._ratio(index) for index in range(4)} == {SQUARE}


def test_batches_of_images_have_one_ratio_and_the_first_ones_are_square(script):
    train_tokenizer = script("train_tokenizer")
    world = tiny_world(side=16, ratios=((16, 16), (12, 20), (20, 12)))
    images = train_tokenizer.EmojiImages(world, 10_000, seed=0, batch_size=4, square=8)
    shapes = [tuple(images[i]["pixel_values"].shape[1:]) for i in range(120)]
    assert set(shapes[:8]) == {(16, 16)} and len(set(shapes)) == 3
    assert all(len(set(shapes[i : i + 4])) == 1 for i in range(0, 120, 4))
    assert images[50]["concepts"].shape == tuple(side // 4 for side in shapes[50])
    with pytest.raises(IndexError):
        images[10_000]


def test_images_of_all_drawings_but_the_held_out_ones_are_rendered(script, tmp_path, monkeypatch):
    make_images = script("make_images")
    world = tiny_world(side=16)
    monkeypatch.setattr(make_images, "world_of", lambda *_: world)
    monkeypatch.setattr(sys, "argv", ["make_images.py", "--size", "small", "--output", str(tmp_path / "images")])
    make_images.main()
    held_out = [pair for pair in world.pairs if world.holds_out_style(*pair)]
    files = sorted((tmp_path / "images").iterdir())
    assert held_out and len(files) == len(make_images.BACKGROUNDS) * (len(world.pairs) - len(held_out))
    assert Image.open(files[-1]).size == (16, 16)


def test_images_of_other_concepts_hold_none_of_the_world_and_each_drawing_once(script):
    make_images = script("make_images")
    world = replace(tiny_world(side=16), concepts=tiny_world().concepts[:2], styles=("flat",))
    others = {pair for pair in world.art.drawings if pair[0] not in world.concepts and pair[1] == "flat"}
    scenes = make_images.other_scenes(world, len(others))
    assert {(sticker.concept, sticker.style) for scene in scenes for sticker in scene.stickers} == others
    assert make_images.other_scenes(world, 1) == scenes[:1] and not make_images.other_scenes(world, 0)
    for count in (-1, len(others) + 1):
        with pytest.raises(ValueError, match=f"0 to {len(others)}, .* got {count}"):
            make_images.other_scenes(world, count)


def test_a_decoder_is_shipped_in_half_precision_with_its_scores_and_licences(script, tokenizer, tmp_path, monkeypatch):
    make_decoder = script("make_decoder")
    small_decoder(NextFlowVQModel.from_pretrained(tokenizer), channels=(8,)).save_pretrained(tmp_path / "trained")
    monkeypatch.setattr(make_decoder, "world_of", lambda *_: WORLD)
    arguments = ["--decoder", str(tmp_path / "trained"), "--output", str(tmp_path / "shipped")]
    monkeypatch.setattr(sys, "argv", ["make_decoder.py", *arguments])
    make_decoder.main()
    weights = load_file(tmp_path / "shipped" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "Scores" not in card and "license_link: NOTICE" in card
    row = {"judged_right": 0.5, "psnr": 20.0, "ssim": 0.25, "sharpness": 0.125}
    results = {
        "command": "python it", "scenes": 200, "size": 128, "renderings": {"judged_right": 1.0}, "pixel_decoder": row,
        "diffusion_decoder": {"1_steps": row | {"seconds": 0.125}, "4_steps": row | {"seconds": 3.0}},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")
    more = ["--results", str(tmp_path / "results.json"), "--sheet", str(tmp_path / "sheet.png")]
    monkeypatch.setattr(sys, "argv", ["make_decoder.py", *arguments, *more])
    make_decoder.main()
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "| this decoder, 1 step | 0.500 | 20.0 | 0.250 | 0.125 | 0.12 |" in card and "4 steps" in card
    assert (tmp_path / "shipped" / make_decoder.SHEET).exists() and (tmp_path / "shipped" / "NOTICE").exists()
    monkeypatch.setattr(make_decoder, "MAX_BYTES", 1000)
    monkeypatch.setattr(sys, "argv", ["make_decoder.py", *arguments[:2], "--output", str(tmp_path / "large")])
    with pytest.raises(ValueError, match="MiB, more than"):
        make_decoder.main()
    assert not (tmp_path / "large").exists()


def test_a_perceptual_distance_is_zero_between_equal_images_only(script):
    train_tokenizer = script("train_tokenizer")
    judge = Judge(Vocabulary(WORLD.concepts, WORLD.styles), width=4)
    distance = train_tokenizer.JudgePerceptual(judge)
    a, b = torch.rand(2, 3, 32, 32).mul(2).sub(1), torch.rand(2, 3, 32, 32).mul(2).sub(1)
    assert distance(a, a).tolist() == [0, 0] and (distance(a, b) > 0).all()
    assert not any(p.requires_grad for p in distance.parameters())


def test_a_judge_is_trained_and_saved_with_its_world(script, tmp_path, monkeypatch, capsys):
    train_judge = script("train_judge")
    monkeypatch.setattr(train_judge, "world_of", lambda size, art, side=None: WORLD)
    monkeypatch.setattr(train_judge, "CEILING_SCENES", 5)
    monkeypatch.setattr(train_judge, "SCENES", 4)
    arguments = ["--size", "small", "--art", FIXTURES / "art.zip", "--output", tmp_path / "judge", "--steps", 2]
    monkeypatch.setattr(sys, "argv", ["train_judge.py", *map(str, arguments)])
    train_judge.main()
    assert Judge.load(tmp_path / "judge").vocabulary.concepts == WORLD.concepts
    assert json.loads((tmp_path / "judge" / "world.json").read_text())["side"] == 16
    assert '"layout"' in capsys.readouterr().out


def test_a_lesson_shows_some_drawings_and_asks_for_others(script, monkeypatch):
    lora = script("lora")
    old = tiny_world(side=16, styles=("twemoji", "flat", "3d"))
    monkeypatch.setattr(lora, "SHOWN_OF_STYLE", 5)
    lesson = lora.lesson_of("style", tiny_art(), old, 100, 0)
    assert len(lesson.shown) == 5 and len(lesson.asked) == 100 and not set(lesson.shown) & set(lesson.asked)
    assert {style for _, style in lesson.shown + lesson.asked} == {"streamline"}
    new = replace(old, styles=("flat", "3d"), concepts=tuple(c for c in old.concepts if c != key("rocket")))
    with monkeypatch.context() as patch:
        patch.setattr(lora, "KEPT_CONCEPT", "rocket")
        lessons = [lora.lesson_of("concept", tiny_art(), new, 10, seed) for seed in range(6)]
    for lesson in lessons:
        assert lesson.shown[0] == (key("rocket"), "twemoji") and len(lesson.shown) == 2 and len(lesson.asked) == 10
        assert {style for _, style in lesson.asked} < {"flat", "3d"} and not set(lesson.shown) & set(lesson.asked)
    with pytest.raises(ValueError, match="was to be new"):
        lora.lesson_of("style", tiny_art(), tiny_world(side=16), 100, 0)
    monkeypatch.setattr(lora, "KEPT_CONCEPT", "rocket")
    with pytest.raises(ValueError, match="was to be new"):
        lora.lesson_of("concept", tiny_art(), old, 100, 0)


def test_a_recogniser_names_what_it_has_seen(script):
    lora = script("lora")
    torch.manual_seed(0)
    recogniser = lora.Recogniser(Judge(Vocabulary(WORLD.concepts, WORLD.styles), width=8), WORLD)
    pairs = [WORLD.pairs[i] for i in (0, 7, 30)]
    images = [lora.render(Scene((Sticker(*pair),)), WORLD) for pair in pairs]
    assert recogniser.name(images) == pairs


def test_the_reward_is_the_mean_of_all_that_is_scored():
    dog, cat = (Scene((Sticker(key(name), "3d"),), "pink") for name in ("dog", "cat"))

    class Reader:
        def read(self, images):
            return images

    asked = Requirement((Item(key("dog"), "3d"),), background="pink").to_json()
    reward = judge_reward(Reader())
    assert reward(["", ""], [dog, cat], requirement=[asked, asked]) == [1.0, pytest.approx(1 / 5)]


def test_prompts_for_rl_hold_nothing_that_is_held_out(script):
    rl = script("rl")
    prompts = rl.training_prompts(WORLD, 20, seed=0)
    assert len(set(prompts["prompt"])) > 15 and not any(map(is_reserved, prompts["prompt"]))
    assert all(Requirement.from_json(text).items for text in prompts["requirement"])


def test_a_checkpoint_has_its_card_notice_and_index(script, tmp_path, monkeypatch):
    make_checkpoint = script("make_checkpoint")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    suite = {"single": 0.5, "overall": 0.5, "ceiling": {"single": 0.98}, "reconstructed": {"single": 0.9}}
    results = {"text_to_image": suite, "tokenizer": {"psnr": 29.5, "usage_scale_1": 0.1}, "command": "evaluate",
               "memorisation": {"to_nearest": 20.0, "to_nearest_reconstructed": 25.0, "is_asked": 0.5},
               "commit": "abc", "machine": {"gpu": None, "cpu": "a processor"}}  # fmt: skip
    (tmp_path / "emoji.json").write_text(json.dumps(results))
    arguments = ["--model", tmp_path / "model", "--art", FIXTURES / "art.zip", "--output", tmp_path / "out"]
    arguments += ["--results", tmp_path / "emoji.json", "--temperature", 0.7]
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *map(str, arguments)])
    monkeypatch.setattr(make_checkpoint, "world_of", lambda size, art: WORLD)
    monkeypatch.setattr(make_checkpoint, "RECONSTRUCTED", 4)
    monkeypatch.setattr(statement, "CASES", 40)
    make_checkpoint.main()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| single | 0.500 | 0.980 | 0.900 |" in text and "| psnr | 29.500 |" in text and "Streamline" in text
    assert (tmp_path / "out" / "model_index.json").is_file() and (tmp_path / "out" / "NOTICE").is_file()
    pipe = NextFlowPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.dtype == torch.bfloat16 and pipe.model.vq_model.quantizer.codebook.dtype == torch.float32
    assert pipe.model.default_image_sampling.temperature == 0.7
    stated = read_typed(TrainingDomain, pipe.model.config.trained_on, "trained_on")
    assert list(map(list, stated.sizes)) == [[16, 16]] and stated.unknown_words(
        ["A Dog, 3d style", "dogs", "a zebra"]
    ) == ["zebra"]
    monkeypatch.setattr(make_checkpoint, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 0"):
        make_checkpoint.main()


def test_a_stage_of_the_path_on_two_cores_is_done_once(script, tmp_path):
    two_cores = script("two_cores")
    for _ in range(2):
        path = two_cores.TwoCorePath("small", tmp_path / "art.zip", tmp_path, share=1.0)
        path.stage("data", lambda: {"rows": 3})
        path.stage("data", lambda: pytest.fail("done again"))
    assert json.loads((tmp_path / "stages.json").read_text())["data"]["rows"] == 3
    assert sum(two_cores.PLANS["small"].minutes.values()) < 45


def test_conversations_go_on_about_their_last_image(script):
    make_data = script("make_data")
    lengths = [len(make_data.sample(np.random.default_rng(i), WORLD, "full", "question")) for i in range(10)]
    assert set(lengths) <= {3, 4, 5} and len(set(lengths)) > 1
    exchanges = make_data.sample(np.random.default_rng(0), WORLD, "full", "question")
    assert not any(images_of(exchange.asked + exchange.answer) for exchange in exchanges[1:])


def test_no_question_that_goes_on_about_an_image_is_held_out(script):
    make_data, rng = script("make_data"), np.random.default_rng(0)
    for _ in range(100):
        exchanges = make_data.sample(rng, WORLD, "full", "caption")
        scene = images_of(exchanges[0].asked)[-1]
        assert not any(is_reserved(Case("", (scene, *e.asked), e.answer).key) for e in exchanges[1:])
