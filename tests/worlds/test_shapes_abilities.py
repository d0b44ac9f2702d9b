"""The abilities of the shapes world: every example passes its own check, and what is wrong fails it."""

import importlib.util
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from transformers_nextflow.data import EncodedImage
from transformers_nextflow.worlds.shapes import (
    ABILITIES,
    DESCRIPTIONS,
    Object,
    Scene,
    World,
    abilities,
    changed_region,
    check,
    held_out_cases,
    images_of,
    is_reserved,
    metric_table,
    parse_caption,
    read_images,
    render,
    sequence,
    subjects,
    texts_of,
    thinking,
    to_messages,
    training_case,
)
from transformers_nextflow.worlds.shapes.analogies import CHANGES
from transformers_nextflow.worlds.shapes.cases import key_of, same
from transformers_nextflow.worlds.shapes.edits import edit_kinds, follow_up_edit
from transformers_nextflow.worlds.shapes.events import apply_event
from transformers_nextflow.worlds.shapes.language import parse_located_caption
from transformers_nextflow.worlds.shapes.text_tasks import TASKS
from transformers_nextflow.worlds.shapes.thoughts import (
    COLORED_LIKE,
    COUNTED_LIKE,
    GROUND_LIKE,
    MIXED_OF,
    RIDDLES,
    SHAPED_LIKE,
    comparison_phrase,
    implicit_prompt,
    think_first,
)
from transformers_nextflow.worlds.shapes.videos import video_example


WORLD = World()
TWO_SIZES = World(sizes=(("large", 0.8), ("small", 0.5)), held_out_pairs=())
LARGE = World(canvas=96, lattice=6, max_objects=9, shapes=("circle", "cross", "ring"))
EVERY_ABILITY = pytest.mark.parametrize("ability", ABILITIES)
WORLDS = pytest.mark.parametrize("world", [WORLD, TWO_SIZES, LARGE], ids=["narrow", "two sizes", "large"])
DRAWN = ("drawing", "editing", "subject", "thinking", "in_context", "story", "video")


def cases(ability, count=60, world=WORLD, seed=0):
    generator = np.random.default_rng(seed)
    return [training_case(generator, world, ability) for _ in range(count)]


