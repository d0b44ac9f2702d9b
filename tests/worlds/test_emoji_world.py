"""The emoji world: images show their scenes, what is said of them is true, and what is held out stays so."""

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from tiny_emoji import key, tiny_art, tiny_world

from transformers_nextflow.scale_schedule import ScaleSchedules
from transformers_nextflow.worlds.emoji import (
    RATIOS,
    SPLITS,
    Item,
    Requirement,
    Scene,
    Sticker,
    World,
    caption,
    cell_labels,
    check,
    draw_category,
    random_scene,
    render,
    understand,
)
from transformers_nextflow.worlds.emoji.language import (
    CATEGORIES,
    article,
    is_plural,
    plural,
    relation_of,
    with_article,
)
from transformers_nextflow.worlds.emoji.requirement import PLACES, RELATIONS
from transformers_nextflow.worlds.emoji.scene import BACKGROUNDS, GRIDS, KINDS, TURNS, box, cells_of, counted
from transformers_nextflow.worlds.held_out import is_reserved


DOG, CAT = Sticker(key("dog"), "3d"), Sticker(key("cat"), "3d")


def rng(seed=0):
    return np.random.default_rng(seed)


def at(sticker, *cell):
    return replace(sticker, cell=cell)


# --- Scenes and images -----------------------------------------------------------------------------------------------


def test_scenes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="own"):
        Scene((DOG, CAT))
    with pytest.raises(ValueError, match="grid"):
        Scene((at(DOG, 0, 1),))
    with pytest.raises(ValueError, match="no styles"):
        World(tiny_art(), styles=("oil",))
    with pytest.raises(ValueError, match="multiple"):
        World(tiny_art(), side=30, patch_size=4)


def test_equal_scenes_compare_equal_in_whatever_order():
    a, b = at(DOG, 0, 0), at(CAT, 0, 1)
    assert Scene((a, b), grid=(1, 2)) == Scene((b, a), grid=(1, 2))


def slow_render(scene, world):
    """Pixel by pixel, from drawings that are scaled by plain means."""
    height, width = world.size(scene.ratio)
    image = np.empty((height, width, 3))
    image[:] = BACKGROUNDS[scene.background]
    for sticker in scene.stickers:
        top, left, place = box(scene.grid, sticker.cell, (height, width))
        side = round(place * 0.84)
        sprite = np.rot90(world.art.sprite(sticker.concept, sticker.style), TURNS[sticker.turn]) / 255.0
        factor = len(sprite) // side
        assert factor * side == len(sprite)
        alpha = sprite[..., 3].reshape(side, factor, side, factor).mean((1, 3))
        colors = (sprite[..., :3] * sprite[..., 3:]).reshape(side, factor, side, factor, 3).mean((1, 3))
        for row in range(side):
            for column in range(side):
                y, x = top + (place - side) // 2 + row, left + (place - side) // 2 + column
                image[y, x] = image[y, x] * (1 - alpha[row, column]) + 255 * colors[row, column]
    return image


@pytest.mark.parametrize("turn", TURNS)
def test_an_image_is_its_drawings_over_its_background(turn):
    world = World(
        tiny_art(), side=56, patch_size=4
    )  # places of 28 pixels, with drawings of 24: half of the stored ones
    scene = Scene((at(replace(DOG, turn=turn), 0, 1), at(CAT, 1, 0)), "green", (2, 2))
    difference = np.abs(render(scene, world) - slow_render(scene, world))
    assert difference.max() <= 3 and difference.mean() < 0.5


def test_an_image_has_a_margin_of_background_and_is_always_the_same():
    world = tiny_world()
    for seed in range(20):
        scene = random_scene(rng(seed), world)
        image = render(scene, world)
        assert image.dtype == np.uint8 and np.array_equal(image, render(scene, World(tiny_art(), 32, 4)))
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == BACKGROUNDS[scene.background]).all()


def test_painting_and_skin_tones_change_the_image():
    world, plain = tiny_world(), Scene((Sticker(key("banana"), "flat"),))
    painted = Scene((Sticker(key("banana"), "flat", color="purple"),))
    assert not np.array_equal(render(plain, world), render(painted, world))
    dark, light = (Scene((Sticker(key("thumbs up"), "3d", tone=tone),)) for tone in ("dark", "light"))
    assert render(dark, world).mean() < render(light, world).mean()
    with pytest.raises(ValueError, match="no main colour"):
        render(Scene((Sticker(key("wolf"), "flat", color="red"),)), world)


def test_images_of_all_ratios_have_sizes_that_a_tokenizer_draws():
    for side in (32, 64):
        world = World(tiny_art(), side, 4, RATIOS)
        schedules = ScaleSchedules((1, 2, 4, 8, 16), 4, ((32, 4), (64, 5)))
        for ratio in RATIOS:
            size = world.size(ratio)
            assert size in schedules.all_sizes() and abs(size[0] * size[1] / side**2 - 1) < 0.2
            scene = Scene((at(DOG, 0, 0), at(CAT, 0, 1)), "blue", (1, 2), ratio)
            assert render(scene, world).shape == (*size, 3)


