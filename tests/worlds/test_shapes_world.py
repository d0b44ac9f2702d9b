"""The shapes world: its images can be read back, and what is said of them is true."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from transformers_nextflow.worlds.shapes import (
    CATEGORIES,
    DESCRIPTIONS,
    UNKNOWN,
    CheckResult,
    Item,
    Object,
    Requirement,
    Scene,
    World,
    caption,
    cell_labels,
    check,
    drawing_example,
    drawing_score_table,
    edit_example,
    held_out_combinations,
    is_full_caption,
    is_reserved,
    located_caption,
    metric_table,
    parse_caption,
    question_about,
    question_example,
    random_scene,
    read,
    render,
    text_to_image_prompts,
    text_to_image_suite,
    understanding_cases,
    video_example,
)
from transformers_nextflow.worlds.shapes.cases import AnswerCase
from transformers_nextflow.worlds.shapes.edits import edit_kinds
from transformers_nextflow.worlds.shapes.language import draw_category, write_caption
from transformers_nextflow.worlds.shapes.questions import QUESTIONS, question_of_kind, verdict


WORLD = World()
WIDE = World(sizes=(("large", 0.8), ("small", 0.5)), jitter=1, held_out_pairs=())
LARGE = World(canvas=96, lattice=6, max_objects=9, shapes=("circle", "cross", "ring"))
WORLDS = pytest.mark.parametrize("world", [WORLD, WIDE, LARGE], ids=["narrow", "wide", "large"])


def rng(seed=0):
    return np.random.default_rng(seed)


def place_in(text, world):
    """The cell that a text names, found without the package's parser."""
    numbers = re.search(r"row (\d) column (\d)", text)
    if numbers:
        return int(numbers[1]) - 1, int(numbers[2]) - 1
    corner = re.search(r"(top|bottom) (left|right)", text)
    last = world.lattice - 1
    return (last * (corner[1] == "bottom"), last * (corner[2] == "right")) if corner else None


# --- Scenes and images -------------------------------------------------------------------------------------------


@WORLDS
def test_the_checker_reads_true_images(world):
    scenes = [random_scene(rng(i), world, allow_held_out=True) for i in range(1000 if world is WORLD else 300)]
    right = [read(render(scene, world), world) == scene for scene in scenes]
    assert np.mean(right) >= 0.995


def test_the_checker_reads_noisy_and_blurred_images():
    generator = rng(1)
    scenes = [random_scene(generator, WORLD) for _ in range(300)]
    images = [render(scene, WORLD) for scene in scenes]
    noisy = [np.clip(p + generator.normal(0, 12, p.shape), 0, 255).astype(np.uint8) for p in images]
    blurred = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(0.8)) for p in images]
    for damaged in (noisy, blurred):
        assert np.mean([read(p, WORLD) == scene for p, scene in zip(damaged, scenes)]) >= 0.995


def test_half_an_object_and_stripes_are_reported_as_unknown_objects():
    scene = Scene((Object("circle", "red", 1, 2), Object("star", "blue", 3, 0)), "black")
    image = render(scene, WORLD)
    image[16:24, 32:48] = 0
    image[2:14:2, 50:62] = (220, 30, 40)
    found = {item.cell: item.shape for item in read(image, WORLD).objects}
    assert found == {(1, 2): UNKNOWN, (3, 0): "star", (0, 3): UNKNOWN}


def test_specks_are_no_objects_and_full_lattices_are_read():
    image = render(Scene(()), WORLD)
    image[5:7, 5:7] = 0
    assert read(image, WORLD) == Scene(())
    full = Scene(tuple(Object(WORLD.shapes[i % 6], WORLD.colors[i % 5][0], *WORLD.cells[i]) for i in range(16)))
    assert read(render(full, WORLD), WORLD) == full


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="32"):
        read(np.zeros((32, 32, 3), np.uint8), WORLD)


def test_worlds_that_cannot_be_are_refused():
    for fields, name in (({"lattice": 5}, "5 cells"), ({"jitter": 3}, "jitter=3"), ({"max_objects": 17}, "17")):
        with pytest.raises(ValueError, match=name):
            World(**fields)
    with pytest.raises(ValueError, match="own"):
        Scene((Object("circle", "red", 0, 0), Object("star", "red", 0, 0)))


def test_cell_labels_say_what_each_cell_holds():
    scene = Scene((Object("square", "green", 0, 3), Object("ring", "orange", 2, 1)), "black")
    shapes, colors, background = cell_labels(scene, WORLD)
    assert shapes.shape == colors.shape == (4, 4) and background == 1
    assert WORLD.shapes[shapes[0, 3] - 1] == "square" and WORLD.colors[colors[2, 1] - 1][0] == "orange"
    assert (shapes > 0).sum() == (colors > 0).sum() == 2


