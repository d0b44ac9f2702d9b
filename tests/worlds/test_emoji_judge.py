"""The judge of the emoji world, and the scores that are made with it."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor
from tiny_emoji import FIXTURES, key, tiny_world

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.worlds.emoji import RATIOS, Scene, Sticker, evaluation, random_scene, render
from transformers_nextflow.worlds.emoji.evaluation import EmojiEvaluation, evaluate_emoji
from transformers_nextflow.worlds.emoji.judge import (
    MAX_CELLS,
    SIDE,
    Judge,
    Vocabulary,
    as_array,
    augment,
    judge_loss,
    look,
    read_background,
    training_looks,
)
from transformers_nextflow.worlds.emoji.reading import reading_scores
from transformers_nextflow.worlds.emoji.scene import BACKGROUNDS, GRIDS


WORLD = tiny_world(side=16, plain=True)


def rng(seed=0):
    return np.random.default_rng(seed)


def tiny_judge(world=WORLD, seed=0):
    torch.manual_seed(seed)
    return Judge(Vocabulary(world.concepts, world.styles), width=4, seed=seed).eval()


class TrueJudge(Judge):
    """Knows the scenes of the images that it is told of, by their bytes; of others it reads nothing."""

    def know(self, scenes, world):
        self.known = {render(scene, world).tobytes(): scene for scene in scenes}

    def read(self, images):
        return [self.known.get(as_array(image).tobytes(), Scene(())) for image in images]


# --- Looking ------------------------------------------------------------------------------------------------------


def test_a_look_is_the_image_or_the_square_of_a_place():
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 32:] = 255
    assert look(image).shape == (3, SIDE, SIDE)
    assert look(image, (1, 2), (0, 0)).unique().tolist() == [-1] and look(image, (1, 2), (0, 1)).unique().tolist() == [
        1
    ]


def test_the_background_is_read_off_the_border():
    for ratio in RATIOS:
        world = tiny_world(side=32, ratios=(ratio,))
        for background in BACKGROUNDS:
            scene = Scene((Sticker(key("dog"), "3d"),), background, ratio=ratio)
            image = np.clip(render(scene, world) + rng().normal(0, 10, (*world.size(ratio), 3)), 0, 255)
            assert read_background(image.astype(np.uint8)) == background


def test_augmented_images_have_their_size_and_differ():
    image = render(random_scene(rng(1), tiny_world(side=64)), tiny_world(side=64))
    changed = [augment(rng(seed), image) for seed in range(20)]
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in changed)
    assert sum(not np.array_equal(one, image) for one in changed) > 15


def test_training_looks_have_the_classes_of_their_scene():
    vocabulary = Vocabulary(WORLD.concepts, WORLD.styles)
    scene = Scene((Sticker(key("dog"), "3d", (0, 1)), Sticker(key("cat"), "3d", (1, 0))), "pink", (2, 2))
    looks, classes = training_looks(rng(), scene, WORLD, vocabulary)
    assert looks.shape == (3, 3, SIDE, SIDE)
    assert classes["grids"].tolist() == [GRIDS.index((2, 2)), -100, -100]
    assert classes["cells"][0].tolist() == [0, 1, 1, 0, *[-1] * (MAX_CELLS - 4)] and (classes["cells"][1:] == -1).all()
    assert [vocabulary.concepts[i] for i in classes["concepts"][1:]] == [key("dog"), key("cat")]
    assert classes["concepts"][0] == -100


def test_a_few_steps_bring_the_loss_down():
    judge, vocabulary = tiny_judge().train(), Vocabulary(WORLD.concepts, WORLD.styles)
    parts = [training_looks(rng(i), random_scene(rng(i), WORLD), WORLD, vocabulary) for i in range(12)]
    looks = torch.cat([part for part, _ in parts])
    classes = {name: torch.cat([one[name] for _, one in parts]) for name in parts[0][1]}
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = judge_loss(judge(looks), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


# --- Reading ------------------------------------------------------------------------------------------------------


def test_a_batch_is_read_as_its_images_one_by_one():
    judge, world = tiny_judge(), tiny_world(side=32, ratios=RATIOS)
    images = [render(random_scene(rng(seed), world), world) for seed in range(12)]
    read = judge.read(images)
    assert read == [judge.read([image])[0] for image in images]
    assert read == judge.read([Image.fromarray(image) for image in images])
    assert all(scene.stickers and scene.grid in GRIDS for scene in read)


def test_a_saved_judge_reads_as_before(tmp_path):
    judge = tiny_judge(seed=3)
    judge.save(tmp_path / "judge")
    loaded = Judge.load(tmp_path / "judge")
    images = [render(random_scene(rng(seed), WORLD), WORLD) for seed in range(6)]
    assert loaded.read(images) == judge.read(images) and loaded.seed == 3
    torch.testing.assert_close(loaded.embed_images(images), judge.embed_images(images))
    with pytest.raises(ValueError, match="train_judge.py"):
        Judge.load(tmp_path / "none")


def test_reading_scores_tell_layout_from_content():
    scenes = [Scene((Sticker(key("dog"), "3d"),)), Scene((Sticker(key("cat"), "3d"),))]
    judge = TrueJudge(Vocabulary(WORLD.concepts, WORLD.styles), width=4)
    judge.know(scenes, WORLD)
    images = [render(scene, WORLD) for scene in scenes]
    assert set(reading_scores(judge, images, scenes).values()) == {1.0}
    swapped = reading_scores(judge, images, scenes[::-1])
    assert swapped["layout"] == 1 and swapped["concept"] == 0 and swapped["background"] == 1


# --- Scores -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    processor = tiny_processor()
    processor.think_prefix = "think:"
    return NextFlowPipeline(tiny_model(), processor)


def test_every_suite_is_scored_with_both_ceilings(pipe, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 4)
    judge = TrueJudge(Vocabulary(WORLD.concepts, WORLD.styles), width=4)
    scored = EmojiEvaluation(pipe, WORLD, judge, limit=3)
    known = []
    true = scored._true
    monkeypatch.setattr(
        scored, "_true", lambda case: known.extend(case.scenes) or judge.know(known, WORLD) or true(case)
    )
    judge.know([], WORLD)
    scores = scored.scores()
    drawn = {"text_to_image", "held_out_style", "held_out_pair", "held_out_count", "style", "editing", "subject",
             "in_context", "thinking", "story"}  # fmt: skip
    assert set(scores) == drawn | {"tokenizer", "memorisation", "style_retrieval", "caption", "question", "text"}
    for name in drawn:
        own = {category for category, score in scores[name].items() if not isinstance(score, dict)}
        assert own - {"overall_thought"} >= set(scores[name]["reconstructed"]) - {"overall_thought"}
        assert scores[name]["ceiling"]["overall"] == 1.0 and 0 <= scores[name]["overall"] <= 1


def test_style_transfers_that_are_retrieved_are_different_and_held_out(pipe):
    cases = EmojiEvaluation(pipe, WORLD, tiny_judge(), limit=5).retrieval_cases()
    assert len({case.key for case in cases}) == len(cases) > 1
    assert all(case.held_out(WORLD) == {"wording"} for case in cases)


def test_images_of_all_sizes_are_drawn_as_they_are_asked_for(pipe):
    world = tiny_world(side=16, ratios=RATIOS, plain=True)
    scored = EmojiEvaluation(pipe, world, tiny_judge(world), limit=4)
    cases = evaluation.held_out_cases("drawing", world, 12)
    sizes = {}
    for _, batch, generators in scored._batches(cases, "sizes", 1):
        for case, (image,) in zip(batch, scored.draw(batch, generators)):
            sizes[case.key] = (image.height, image.width)
    assert sizes == {case.key: world.size(case.answer[0].ratio) for case in cases}
    assert len(set(sizes.values())) > 1


def test_a_folder_is_scored_and_leaves_sheets(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    tiny_judge().save(tmp_path / "judge")
    WORLD.save(tmp_path / "judge" / "world.json")
    scores = evaluate_emoji(
        str(tmp_path / "model"),
        limit=2,
        sheets=tmp_path / "sheets",
        device="cpu",
        art=FIXTURES / "art.zip",
        judge=tmp_path / "judge",
        abilities=("drawing",),
    )
    assert "psnr" in scores["tokenizer"] and "overall" in scores["text_to_image"] and "caption" not in scores
    assert (tmp_path / "sheets" / "drawing.png").is_file() and (tmp_path / "sheets" / "memorisation.png").is_file()