@cache
def held_out_keys(ability) -> set[str]:
    return {case.key(WORLD) for case in held_out_cases(ability, WORLD, 200)}


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "examples/shapes/make_data.py"
    spec = importlib.util.spec_from_file_location("make_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- All abilities -------------------------------------------------------------------------------------------------


@WORLDS
@EVERY_ABILITY
def test_every_example_passes_its_own_check_from_pixels(ability, world):
    for case in cases(ability, 30, world):
        shown = [part if isinstance(part, str) else render(part, world) for part in case.answer]
        score = case.score(read_images(shown, world), world)
        assert set(score.values()) == {1.0} and next(iter(score)) == "right", (case, score)


@pytest.mark.parametrize("ability", DRAWN)
def test_a_image_with_one_object_more_or_one_less_is_not_wholly_right(ability):
    for case in cases(ability):
        spoilt = next(part for part in reversed(case.answer) if isinstance(part, Scene))
        free = next(cell for cell in WORLD.cells if cell not in {item.cell for item in spoilt.objects})
        more = Scene((*spoilt.objects, Object("ring", "blue", *free)), spoilt.background)
        for wrong in (more, Scene(spoilt.objects[1:], spoilt.background)):
            score = case.score([wrong if part is spoilt else part for part in case.answer], WORLD)
            assert min(score.values()) < 1, case


@pytest.mark.parametrize("ability", ("text", "question", "caption", "video_question"))
def test_another_text_is_wrong(ability):
    for case in cases(ability):
        for text in ("", "a purple answer", f"{case.answer[0]} and a ring"):
            assert case.score([text], WORLD)["right"] == 0


@pytest.mark.parametrize("ability", DRAWN)
def test_an_answer_without_images_scores_nothing(ability):
    assert all(case.score(["no"], WORLD)["right"] == 0 for case in cases(ability, 20))


@EVERY_ABILITY
def test_the_same_seed_gives_the_same_examples(ability):
    assert cases(ability, 10, seed=3) == cases(ability, 10, seed=3) != cases(ability, 10, seed=4)
    assert held_out_cases(ability, WORLD, 5, seed=1) == held_out_cases(ability, WORLD, 5, seed=1)


@EVERY_ABILITY
def test_there_are_200_held_out_cases_and_none_of_them_is_trained_on(ability):
    held_out = held_out_keys(ability)
    assert len(held_out) == 200 and all(map(is_reserved, held_out))
    assert not held_out & {case.key(WORLD) for case in cases(ability, 300)}


@EVERY_ABILITY
def test_training_never_shows_a_held_out_pair_and_such_cases_do(ability):
    def pairs(case):
        scenes = images_of((*case.asked, *case.answer))
        return {(item.shape, item.color) for scene in scenes for item in scene.objects}

    assert not any(pairs(case) & set(WORLD.held_out_pairs) for case in cases(ability))
    if ability != "text":  # shows nothing
        found = held_out_cases(ability, WORLD, 10, held_out_pairs=True)
        assert all(pairs(case) & set(WORLD.held_out_pairs) for case in found)


def test_asking_for_more_cases_than_are_found_is_an_error(monkeypatch):
    monkeypatch.setattr(abilities, "ATTEMPTS", 1)
    with pytest.raises(ValueError, match="ask for fewer"):
        held_out_cases("caption", WORLD, 50)


def test_the_table_has_every_metric_of_every_category():
    results = [("a", {"right": 1, "done": 1}), ("a", {"right": 0, "done": 1}), ("b", {"right": 0})]
    assert metric_table(results) == {"a": 0.5, "b": 0, "overall": 0.25, "a_done": 1, "overall_done": 1}


# --- Layouts -------------------------------------------------------------------------------------------------------


def test_conversations_have_the_layouts_of_the_abilities():
    def turns(ability):
        return {
            tuple("".join("t" if isinstance(part, str) else "i" for part in parts) for parts in case.exchange)
            for case in cases(ability, 100)
        }

    assert turns("drawing") == {("t", "i")} and turns("text") == {("t", "t")}
    assert turns("caption") == turns("question") == {("it", "t")}
    assert turns("editing") == {("it", "i")} and turns("in_context") == {("iiit", "i")}
    assert turns("subject") == {("it", "i"), ("iit", "i")} and turns("thinking") == {("t", "ti"), ("t", "i")}
    assert turns("story") == {("t", "iti"), ("t", "ititi"), ("t", "itititi")}
    given = {("it", "ti"), ("it", "titi"), ("it", "tititi")}
    assert turns("video") == turns("story") | given
    assert turns("video_question") == {("iit", "t"), ("iiit", "t"), ("iiiit", "t")}


def test_thoughts_begin_with_the_prefix_and_stand_before_their_image():
    messages = to_messages([thinking("a riddle", "a star", object())])
    assert messages[1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "think: a star"}, {"type": "image"}],
    }


def test_texts_that_do_not_fit_between_the_frames_are_refused():
    with pytest.raises(ValueError, match="2 frames take 1"):
        sequence("a video", [1, 2], [])


# --- Edits, subjects, analogies ------------------------------------------------------------------------------------


@WORLDS
def test_the_changed_region_is_where_the_images_differ(world):
    for case in cases("editing", 60, world):
        region = changed_region(case.before, case.after, world)
        differs = (render(case.before, world) != render(case.after, world)).any(axis=2)
        assert region.shape == differs.shape and not (differs & ~region).any()
        if case.before.background == case.after.background:
            blocks = region.reshape(world.lattice, world.cell_size, world.lattice, world.cell_size)
            cells = blocks.all(axis=(1, 3))
            assert (cells == blocks.any(axis=(1, 3))).all() and 1 <= cells.sum() <= 2


def test_an_edit_that_spoils_another_object_is_done_and_not_preserved():
    (case,) = [c for c in cases("editing", 200) if c.kind == "recolor" and len(c.before.objects) == 2][:1]
    kept = next(item for item in case.after.objects if item in case.before.objects)
    spoilt = Scene(tuple(item for item in case.after.objects if item is not kept), case.after.background)
    assert case.score([spoilt], WORLD) == {"right": 0, "done": 1, "preserved": 0}
    assert case.score([case.before], WORLD) == {"right": 0, "done": 0, "preserved": 1}


