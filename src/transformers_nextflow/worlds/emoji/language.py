"""The language of scenes: captions to draw from and captions to read back.

A caption names every sticker of its scene. What it leaves open (style, colours, place, background) is sampled.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .coloring import HUES
from .packages import STYLE_WORDS
from .requirement import PLACES, RELATIONS, Item, Requirement, item_of
from .scene import BACKGROUNDS, UPRIGHT, Scene, World, choose, draw_share, random_scene


NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
PREFIXES = (
    "", "an emoji of ", "a sticker of ", "an icon of ", "a drawing of ", "an image of ", "draw ", "show ", "make ",
    "please draw ", "draw an emoji of ", "give me ", "i want ", "emoji: ",
)  # fmt: skip
JOINTS = (" and ", " with ", " and also ", " plus ", " next to ")
BACKGROUND_TEMPLATES = (
    "{body} on {a} {color} background", "{body} on {color}", "{body} with {a} {color} background",
    "{body}, {color} background", "{body} in front of {a} {color} background", "on {a} {color} background, {body}",
)  # fmt: skip
# Wordings of the style of a whole scene; a single sticker may have its style before its name instead.
STYLE_TEMPLATES = (
    "{body}, {style} style", "{body} in {style} style", "{body} in the {style} style", "{style} style: {body}",
    "{body} ({style})",
)  # fmt: skip
RELATION_TEMPLATES = {
    "left": (" left of ", " to the left of ", " on the left of "),
    "right": (" right of ", " to the right of ", " on the right of "),
    "above": (" above ", " over ", " on top of "),
    "below": (" below ", " under ", " underneath "),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SYNONYM, KEYWORDS, STYLED, STYLE_FIRST, ON_BACKGROUND, PLACED = 0.3, 0.06, 0.55, 0.3, 0.5, 0.5
# How often one thing is asked for as briefly as many people write prompts, and what may follow its name then.
TERSE, TERSE_ENDINGS = 0.25, ("", "", " emoji", " icon")
# Words before which the noun of a name ends: "sheaf of rice" becomes sheaves, "fish cake with swirl" fish cakes.
PREPOSITIONS = (
    "of",
    "with",
    "without",
    "in",
    "on",
    "at",
    "behind",
    "from",
    "over",
    "under",
    "fluttering",
    "indicating",
)
IRREGULAR = {
    "man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice", "goose": "geese",
    "ox": "oxen", "foot": "feet", "tooth": "teeth", "leaf": "leaves", "wolf": "wolves", "knife": "knives",
    "loaf": "loaves", "scarf": "scarves", "elf": "elves", "sheaf": "sheaves", "sheep": "sheep", "fish": "fish",
    "deer": "deer", "bison": "bison", "die": "dice", "moose": "moose", "dice": "dice", "potato": "potatoes",
    "tomato": "tomatoes", "mosquito": "mosquitoes", "hero": "heroes", "volcano": "volcanoes", "squid": "squid",
    "shrimp": "shrimp", "fries": "fries", "chips": "chips", "bus": "buses", "octopus": "octopuses",
}  # fmt: skip
# Singular although they end in s.
SINGULAR_ENDINGS = ("ss", "us", "is")
NO_ARTICLE = (
    "rice",
    "bread",
    "corn",
    "fire",
    "fog",
    "popcorn",
    "spaghetti",
    "pasta",
    "bacon",
    "butter",
    "salt",
    "milk",
)
AN_FIRST = ("hourglass", "honest", "x-ray", "suv")
A_FIRST = ("unicorn", "uni", "euro", "one", "ufo", "u-")


# --- Words -----------------------------------------------------------------------------------------------------------


def head(name: str) -> tuple[str, str, str]:
    """The words before the noun of a name, the noun, and the words after it."""
    words = name.split(" ")
    first = next((i for i, word in enumerate(words) if i and word in PREPOSITIONS), len(words))
    if words[0] in ("man", "woman", "person", "men", "women", "people"):
        first = 1
    return " ".join(words[: first - 1]), words[first - 1], " ".join(words[first:])


def is_plural(name: str) -> bool:
    """Whether a name is that of several things, as "grapes" and "french fries" are."""
    noun = head(name)[1]
    return (
        noun in IRREGULAR.values()
        and noun not in IRREGULAR
        or (noun.endswith("s") and not noun.endswith(SINGULAR_ENDINGS))
    )


def plural(name: str) -> str:
    """'fish cake with swirl' → 'fish cakes with swirl'; names of several things stay."""
    before, noun, behind = head(name)
    if noun in IRREGULAR:
        many = IRREGULAR[noun]
    elif is_plural(name):
        many = noun
    elif noun.endswith(("s", "x", "ch", "sh", "z")):
        many = noun + "es"
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        many = noun[:-1] + "ies"
    else:
        many = noun + "s"
    return " ".join(part for part in (before, many, behind) if part)


def with_article(phrase: str, name: str) -> str:
    """'cat' → 'a cat', 'grapes' → 'grapes'; `phrase` is the name with adjectives before it."""
    if is_plural(name) or head(name)[1] in NO_ARTICLE or name.startswith("flag of"):
        return phrase
    return f"{article(phrase)} {phrase}"


def article(phrase: str) -> str:
    """'a' or 'an'."""
    an = phrase[0] in "aeiou" and not phrase.startswith(A_FIRST) or phrase.startswith(AN_FIRST)
    return "an" if an else "a"


def _wording(rng: np.random.Generator | None, options):
    """One of the wordings; without `rng` always the first."""
    return options[0] if rng is None else choose(rng, options)


def name_of(rng: np.random.Generator | None, concept: str, world: World) -> str:
    """A name of a concept, mostly its first; without `rng` always that one."""
    names = world.art.concepts[concept].names
    return choose(rng, names[1:]) if rng is not None and len(names) > 1 and rng.random() < SYNONYM else names[0]


def style_word(rng: np.random.Generator | None, style: str) -> str:
    """The name of a style in a text."""
    return _wording(rng, STYLE_WORDS.get(style, (style,)))


# --- From requirements to texts ------------------------------------------------------------------------------------


def item_phrase(
    rng: np.random.Generator | None,
    item: Item,
    world: World,
    *,
    styled: bool = False,
    size: str | None = None,
    terse: bool = False,
) -> str:
    """'a green apple', 'three bananas turned left', 'a small 3d cat in the top left corner'; terse, 'cat emoji'."""
    name = name_of(rng, item.concept, world)
    adjectives = [_wording(rng, SIZES[size])] if size else []
    adjectives += [style_word(rng, item.style)] if styled and item.style else []
    adjectives += [item.color] if item.color else []
    noun = " ".join([*adjectives, name if item.count == 1 else plural(name)])
    if item.count > 1:
        noun = f"{_wording(rng, (NUMBER_WORDS[item.count], str(item.count)))} {noun}"
    elif terse:
        noun += _wording(rng, TERSE_ENDINGS)
    else:
        noun = with_article(noun, name)
    if item.tone:
        noun += f" with {item.tone.replace('medium ', 'medium-')} skin"
    if item.turn not in (None, UPRIGHT):
        noun += f" {item.turn}"
    return noun + (f" {item.place}" if item.place else "")


def join_phrases(
    rng: np.random.Generator | None,
    phrases: list[str],
    relation: str | None = None,
    background: str | None = None,
    style: str | None = None,
    terse: bool = False,
) -> str:
    """A caption of phrases for its items, in the order given; terse, without a prefix as "draw"."""
    if relation:
        joint = _wording(rng, RELATION_TEMPLATES[relation])
    else:
        joint = _wording(rng, JOINTS if len(phrases) == 2 else JOINTS[:1])
    body = ", ".join(phrases[:-1]) + joint + phrases[-1] if len(phrases) > 1 else phrases[0]
    text = body if terse else _wording(rng, PREFIXES) + body
    if style:
        text = _wording(rng, STYLE_TEMPLATES).format(body=text, style=style_word(rng, style))
    if background:
        text = _wording(rng, BACKGROUND_TEMPLATES).format(body=text, a=article(background), color=background)
    return text


def write_caption(rng: np.random.Generator | None, requirement: Requirement, world: World) -> str:
    """A caption that asks for exactly the requirement; without `rng` always in the same wording."""
    items, styles = requirement.items, {item.style for item in requirement.items}
    common = styles.pop() if len(styles) == 1 else None
    first = len(items) == 1 and rng is not None and rng.random() < STYLE_FIRST
    terse = len(items) == 1 and items[0].count == 1 and rng is not None and rng.random() < TERSE
    settings = {"styled": first or common is None, "size": requirement.size, "terse": terse}
    phrases = [item_phrase(rng, item, world, **settings) for item in items]
    style = None if first else common
    return join_phrases(rng, phrases, requirement.relation, requirement.background, style, terse)


def grouped_items(scene: Scene, world: World, **changes) -> tuple[Item, ...]:
    """The stickers as items, equal ones counted, in reading order; `changes` leave attributes open."""
    counts = Counter(replace(item_of(sticker, world), **changes) for sticker in scene.stickers)
    return tuple(replace(item, count=count) for item, count in counts.items())


def caption(scene: Scene, world: World) -> str:
    """Describes a scene in full, always in the same wording: kinds, numbers, colours, style, background."""
    relation = relation_of(scene) if len(scene.concepts) == 2 and len(scene.stickers) == 2 else None
    return write_caption(None, Requirement(grouped_items(scene, world), relation, scene.background), world)


def relation_of(scene: Scene) -> str:
    """Where the first of two stickers lies as seen from the second; beside each other goes before above."""
    first, second = (scene.center(sticker) for sticker in scene.stickers[:2])
    return next(relation for relation, holds in RELATIONS.items() if holds(first, second))


# --- Training pairs ------------------------------------------------------------------------------------------------


CATEGORIES = ("single", "size", "count", "pair", "relation", "mixed")
KIND_OF = {"single": "single", "size": "small", "count": "count", "pair": "pair", "relation": "pair", "mixed": "mixed"}
SHARES = dict(zip(CATEGORIES, (0.36, 0.08, 0.18, 0.08, 0.16, 0.14)))


def draw_category(rng: np.random.Generator, world: World, category: str) -> tuple[str, Scene, Requirement]:
    """A caption of one of `CATEGORIES`, with a scene that fulfils it and what it asks for."""
    size = choose(rng, list(SIZES)) if category == "size" else None
    kind = "single" if size == "large" else KIND_OF[category]
    scene = random_scene(rng, world, kind)
    styled = rng.random() < STYLED
    # Rare attributes are always named, or models would draw them unasked.
    items = grouped_items(scene, world)
    items = tuple(
        replace(item, style=item.style if styled else None, color=item.color or None, tone=item.tone or None)
        for item in items
    )
    relation = relation_of(scene) if category == "relation" else None
    if relation and rng.random() < 0.5:
        items = items[::-1]
        relation = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
    if category in ("mixed", "size") and kind != "single" and rng.random() < PLACED:
        places = {s.concept: _place(scene, s) for s in scene.stickers}
        items = tuple(replace(item, place=places[item.concept]) for item in items)
    ground = scene.background if rng.random() < ON_BACKGROUND else None
    requirement = Requirement(items, relation, ground, size)
    text = write_caption(rng, requirement, world)
    if len(items) == 1 and rng.random() < KEYWORDS and (words := world.art.concepts[items[0].concept].keywords):
        text += ": " + ", ".join(words[i] for i in rng.permutation(len(words))[:3])
    return text, scene, requirement


def _place(scene: Scene, sticker) -> str:
    """The narrowest of `PLACES` in which a sticker lies."""
    return [place for place, holds in PLACES.items() if holds(*scene.center(sticker))][-1]


def categories(world: World) -> tuple[str, ...]:
    """Those of `CATEGORIES` whose kind of scene the world has."""
    return tuple(category for category in CATEGORIES if KIND_OF[category] in world.kinds)


def random_category(rng: np.random.Generator, world: World) -> str:
    """One of the world's categories by its share."""
    return draw_share(rng, {category: SHARES[category] for category in categories(world)})


