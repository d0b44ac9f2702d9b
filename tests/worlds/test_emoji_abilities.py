"""The abilities of the emoji world: every right answer passes its own check, and what is wrong fails it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tiny_emoji import key, tiny_world

from transformers_nextflow.tokenization_nextflow import THINK_PREFIX
from transformers_nextflow.worlds.conversations import images_of, texts_of, to_messages
from transformers_nextflow.worlds.emoji import (
    ABILITIES,
    RATIOS,
    Scene,
    Sticker,
    held_out_cases,
    may_be_trained_on,
    random_scene,
    training_case,
)
from transformers_nextflow.worlds.emoji.cases import SceneCase, compare
from transformers_nextflow.worlds.emoji.edits import EDITS, edit_example, edit_kinds, edit_of, restyled
from transformers_nextflow.worlds.emoji.questions import QUESTIONS
from transformers_nextflow.worlds.emoji.scene import KINDS
from transformers_nextflow.worlds.emoji.subjects import CHANGES, SUBJECT_KINDS
from transformers_nextflow.worlds.emoji.texts import keyword_index, keyword_riddle
from transformers_nextflow.worlds.held_out import is_reserved


WORLD = tiny_world(ratios=RATIOS)
EVERY_ABILITY = pytest.mark.parametrize("ability", ABILITIES)


def rng(seed=0):
    return np.random.default_rng(seed)


def cases(ability, count=60, world=WORLD, seed=0):
    generator = rng(seed)
    return [training_case(generator, world, ability) for _ in range(count)]


# --- All abilities ------------------------------------------------------------------------------------------------


@EVERY_ABILITY
@pytest.mark.parametrize("world", [WORLD, tiny_world(plain=True, styles=("flat", "3d"))], ids=["all", "plain"])
def test_the_right_answer_scores_one_in_everything(ability, world):
    for case in cases(ability, 40, world):
        assert set(case.score(case.answer, world).values()) == {1.0}, case


@EVERY_ABILITY
def test_a_wrong_or_missing_answer_is_not_right(ability):
    for case, other in zip(cases(ability, 40), cases(ability, 40, seed=1)):
        assert case.score((), WORLD)["right"] == 0
        if ability in ("drawing", "style", "editing", "subject", "in_context", "thinking"):
            empty = Scene((), "white")
            assert case.score((empty,), WORLD)["right"] == 0
            assert case.score((*images_of(case.answer), empty), WORLD)["right"] == 0
        elif ability == "story" and other.frames != case.frames:
            assert case.score(other.answer, WORLD)["right"] == 0
        elif ability in ("question", "text"):
            assert case.score(("nothing of the kind",), WORLD)["right"] == 0


@EVERY_ABILITY
def test_training_cases_hold_nothing_that_is_held_out(ability):
    for case in cases(ability):
        assert may_be_trained_on(case, WORLD) and not case.held_out(WORLD)
        assert not any(WORLD.held_out(scene) for scene in case.scenes)


def test_no_thought_says_in_reserved_words_what_to_draw():
    thoughts = [text for case in cases("thinking", 100) for text in texts_of(case.answer)]
    captions = [part for thought in thoughts for part in thought.removeprefix(THINK_PREFIX).strip().split(": ")]
    assert len(captions) > 100 and not any(map(is_reserved, captions))


@pytest.mark.parametrize("split", ["wording", "style", "color", "pair", "count"])
def test_held_out_cases_are_new_in_what_they_say_and_in_nothing_else(split):
    found = held_out_cases("drawing", WORLD, 20, split=split)
    assert len({case.key for case in found}) == 20
    for case in found:
        assert not may_be_trained_on(case, WORLD)
        assert case.held_out(WORLD) - {"wording"} == ({split} - {"wording"})
    assert [case.key for case in held_out_cases("drawing", WORLD, 20, split=split)] == [case.key for case in found]


def test_splits_and_numbers_of_cases_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="no split 'shape'"):
        held_out_cases("drawing", WORLD, 5, split="shape")
    small = replace(WORLD, concepts=WORLD.concepts[:8])
    with pytest.raises(ValueError, match="ask for fewer"):
        held_out_cases("text", small, 30)


@EVERY_ABILITY
def test_texts_are_in_small_letters_and_clean(ability):
    for case in cases(ability):
        for text in texts_of((*case.asked, *case.answer)):
            assert text == text.lower().strip() and "  " not in text and "{" not in text and text.isascii(), text


@EVERY_ABILITY
def test_conversations_are_messages_of_two_turns(ability):
    for case in cases(ability, 10):
        assert [message["role"] for message in to_messages([case.exchange])] == ["user", "assistant"]


# --- Editing and styles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_what_it_names_and_no_more(kind):
    for seed in range(25):
        before, text, after = edit_example(rng(seed), WORLD, kind)
        assert before != after and before.ratio == after.ratio and text
        same = {name: getattr(before, name) == getattr(after, name) for name in ("background", "concepts", "grid")}
        counts = [Counter(s.concept for s in scene.stickers) for scene in (before, after)]
        if kind == "background":
            assert replace(after, background=before.background) == before
        else:
            assert same["background"] and before.style == after.style
        if kind in ("recolor", "tone", "turn", "background", "move"):
            assert same["grid"] and counts[0] == counts[1]
        if kind == "add":
            assert (counts[1] - counts[0]).total() == 1 and not counts[0] - counts[1]
        if kind == "remove":
            assert len(counts[0] - counts[1]) == 1 and not counts[1] - counts[0]
        if kind == "count":
            assert same["concepts"] and counts[0] != counts[1]
        if kind == "replace":
            assert same["grid"] and counts[0].total() == counts[1].total() and counts[0] != counts[1]


def test_a_plain_world_has_no_edits_of_what_it_has_not():
    world = tiny_world(plain=True)
    assert not {"recolor", "turn"} & set(edit_kinds(world)) and "tone" in edit_kinds(world)
    assert "tone" not in edit_kinds(tiny_world(styles=("streamline",)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_edit_of_a_world_can_be_made_of_its_scenes(kind):
    world = replace(WORLD, kinds={kind: 1.0})
    for edit in edit_kinds(world):
        found = (edit_of(rng(seed), random_scene(rng(seed), world), edit, world) for seed in range(300))
        assert any(found), edit


def test_style_transfer_changes_the_style_and_nothing_else():
    for case in cases("style"):
        before, after = case.asked[0], case.after
        assert after == restyled(before, after.style, WORLD) and after.style != before.style
        if case.kind == "example":
            assert case.asked[1].style == after.style and not set(case.asked[1].concepts) & set(before.concepts)
    assert restyled(Scene((Sticker(key("banana"), "3d"),)), "streamline", WORLD) is None


def test_what_differs_from_the_target_is_told_apart():
    target = Scene((Sticker(key("dog"), "3d", (0, 0)), Sticker(key("cat"), "3d", (0, 1))), "pink", (1, 2))
    turned = replace(target, stickers=tuple(replace(s, turn="upside down") for s in target.stickers))
    swapped = replace(target, stickers=tuple(replace(s, cell=(0, 1 - s.cell[1])) for s in target.stickers))
    flat = replace(target, stickers=tuple(replace(s, style="flat") for s in target.stickers))
    assert compare(turned, target) | {"right": 0, "looks": 0} == compare(turned, target)
    assert compare(swapped, target)["place"] == 0 and compare(swapped, target)["looks"] == 1
    assert compare(flat, target)["style"] == 0 and compare(flat, target)["concept"] == 1
    assert compare(replace(target, background="blue"), target)["background"] == 0
    assert SceneCase("x", (), (target,), after=target).score((target,), WORLD)["right"] == 1


# --- From images --------------------------------------------------------------------------------------------------


def test_subjects_are_those_of_the_images():
    seen = set()
    for case in cases("subject", 120):
        shown = [scene.concepts[0] for scene in images_of(case.asked)]
        asked = [item.concept for item in case.requirement.items]
        assert asked[: len(shown)] == shown
        names = {name for concept in shown for name in WORLD.art.concepts[concept].names}
        assert not any(name in case.asked[-1].split(", ") for name in names)
        seen.add(case.kind)
    assert seen == set(SUBJECT_KINDS)


def test_in_context_pairs_show_the_change_that_is_asked_for():
    seen = set()
    for case in cases("in_context", 150):
        a, b, c = images_of(case.asked)
        (first,), (third,) = a.stickers, c.stickers
        assert a.concepts == b.concepts and case.after.concepts == c.concepts and a.concepts != c.concepts
        assert (first.style, a.background) == (third.style, c.background)
        changed = {"style": b.style == case.after.style != a.style,
                   "background": b.background == case.after.background != a.background,
                   "turn": b.stickers[0].turn == case.after.stickers[0].turn,
                   "count": len(b.stickers) == len(case.after.stickers) > 1,
                   "recolor": b.stickers[0].color == case.after.stickers[0].color}  # fmt: skip
        assert changed[case.kind]
        seen.add(case.kind)
    assert seen == set(CHANGES)


# --- Words --------------------------------------------------------------------------------------------------------


def test_every_kind_of_question_is_asked_and_answered_truly():
    seen = Counter()
    for case in cases("question", 250):
        scene, text = case.asked
        seen[case.kind] += 1
        if case.kind == "count" and "emoji" in text:
            assert case.answer == (str(len(scene.stickers)),)
        elif case.kind == "background":
            assert case.answer == (scene.background,)
        elif case.kind == "what":
            assert case.score((WORLD.art.concepts[scene.concepts[0]].names[-1],), WORLD)["right"] == 1
        elif case.kind == "style":
            assert case.answer == (scene.style,) and case.score((f"{scene.style} style",), WORLD)["right"] == 1
    assert set(seen) == set(QUESTIONS)


def test_a_riddle_of_keywords_fits_one_concept():
    index = keyword_index(WORLD)
    found = 0
    for concept in WORLD.concepts:
        riddle = keyword_riddle(rng(1), WORLD, concept)
        if riddle is not None:
            found += 1
            sets = [index[word] for word in riddle.split(" and ")]
            assert frozenset.intersection(*sets) == {concept}
    assert found > len(WORLD.concepts) / 2


def test_thoughts_name_what_is_then_drawn():
    thoughtful = [case for case in cases("thinking", 80) if len(case.answer) == 2]
    assert 40 < len(thoughtful) < 75
    for case in thoughtful:
        assert case.answer[0].startswith(THINK_PREFIX)
        wrong = (f"{THINK_PREFIX} a thing that nobody knows", case.answer[1])
        assert case.score(wrong, WORLD)["thought"] == 0 and case.score(wrong, WORLD)["right"] == 1


def test_stories_are_told_image_by_image():
    for case in cases("story", 40):
        assert len(case.frames) == len(case.sentences) + 1 and all(s in case.asked[0] for s in case.sentences)
        assert case.score(case.answer[:1], WORLD)["right"] == 0
        swapped = (case.answer[-1], *case.answer[1:-1], case.answer[0])
        undone = case.frames[0] == case.frames[-1]
        assert case.score(swapped, WORLD)["right"] == undone


def test_captions_say_numbers_and_nothing_false():
    scene = Scene((Sticker(key("dog"), "3d", (0, 0)), Sticker(key("dog"), "3d", (0, 1))), "pink", (1, 2))
    case = next(case for case in cases("caption") if case.kind == "several")
    case = replace(case, scene=scene)
    for text, right in (
        ("two dogs", 1), ("Two dogs on a pink background", 1), ("2 dogs, 3d style", 1), ("a dog", 0), ("two cats", 0),
        ("two dogs and a cat", 0), ("two dogs on a blue background", 0), ("two dogs, flat style", 0), ("", 0),
    ):  # fmt: skip
        assert case.score((text,), WORLD)["right"] == right, text


def test_random_scenes_have_all_ratios():
    assert {random_scene(rng(seed), WORLD).ratio for seed in range(120)} == set(RATIOS)