def test_all_kinds_of_edits_and_of_changes_occur():
    assert {case.kind for case in cases("editing", 150)} == set(edit_kinds(WORLD))
    assert {case.kind for case in cases("editing", 150, TWO_SIZES)} == {*edit_kinds(WORLD), "resize"}
    assert {case.kind for case in cases("in_context", 100)} == set(CHANGES)


def test_a_second_edit_starts_from_the_image_that_the_first_made():
    generator, scene = np.random.default_rng(0), cases("editing", 1)[0].after
    found = [edit for _ in range(30) if (edit := follow_up_edit(generator, WORLD, scene)) is not None]
    assert found and all(edit.before is scene and len(edit.asked) == 1 for edit in found)
    assert all(edit.score(edit.answer, WORLD)["right"] for edit in found)


def test_the_subject_is_shown_and_not_named():
    for case in cases("subject", 150):
        shown, text = images_of(case.asked), case.asked[-1]
        assert all(len(scene.objects) == 1 for scene in shown) and len(shown) == (2 if case.kind == "two" else 1)
        # Said in words, the prompt is a caption of what is required.
        names = ("the first object", "the second object") if case.kind == "two" else subjects.ONE
        looks = [(item.shape, item.color) for scene in shown for item in scene.objects]
        for (shape, color), name in zip(looks, [name for name in names if name in text]):
            assert text.count(name) == 1
            text = text.replace(name, f"a {color} {shape}")
        assert parse_caption(text, WORLD) == case.requirement


def test_the_fourth_image_differs_from_the_third_as_the_second_from_the_first():
    def change(before, after):
        gone, come = set(before.objects) - set(after.objects), set(after.objects) - set(before.objects)
        return before.background != after.background, gone, come

    for case in cases("in_context", 200):
        a, b, c = images_of(case.asked)
        (ground, gone, come), (ground_d, gone_d, come_d) = change(a, b), change(c, case.answer[0])
        assert ground == ground_d == (case.kind == "background") and a.background == c.background or not ground
        if case.kind == "recolor":
            assert len({item.color for item in come | come_d}) == 1 and set(gone) == set(a.objects)
        if case.kind == "replace":
            assert len({item.shape for item in come | come_d}) == 1 and len(come) == len(come_d) == 1
        if case.kind == "add":
            assert come == come_d and not gone | gone_d
        if case.kind == "remove":
            assert not come | come_d and len({(item.shape, item.color) for item in gone | gone_d}) == 1


# --- Thoughts ------------------------------------------------------------------------------------------------------


@WORLDS
@pytest.mark.parametrize("kind", RIDDLES)
def test_thoughts_ask_for_what_the_image_holds(kind, world):
    generator = np.random.default_rng(1)
    of_kind = [case for case in cases("thinking", 150, world) if case.kind == kind]
    assert len(of_kind) > 5
    for case in of_kind:
        prompt = implicit_prompt(generator, world, kind)
        assert check(prompt.scene, prompt.requirement).strict, prompt.text
        if texts_of(case.answer):
            thought, plan = case.answer[0].removeprefix("think: ").split(": ")
            *steps, said = thought.split("; ")
            assert parse_caption(said, world) == case.requirement and bool(steps) == (kind == "changes")
            assert same(parse_located_caption(plan, world), case.answer[1])
            assert not is_reserved(said) and not is_reserved(plan)
            asked_for = [shape for item in case.requirement.items for shape in [item.shape] * item.count]
            planned = parse_caption(plan, world).items
            assert [item.shape for item in planned] == asked_for
            if kind in ("riddle", "comparison", "sum"):  # which leave places open
                assert [item.cell for item in planned] == sorted(item.cell for item in planned)