# --- Captions ------------------------------------------------------------------------------------------------------


@WORLDS
def test_training_images_hold_all_and_only_what_their_captions_say(world):
    generator = rng(2)
    for _ in range(500):
        text, scene = drawing_example(generator, world)
        assert text == text.lower()
        assert check(read(render(scene, world), world), parse_caption(text, world)).strict, text


@WORLDS
def test_captions_parse_back_into_what_they_were_written_from(world):
    generator = rng(3)
    for category in (*CATEGORIES, "mixed"):
        for _ in range(60):
            text, _, requirement = draw_category(generator, world, category)
            assert parse_caption(text, world) == requirement, text


@WORLDS
def test_a_scenes_objects_are_recovered_from_its_full_caption(world):
    generator = rng(4)
    for _ in range(300):
        scene = random_scene(generator, world)
        for text in (caption(generator, scene, world), caption(None, scene, world)):
            asked = parse_caption(text, world)
            named = Counter({(item.shape, item.color): 0 for item in asked.items})
            for item in asked.items:
                named[item.shape, item.color] += item.count
            assert named == Counter((item.shape, item.color) for item in scene.objects)
            assert asked.background == scene.background and is_full_caption(text, caption(None, scene, world), world)


@WORLDS
def test_a_scene_is_recovered_from_its_located_caption(world):
    generator = rng(4)
    for _ in range(300):
        scene = random_scene(generator, world)
        text = located_caption(scene, world)
        asked = parse_caption(text, world)
        assert [item.cell for item in asked.items] == [item.cell for item in scene.objects]
        assert check(scene, asked).strict and is_full_caption(text, text, world)
        assert not is_full_caption(caption(None, scene, world), text, world)


def test_captions_that_are_wrong_or_leave_something_out_are_not_full():
    scene = Scene((Object("circle", "red", 0, 0), Object("circle", "red", 1, 1), Object("star", "blue", 2, 2)))
    full = caption(None, scene, WORLD)
    assert is_full_caption("a blue star with two red circles on white", full, WORLD)
    for text in (
        "two red circles and a blue star",
        "two circles and a blue star on a white background",
        "a red circle and a blue star on a white background",
        "two red circles, a blue star and a ring on a white background",
        "red red red",
        "",
    ):
        assert not is_full_caption(text, full, WORLD), text


def test_held_out_pairs_and_reserved_captions_never_occur_in_training():
    generator = rng(5)
    texts, pairs = set(), set()
    for _ in range(5000):
        text, scene = drawing_example(generator, WORLD)
        texts.add(text)
        pairs.update((item.shape, item.color) for item in scene.objects)
    for make in (question_example, edit_example, video_example):
        for _ in range(300):
            parts = [part if isinstance(part, list) else [part] for part in make(generator, WORLD)]
            scenes = [part for part in sum(parts, []) if isinstance(part, Scene)]
            pairs.update((item.shape, item.color) for scene in scenes for item in scene.objects)
    assert pairs == set(WORLD.training_pairs)
    assert not any(map(is_reserved, texts))
    assert not texts & {prompt.text for prompt in text_to_image_suite(WORLD, 100)}


# --- Checking ------------------------------------------------------------------------------------------------------


def test_the_lenient_rule_allows_what_was_not_asked_for_and_the_strict_one_does_not():
    scene = Scene((Object("circle", "red", 0, 0), Object("square", "blue", 0, 2), Object("circle", "green", 3, 3)))
    for text, lenient, strict in (
        ("a circle", True, False),
        ("a green circle", True, False),
        ("two circles", True, False),
        ("two circles and a square", True, True),
        ("three circles", False, False),
        ("a red square", False, False),
        ("a red circle and a blue square", True, False),
        ("a blue circle and a red square", False, False),
        ("a circle left of a square", True, False),
        ("a square above a circle", True, False),
        ("a square below a circle", False, False),
        ("a red circle, a blue square and a green circle on white", True, True),
        ("a red circle, a blue square and a green circle on black", False, False),
        ("a green circle in the bottom right", True, False),
        ("a green circle in row 1 column 4", False, False),
    ):
        assert check(scene, parse_caption(text, WORLD)) == (lenient, strict), text


def test_objects_of_unknown_shape_spoil_only_the_strict_rule():
    scene = Scene((Object("circle", "red", 0, 0), Object(UNKNOWN, "blue", 0, 2)))
    assert check(scene, Requirement((Item("circle", "red"),))) == CheckResult(lenient=True, strict=False)