# --- From texts to requirements --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """The parsed content of a text about an image: concepts with their numbers, style, background."""

    counts: tuple[tuple[str, int], ...]
    style: str | None
    background: str | None


@lru_cache(maxsize=8)
def _reader(world: World) -> tuple[re.Pattern, dict[str, str]]:
    """A pattern of all names of the world's concepts, the longest first, and the concept of each."""
    concepts: dict[str, str] = {}
    for concept in world.concepts:
        for name in world.art.concepts[concept].names:
            concepts.setdefault(name, concept)
    for name, concept in list(concepts.items()):
        concepts.setdefault(plural(name), concept)
    names = "|".join(re.escape(name) for name in sorted(concepts, key=len, reverse=True))
    numbers = "|".join([*NUMBER_WORDS.values(), *map(str, NUMBER_WORDS), "an?"])
    words = {*BACKGROUNDS, *HUES, *itertools.chain(*SIZES.values(), *(STYLE_WORDS.get(s, (s,)) for s in world.styles))}
    adjectives = "|".join(map(re.escape, words))
    # As few adjectives as possible, since "blue heart" is a name.
    return re.compile(rf"(?<![\w-])(?:({numbers}) (?:(?:{adjectives}) )*?)?({names})(?![\w-])"), concepts


def understand(text: str, world: World) -> Said:
    """What a caption in any wording says; names of the world's concepts, numbers, styles and backgrounds are found."""
    ground = re.search(rf"(?:on|with|in front of)(?: an?)? ({'|'.join(BACKGROUNDS)})(?: background)?$", text)
    ground = ground or re.search(rf"\b({'|'.join(BACKGROUNDS)}) background", text)
    words = {word: style for style in world.styles for word in STYLE_WORDS.get(style, (style,))}
    style = re.search(rf"\b({'|'.join(map(re.escape, words))}) style", text)
    for found in (ground, style):
        text = text.replace(found[0], " ") if found else text
    pattern, concepts = _reader(world)
    numbers = {word: number for number, word in NUMBER_WORDS.items()} | {str(n): n for n in NUMBER_WORDS}
    counts: Counter = Counter()
    for number, name in pattern.findall(text):
        counts[concepts[name]] += numbers.get(number, 1)
    return Said(tuple(sorted(counts.items())), words[style[1]] if style else None, ground[1] if ground else None)