@WORLDS
def test_changes_make_one_by_one_what_is_asked_for(world):
    generator, missed, lengths = np.random.default_rng(2), 0, set()
    for _ in range(50):
        prompt = implicit_prompt(generator, world, "changes")
        color, shape = re.search(r"an? (\w+) (\w+) after", prompt.text).groups()
        expected = []
        for number, before, after in re.findall(r"(\d)\) (\w+) turns (\w+)", prompt.text):
            missed += before not in (color, shape)
            color, shape = (after if value == before else value for value in (color, shape))
            assert (shape, color) in world.training_pairs
            article = "an" if color == "orange" else "a"
            expected.append(f"{number}) {before} turns {after}, now {article} {color} {shape}")
        assert list(prompt.steps) == expected
        lengths.add(len(expected))
        (item,) = prompt.requirement.items
        assert (item.shape, item.color, item.count) == (shape, color, 1)
    assert lengths == {2, 3, 4, 5, 6} and 50 < missed < 150


@WORLDS
def test_plain_captions_can_be_thought_about_too(world):
    for case in cases("drawing", 60, world):
        thoughtful = think_first(case, world)
        thought, image = thoughtful.answer
        said, plan = thought.removeprefix("think: ").split(": ")
        assert (thoughtful.asked, image) == (case.asked, case.answer[0])
        assert parse_caption(said, world) == case.requirement
        assert same(parse_located_caption(plan, world), image)
        assert thoughtful.drawn_from == (said, plan)
        assert thoughtful.score(thoughtful.answer, world) == dict.fromkeys(("right", "strict", "thought", "plan"), 1.0)
        if len(case.requirement.items) == 1:  # things that are asked for alike are laid out in reading order
            cells = [item.cell for item in parse_caption(plan, world).items]
            assert cells == sorted(cells)


def test_riddles_do_not_name_the_colors_and_shapes_that_they_paraphrase():
    for case in (case for case in cases("thinking", 300) if case.kind != "changes"):
        words = set(re.findall(r"\w+", case.asked[0]))
        colors = {item.color for item in case.requirement.items if item.color}
        mixed = {color for pair in MIXED_OF.values() for color in pair}
        assert not words & (colors - mixed), case.asked
        assert not words & {"background"} or "like" in words
        if case.kind == "riddle":
            assert not words & ({item.shape for item in case.requirement.items} - {"star"})


def test_every_thing_stands_for_one_color_or_shape_or_number():
    for table in (COLORED_LIKE, GROUND_LIKE, SHAPED_LIKE, COUNTED_LIKE):
        things = Counter(thing for group in table.values() for thing in group)
        assert max(things.values()) == 1
    assert set(COLORED_LIKE) == set(WORLD.palette) and set(SHAPED_LIKE) == set(WORLD.shapes)


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("than", range(1, 5))
def test_comparisons_lead_to_their_numbers(number, than):
    generator, worth = np.random.default_rng(0), {"one": 1, "two": 2, "three": 3}
    for _ in range(20):
        words = comparison_phrase(generator, number, than, "stars", "rings").split()
        if words[1] in ("more", "fewer"):
            found = than + worth[words[0]] * (1 if words[1] == "more" else -1)
        else:
            found = than * {"as": 1, "twice": 2, "three": 3, "half": 0.5}[words[0]]
        assert found == number


def test_thinking_scores_the_thought_beside_the_image():
    case = next(case for case in cases("thinking") if texts_of(case.answer))
    score = case.score(["think: nothing", case.answer[1]], WORLD)
    assert score["right"] == 1 and score["thought"] == score["plan"] == 0
    thought, _, plan = case.answer[0].partition("think: ")[2].partition(": ")
    assert case.score([f"think: never mind; {thought}: {plan}", case.answer[1]], WORLD)["thought"] == 1
    wrong = next(c for c in cases("thinking", seed=1) if texts_of(c.answer)).drawn_from[1]
    assert not check(parse_located_caption(wrong, WORLD), case.requirement).strict
    for said, planned, expected in (
        (thought, "a red ring", (1, 0)), (thought, wrong, (1, 0)), ("nothing", plan, (0, 1))
    ):  # fmt: skip
        score = case.score([f"think: {said}: {planned}", case.answer[1]], WORLD)
        assert (score["thought"], score["plan"]) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a red star on black",
        "a star in row 1 column 1 on a white background",
        "two red stars on black",
        "a red star in row 1 column 1",
    ],
)
def test_a_plan_that_leaves_something_open_is_no_scene(text):
    with pytest.raises(ValueError, match="not a full description"):
        parse_located_caption(text, WORLD)