def test_cell_labels_say_what_covers_each_cell():
    world = tiny_world()
    labels = cell_labels(Scene((at(DOG, 0, 0), at(CAT, 0, 1)), grid=(1, 2)), world)
    assert labels.shape == (8, 8) and not labels[:2].any() and not labels[6:].any()
    assert set(labels[3:5, :4].flat) == {1 + world.indices[DOG.concept], 0} or labels[3:5, 1:3].all()
    assert set(labels[:, 4:].flat) <= {1 + world.indices[CAT.concept], 0} and labels[:, 4:].any()


def test_several_of_a_kind_fill_their_grid_in_reading_order():
    for count in range(1, 7):
        stickers, grid = counted(DOG, count)
        assert grid in GRIDS and len(stickers) == count
        assert [s.cell for s in Scene(stickers, grid=grid).stickers] == [s.cell for s in stickers]


@pytest.mark.parametrize("kind", KINDS)
def test_random_scenes_are_of_their_kind(kind):
    for seed in range(40):
        scene = random_scene(rng(seed), tiny_world(), kind)
        assert scene.style is not None
        if kind in ("single", "small"):
            assert len(scene.stickers) == 1 and (scene.grid == (1, 1)) == (kind == "single")
        elif kind == "count":
            assert len(scene.concepts) == 1 < len(scene.stickers) <= 6
        else:
            assert len(scene.concepts) == len(scene.stickers) > 1


def test_a_plain_world_paints_and_turns_nothing():
    scenes = [random_scene(rng(seed), tiny_world(plain=True)) for seed in range(100)]
    assert all(s.color is None and s.turn == "upright" for scene in scenes for s in scene.stickers)


def test_a_world_is_saved_and_loaded(tmp_path):
    world = World(tiny_art(), 32, 4, RATIOS[:3], tuple(tiny_art().concepts)[:5], ("3d",), {"single": 1.0}, True)
    world.save(tmp_path / "world.json")
    loaded = World.load(tmp_path / "world.json", tiny_art())
    for name in ("side", "patch_size", "ratios", "concepts", "styles", "kinds", "plain"):
        assert getattr(loaded, name) == getattr(world, name)
    with pytest.raises(ValueError, match="train_judge"):
        World.load(tmp_path / "none.json", tiny_art())


# --- What is held out ------------------------------------------------------------------------------------------------


def test_a_concept_is_never_held_out_in_all_of_its_styles():
    for styles in (("twemoji",), ("3d", "flat"), ("twemoji", "flat", "3d", "streamline")):
        world = tiny_world(styles=styles)
        for concept in world.concepts:
            assert not all(world.holds_out_style(concept, style) for style in world.styles_of(concept))


def test_every_split_holds_out_some_scenes_and_most_belong_to_none():
    world = tiny_world()
    found = [world.held_out(random_scene(rng(seed), world)) for seed in range(1500)]
    assert set().union(*found) == set(SPLITS)
    assert 0.6 < sum(not splits for splits in found) / len(found) < 0.95


@pytest.mark.parametrize("kinds", [("single",), ("single", "count"), ("single", "mixed"), ("pair", "count")])
@pytest.mark.parametrize("plain", [True, False])
def test_a_world_has_the_splits_to_which_its_scenes_can_belong(kinds, plain):
    world = replace(tiny_world(plain=plain), kinds=dict.fromkeys(kinds, 1.0))
    found = [world.held_out(random_scene(rng(seed), world)) for seed in range(800)]
    assert set().union(*found) == set(world.splits)


def test_what_is_held_out_depends_on_the_scene_only():
    scene = random_scene(rng(3), tiny_world())
    moved = replace(scene, background="pink", ratio=(12, 20))
    assert tiny_world().held_out(scene) == tiny_world(side=64).held_out(moved)


def test_an_ordered_pair_is_held_out_wherever_in_a_scene_it_is():
    world = tiny_world()
    apart = next(
        three
        for three in permutations(world.concepts, 3)
        if [is_reserved(f"pair {a} {b}") for a, b in combinations(three, 2)] == [False, True, False]
    )
    scene = Scene(tuple(Sticker(c, "flat", cell) for c, cell in zip(apart, cells_of((2, 2)))), grid=(2, 2))
    assert "pair" in world.held_out(scene)


# --- Language --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, many",
    [
        ("cat", "cats"), ("wolf", "wolves"), ("bus", "buses"), ("box", "boxes"), ("lady beetle", "lady beetles"),
        ("fish cake with swirl", "fish cakes with swirl"), ("sheaf of rice", "sheaves of rice"), ("ruby", "rubies"),
        ("person running", "people running"), ("woman in lotus position", "women in lotus position"),
        ("kitchen knife", "kitchen knives"), ("grapes", "grapes"), ("french fries", "french fries"), ("key", "keys"),
        ("computer mouse", "computer mice"), ("peach", "peaches"), ("tropical fish", "tropical fish"),
    ],
)  # fmt: skip
def test_nouns_have_their_plural(one, many):
    assert plural(one) == many