def test_one_object_does_not_stand_for_two_that_were_asked_for():
    scene = Scene((Object("circle", "red", 0, 0), Object("star", "red", 0, 1)))
    assert not check(scene, Requirement((Item("circle"), Item("circle", "red")))).lenient


# --- Questions -----------------------------------------------------------------------------------------------------


def answer(question, scene):
    """What the answer is, worked out from the words of the question alone."""
    words = re.findall(r"\w+", question)
    shapes = [s for w in words for s in WORLD.shapes if w in (s, f"{s}s", f"{s}es")]
    colors = [w for w in words if w in WORLD.palette]
    things = [o for o in scene.objects if o.shape in (shapes or [o.shape]) and o.color in (colors or [o.color])]
    if "behind" in words or "background" in words:
        return scene.background
    if "many" in words:
        return str(len(things))
    if len(shapes) == 2:
        a, b = (next(o for o in scene.objects if o.shape == shape) for shape in shapes)
        truth = {"left": a.column < b.column, "right": a.column > b.column, "above": a.row < b.row,
                 "below": a.row > b.row}  # fmt: skip
        return "yes" if next(truth[w] for w in words if w in truth) else "no"
    if shapes and colors:
        return "yes" if things else "no"
    cell = place_in(question, WORLD)
    (found,) = [o for o in things if cell is None or o.cell == cell]
    return found.color if "color" in words else found.shape


@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_are_right(kind):
    generator = rng(6)
    cases = [question_of_kind(generator, WORLD, kind) for _ in range(200)]
    assert all(answer(question, scene) == verdict(given) for scene, question, given in cases)
    assert all(len(given.split()) == 1 or kind == "relation" for _, _, given in cases)


def test_relations_are_answered_with_the_places_first():
    generator = rng(6)
    for scene, question, given in (question_of_kind(generator, WORLD, "relation") for _ in range(50)):
        shapes = [word.strip("?") for word in question.split() if word.strip("?") in WORLD.shapes]
        a, b = (next(o for o in scene.objects if o.shape == shape) for shape in shapes)
        steps = [f"the {o.color} {o.shape} in row {o.row + 1} column {o.column + 1}" for o in (a, b)]
        assert given.rpartition(": ")[0] == " and ".join(steps)


def test_answers_are_judged_by_what_they_come_to():
    case = AnswerCase("relation", ("is the star above the ring?",), ("row 1 and row 2: yes",))
    for text, right in (("row 1 and row 2: yes", True), ("row 1 and row 3: Yes ", True), ("yes", True),
                        ("row 1 and row 2: no", False), ("row 1 and row 2:", False), ("yes: no", False)):  # fmt: skip
        assert case.score((text,), WORLD) == {"right": right}, text


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_about_a_given_scene_are_about_that_one(kind):
    generator = rng(6)
    scenes = [random_scene(generator, WORLD) for _ in range(200)]
    cases = [QUESTIONS[kind](generator, WORLD, False, scene) for scene in scenes]
    asked = [(scene, case) for scene, case in zip(scenes, cases) if case is not None]
    assert len(asked) > 100
    assert all(case[0] is scene and answer(case[1], scene) == verdict(case[2]) for scene, case in asked)


def test_every_scene_can_be_asked_about():
    generator = rng(6)
    scene = Scene((Object("circle", "red", 0, 0), Object("circle", "red", 1, 1)))
    for _ in range(100):
        question, given = question_about(generator, WORLD, scene)
        assert answer(question, scene) == verdict(given)


@pytest.mark.parametrize("kind", ["presence", "relation"])
def test_yes_and_no_are_balanced(kind):
    generator = rng(7)
    answers = [verdict(question_of_kind(generator, WORLD, kind)[2]) for _ in range(600)]
    assert set(answers) == {"yes", "no"} and 0.43 < np.mean([a == "yes" for a in answers]) < 0.57


def test_counts_reach_from_none_to_all():
    generator = rng(8)
    assert {question_of_kind(generator, WORLD, "count")[2] for _ in range(300)} == set("01234")


# --- Suites --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_a_hundred_held_out_prompts_that_say_what_they_require(category):
    prompts = text_to_image_prompts(category, WORLD, 100, seed=1)
    assert len({prompt.text for prompt in prompts}) == 100
    for prompt in prompts:
        assert is_reserved(prompt.text) and prompt.category == category
        assert parse_caption(prompt.text, WORLD) == prompt.requirement
    assert prompts == text_to_image_prompts(category, WORLD, 100, seed=1)
    assert prompts != text_to_image_prompts(category, WORLD, 100, seed=2)