# --- Stories and videos ---------------------------------------------------------------------------------------------


def test_what_happens_is_read_from_its_sentence():
    scene = Scene((Object("circle", "red", 0, 0), Object("star", "blue", 2, 2)))
    star = scene.objects[1]
    for sentence, expected in (
        ("nothing changes", scene),
        ("the background turns black", replace(scene, background="black")),
        ("the red circle goes away", Scene((star,))),
        ("the red circle turns green", Scene((Object("circle", "green", 0, 0), star))),
        ("the red circle moves down", Scene((Object("circle", "red", 1, 0), star))),
        ("the red circle goes to row 4 column 2", Scene((Object("circle", "red", 3, 1), star))),
        ("a green ring comes in row 1 column 2", Scene((*scene.objects, Object("ring", "green", 0, 1)))),
    ):
        assert apply_event(sentence, scene, WORLD) == expected, sentence
    for sentence in (
        "the green circle goes away", "the red circle moves up", "a ring of gold comes", "the red circle dances",
        "the red circle goes to row 3 column 3", "the red circle turns pink", "the background turns pink", "",
    ):  # fmt: skip
        with pytest.raises(ValueError):
            apply_event(sentence, scene, WORLD)


def test_stories_count_what_is_true_of_their_images():
    case = next(case for case in cases("story", 100) if case.kind == "free" and case.num_frames == 3)
    first, told, second, *rest = case.answer
    score = case.score([first, "the background turns pink", second, *rest], WORLD)
    assert score == {"right": 0, "first": 1, "sentences": 0.5, "told": 1}
    assert case.score(case.answer[:-2], WORLD)["right"] == 0
    told_case = next(case for case in cases("story", 100) if case.kind == "told" and case.num_frames == 2)
    assert told_case.score([told_case.answer[0], "nothing changes", told_case.answer[0]], WORLD)["told"] == 0


def test_videos_score_the_place_within_one_cell_and_the_rest():
    case = next(c for c in cases("video", 200) if c.kind == "moves" and len(c.frames) == 3 and not c.first_given)
    (others,) = {tuple(o for o in frame.objects if o not in case.path) for frame in case.frames}
    still = [part if isinstance(part, str) else case.frames[0] for part in case.answer]
    score = case.score(still, WORLD)
    assert score["position"] == pytest.approx(2 / 3) and score["rest"] == 1 and score["right"] == score["texts"] == 0
    empty = [part if isinstance(part, str) else Scene(others, part.background) for part in case.answer]
    assert case.score(empty, WORLD)["position"] == 0
    assert case.score([], WORLD) == {"right": 0, "position": 0, "rest": 0, "texts": 0}


def test_a_video_may_change_its_color_at_any_time_but_must_change_it():
    case = next(c for c in cases("video", 300) if c.kind == "turns" and len(c.frames) == 3 and not c.first_given)
    start, end = case.frames[0], case.frames[-1]
    for frames, right in (((start, end, end), 1), ((start, start, end), 1), ((start, start, start), 0),
                          ((end, end, end), 0), ((start, end, start), 0)):  # fmt: skip
        assert case.score(frames, WORLD)["right"] == right


def test_a_given_first_frame_is_not_scored():
    case = next(c for c in cases("video", 100) if c.first_given and len(c.frames) == 2 and c.kind == "moves")
    assert case.asked[0] == case.frames[0] and case.score(["", Scene(())], WORLD)["position"] == 0


def test_objects_grow_through_the_sizes_of_their_world():
    world = World(sizes=(("large", 0.8), ("small", 0.4), ("middle", 0.6)), held_out_pairs=())
    generator = np.random.default_rng(0)
    for _ in range(30):
        _, scenes, transitions = video_example(generator, world, 4, kind="grows")
        (name,) = set(transitions) - {"nothing changes"}
        color, shape = name.split()[1:3]
        sizes = [next(o.size for o in scene.objects if (o.color, o.shape) == (color, shape)) for scene in scenes]
        assert sizes in (["small", "middle", "large", "large"], ["middle", "large", "large", "large"])


# --- Texts ---------------------------------------------------------------------------------------------------------