def test_articles_go_by_the_sound():
    assert [with_article(name, name) for name in ("cat", "apple", "unicorn", "hourglass", "grapes", "umbrella")] == [
        "a cat", "an apple", "a unicorn", "an hourglass", "grapes", "an umbrella"
    ]  # fmt: skip
    assert article("orange") == "an" and is_plural("scissors") and not is_plural("cactus") and not is_plural("glass")


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_caption_is_true_of_its_scene_and_names_all_of_it(category):
    world = tiny_world()
    for seed in range(60):
        text, scene, asked = draw_category(rng(seed), world, category)
        assert check(scene, asked)["right"] == 1, text
        counts = dict(understand(text, world).counts)
        if ": " not in text:  # keywords behind a colon may be names of other things
            assert counts == {item.concept: item.count for item in asked.items}, text


def test_one_thing_is_also_asked_for_by_its_bare_name():
    world, texts = tiny_world(), set()
    for seed in range(400):
        text, scene, _ = draw_category(rng(seed), world, "single")
        texts.add(text)
    names = {name for concept in world.art.concepts.values() for name in concept.names}
    assert names & texts and {f"{name} emoji" for name in names} & texts


def test_a_full_caption_is_understood():
    world = tiny_world()
    for seed in range(100):
        scene = random_scene(rng(seed), world)
        said = understand(caption(scene, world), world)
        wanted = {concept: sum(s.concept == concept for s in scene.stickers) for concept in scene.concepts}
        assert (dict(said.counts), said.style, said.background) == (wanted, scene.style, scene.background)


def test_longer_names_go_before_the_shorter_ones_in_them():
    world = tiny_world()
    said = understand("two cat faces and a kitten, 3d style on a pink background", world)
    assert dict(said.counts) == {key("cat face"): 2, key("cat"): 1}
    assert (said.style, said.background) == ("3d", "pink")
    assert understand("nothing that it knows", world).counts == ()


# --- Requirements ----------------------------------------------------------------------------------------------------


def pair(first, second, grid=(1, 2)):
    return Scene((at(first, 0, 0), at(second, *((0, 1) if grid == (1, 2) else (1, 0)))), "white", grid)


def test_relations_and_places_are_where_they_say():
    scene = pair(DOG, CAT)
    assert relation_of(scene) == "left" and relation_of(pair(DOG, CAT, (2, 1))) == "above"
    asked = Requirement((Item(CAT.concept), Item(DOG.concept)), "right")
    assert check(scene, asked)["right"] == 1 and check(pair(CAT, DOG), asked)["relation"] == 0
    for relation in RELATIONS:
        holds = check(scene, Requirement((Item(DOG.concept), Item(CAT.concept)), relation))["relation"]
        assert holds == (relation == "left")
    places = {place for place, holds in PLACES.items() if holds(*scene.center(scene.stickers[1]))}
    assert places == {"on the right"}


def test_a_score_says_what_is_wrong():
    stickers, grid = counted(replace(DOG, color="red"), 3)
    scene = Scene(stickers, "pink", grid)
    right = Requirement((Item(DOG.concept, "3d", color="red", turn="upright", count=3),), background="pink")
    assert set(check(scene, right).values()) == {1.0}
    for change, name in (
        ({"count": 2}, "count"), ({"style": "flat"}, "style"), ({"color": "blue"}, "color"), ({"color": ""}, "color"),
        ({"turn": "upside down"}, "turn"), ({"tone": "dark"}, "tone"), ({"place": "at the top"}, "place"),
    ):  # fmt: skip
        score = check(scene, replace(right, items=(replace(right.items[0], **change),)))
        assert score[name] < 1 and score["right"] == 0 and score["concept"] == 1
    assert check(scene, replace(right, background="blue"))["background"] == 0
    assert check(scene, Requirement((Item(CAT.concept),)))["concept"] == 0
    assert check(scene, replace(right, size="large"))["size"] == 0


def test_names_with_colours_in_them_are_names():
    said = understand("a big flat purple banana next to two red apples", tiny_world())
    assert dict(said.counts) == {key("banana"): 1, key("red apple"): 2}


def test_something_beside_what_was_asked_is_wrong():
    score = check(pair(DOG, CAT), Requirement((Item(DOG.concept),)))
    assert score == {"right": 0, "concept": 1, "count": 0}


def test_requirements_travel_as_json():
    asked = Requirement((Item(DOG.concept, "3d", color="", count=2), Item(CAT.concept)), "left", "pink", None)
    assert Requirement.from_json(asked.to_json()) == asked
    with pytest.raises(ValueError, match="not a requirement"):
        Requirement.from_json("{}")