def test_held_out_prompts_name_a_held_out_pair():
    for prompt in held_out_combinations(WORLD, 25):
        assert {(item.shape, item.color) for item in prompt.requirement.items} & set(WORLD.held_out_pairs)


def test_more_prompts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="ask for fewer"):
        text_to_image_prompts("single_object", World(shapes=("circle",)), 100)


def test_understanding_cases_carry_their_right_answers():
    cases = understanding_cases(WORLD, 10)
    assert Counter(case.kind for case in cases) == {kind: 10 for kind in (*QUESTIONS, *DESCRIPTIONS)}
    for case in cases:
        assert case.score(case.answer, WORLD) == {"right": 1} and case.score(("a nothing",), WORLD) == {"right": 0}
        assert case.kind not in DESCRIPTIONS or case.asked[1] == DESCRIPTIONS[case.kind][0]


def test_scores_are_means_of_categories():
    results = [("a", {"right": 1.0}), ("a", {"right": 0.0}), ("b", {"right": 1.0})]
    assert metric_table(results) == {"a": 0.5, "b": 1.0, "overall": 0.75}
    results = [("a", CheckResult(True, False)), ("b", CheckResult(True, True)), ("b", CheckResult(False, False))]
    assert drawing_score_table(results) == {
        "a": 1.0, "b": 0.5, "overall": 0.75, "a_strict": 0.0, "b_strict": 0.5, "overall_strict": 0.25,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no results"):
        metric_table([])


# --- Edits and videos -----------------------------------------------------------------------------------------------


def edited(scene, instruction, world):
    """What becomes of a scene, worked out from the words of the instruction alone."""
    words, cell = instruction.split(), place_in(instruction, world)
    colors = [word for word in words if word in world.palette]
    shapes = [word for word in words if word in world.shapes]
    sizes = [word for word in words if word in world.palette_of_sizes]
    if "background" in words:
        return Scene(scene.objects, words[-1])
    if words[0] in ("add", "draw", "put"):
        return Scene((*scene.objects, Object(shapes[0], colors[0], *cell, *sizes)), scene.background)
    (item,) = [o for o in scene.objects if (o.shape, o.color) == (shapes[0], colors[0])]
    rest = tuple(o for o in scene.objects if o is not item)
    if words[0] in ("remove", "delete", "erase"):
        return Scene(rest, scene.background)
    size, cell = (sizes or [item.size])[0], cell or item.cell
    return Scene((*rest, replace(item, shape=shapes[-1], color=colors[-1], size=size, row=cell[0], column=cell[1])),
                 scene.background)  # fmt: skip


@WORLDS
def test_edits_do_what_their_instructions_say_and_nothing_else(world):
    generator, world = rng(9), replace(world, jitter=0)
    for kind in edit_kinds(world):
        for _ in range(100):
            before, instruction, after = edit_example(generator, world, kind)
            assert edited(before, instruction, world) == after != before, instruction
            assert 1 <= len(after.objects) <= world.max_objects
    assert ("resize" in edit_kinds(world)) == (len(world.sizes) > 1)


@pytest.mark.parametrize("num_frames", [2, 3, 4])
def test_videos_show_what_their_captions_and_transitions_say(num_frames):
    generator = rng(10)
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for _ in range(150):
        text, scenes, transitions = video_example(generator, WORLD, num_frames)
        opening, event = text.split(". ")
        assert check(scenes[0], parse_caption(opening, WORLD)).strict
        assert len(scenes) == num_frames == len(transitions) + 1 and event in transitions
        for before, after, what in zip(scenes, scenes[1:], transitions):
            if what == "nothing changes":
                assert before == after
                continue
            _, color, shape, verb, value = what.split()
            (item,) = [o for o in before.objects if (o.shape, o.color) == (shape, color)]
            down, right = steps.get(value, (0, 0))
            new = replace(item, row=item.row + down, column=item.column + right)
            new = replace(new, color=value) if verb == "turns" else new
            assert Counter(after.objects) == Counter(before.objects) - Counter([item]) + Counter([new])


def test_videos_of_too_many_frames_are_refused():
    with pytest.raises(ValueError, match="num_frames=5"):
        video_example(rng(), WORLD, num_frames=5)


def test_the_canonical_wording_is_always_the_same():
    asked = Requirement((Item("circle", "red", count=2), Item("star", cell=(0, 0))), background="black")
    wording = "two red circles and a star in the top left corner on a black background"
    assert write_caption(None, asked, WORLD) == wording