def test_all_tasks_occur_and_sums_are_right():
    found = cases("text", 300)
    assert {case.kind for case in found} == set(TASKS)
    for case in (case for case in found if case.kind == "arithmetic"):
        first, verb, second = re.search(r"(\d) (plus|minus) (\d)", case.asked[0]).groups()
        assert int(case.answer[0]) == int(first) + int(second) * (1 if verb == "plus" else -1)


@pytest.mark.parametrize("kind", ["left", "comparison"])
def test_counts_of_described_scenes_are_right(kind):
    for case in (case for case in cases("text", 300) if case.kind == kind):
        description, *_, question = re.split(r"\. ", case.asked[0])
        items = parse_caption(description, WORLD).items

        def count(noun, items=items):
            words = set(noun.split())
            return sum(i.count for i in items if words & {i.color, f"{i.shape}s", f"{i.shape}es"})

        if kind == "left":
            removed = re.search("remove all ([a-z ]+)", case.asked[0])[1]
            assert int(case.answer[0]) == sum(item.count for item in items) - count(removed)
        else:
            first, second = re.search("more ([a-z ]+) than ([a-z ]+)", question).groups()
            assert case.answer[0] == ("yes" if count(first) > count(second) else "no")


def test_an_answer_in_steps_is_judged_by_where_they_lead():
    case = next(case for case in cases("text", 300) if "; " in case.answer[0])
    *_, said = case.answer[0].split("; ")
    assert case.score([said], WORLD) == case.score([f"somehow; a picture of {said}"], WORLD) == {"right": 1.0}
    assert case.score(["; ".join([said, "a red ring in row 1 column 1"])], WORLD)["right"] == 0


# --- The script ----------------------------------------------------------------------------------------------------


def test_the_mixture_is_of_all_abilities(script):
    assert set(script.MIXTURE) == set(ABILITIES) and sum(script.MIXTURE.values()) == pytest.approx(1)
    assert min(script.MIXTURE.values()) > 0


def test_no_reserved_text_is_in_the_conversations(script):
    generator = np.random.default_rng(0)
    prompts = {key for key in set.union(*map(held_out_keys, ABILITIES)) if " | " not in key}
    lengths = set()
    for _ in range(600):
        exchanges = script.sample(generator)
        lengths.add(len(exchanges))
        said = texts_of(part for exchange in exchanges for part in exchange.asked)
        assert not prompts & set(said)
    assert lengths >= {1, 2, 3, 4, 5}


def test_nothing_that_is_asked_further_about_an_image_is_held_out(script):
    generator = np.random.default_rng(0)
    for _ in range(60):
        first, *further = script.sample(generator, ["caption"])
        scene = images_of(first.asked)[-1]
        assert not any(is_reserved(key_of((scene, *exchange.asked), WORLD)) for exchange in further)
        described = [e.answer[0] for e in further if e.asked[0] in {request for request, _ in DESCRIPTIONS.values()}]
        assert not any(map(is_reserved, described))


def test_rows_carry_the_codes_of_all_their_images(script):
    generator = np.random.default_rng(1)
    for _ in range(100):
        exchanges = script.sample(generator)
        images = script.images_in(exchanges)
        codes = iter([EncodedImage([i], [100 + i], [200 + i]) for i in range(len(images) + 1)])
        row = script.row(exchanges, codes, [4, 4], slots=10)
        assert next(codes).tokens == [len(images)]
        parts = [(turn["role"], part) for turn in row["messages"] for part in turn["content"]]
        drawn = [role == "assistant" for role, part in parts if part["type"] == "image"]
        assert drawn == [is_drawn for _, is_drawn in images]
        # What is given is read with the true codes; what is drawn is read with sampled ones (self-correction).
        assert row["image_tokens"] == [[i] if is_drawn else [200 + i] for i, is_drawn in enumerate(drawn)]
        assert row["image_labels"] == [[100 + i] if is_drawn else [200 + i] for i, is_drawn in enumerate(drawn)]
        clean = [[200 + i] if is_drawn else None for i, is_drawn in enumerate(drawn)]
        assert row["image_clean_tokens"] == (clean if any(drawn) else None)
        assert row["image_grids"] == [[4, 4]] * len(drawn) and row["length"] >= 10 * len(drawn)
