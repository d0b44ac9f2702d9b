"""Concepts: what emoji of all sets show, with a key, names, keywords and a group."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .synonyms import SYNONYMS


# emojibase's groups by number; of the others 2 is skin tones and hair by themselves, and `None` regional indicators.
GROUPS = {
    0: "faces",
    1: "people",
    3: "animals",
    4: "food",
    5: "travel",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}
TONES = {1: "light", 2: "medium light", 3: "medium", 4: "medium dark", 5: "dark"}


@dataclass(frozen=True)
class Concept:
    """What emoji of several styles show.

    Args:
        key: its code points in hexadecimal, without variation selectors, joined by "-".
        names: its names in texts, in small letters; answers have the first one.
        keywords: words that go with it.
        group: one of `GROUPS`.
        tones: skin tone → key of that variant.
    """

    key: str
    names: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    group: str = "objects"
    tones: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return self.names[0]


def key_of(hexcode: str) -> str:
    """A key from code points as any package writes them: '1F44D-FE0F' → '1f44d'."""
    parts = hexcode.lower().replace("_", "-").split("-")
    return "-".join(part for part in parts if part != "fe0f")


def plain(text: str) -> str:
    """Small letters and digits only, by which slugs and names of different sets are compared."""
    ascii_only = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", ascii_only)


def _unicode_name(key: str) -> str:
    """The Unicode names of the code points without joiners; empty if one of them has no name."""
    characters = [chr(int(code, 16)) for code in key.split("-") if code != "200d"]
    names = [unicodedata.name(character, "") for character in characters]
    return " ".join(names) if all(names) else ""


def read_concepts(entries: list[dict], keywords: dict[str, list[str]]) -> list[Concept]:
    """Concepts of emojibase's `data.json`, with emojilib's keywords; no regional indicators, no bare skin tones."""
    kept = [entry for entry in entries if entry.get("group") in GROUPS]
    labels = [_name(entry["label"]) for entry in kept]
    # A synonym of two concepts is used for neither.
    claimed = Counter(name for label in labels for name in (label, *SYNONYMS.get(label, ())))
    concepts = []
    for entry, label in zip(kept, labels):
        others = tuple(name for name in SYNONYMS.get(label, ()) if claimed[name] == 1)
        words = [*entry.get("tags", ()), *(word.replace("_", " ") for word in keywords.get(entry["emoji"], ())[1:])]
        tones = {
            TONES[skin["tone"]]: key_of(skin["hexcode"])
            for skin in entry.get("skins", ())
            if isinstance(skin.get("tone"), int)
        }
        words = dict.fromkeys(word.lower() for word in words if re.fullmatch(r"[A-Za-z][A-Za-z '-]+", word))
        words = tuple(word for word in words if word not in (label, *others))
        concepts.append(Concept(key_of(entry["hexcode"]), (label, *others), words, GROUPS[entry["group"]], tones))
    return concepts


def _name(label: str) -> str:
    """A label as texts have it: 'flag: Italy' → 'flag of italy', without quotation marks and brackets."""
    name = label.lower().replace("flag: ", "flag of ").replace("“", "").replace("”", "").replace("’", "'")
    return re.sub(r"\s+", " ", re.sub(r"[:,()!]", " ", name)).strip()


def keys_by_slug(entries: list[dict]) -> dict[str, str]:
    """`plain` label or Unicode name → key, for sets that do not say which code points their icons stand for."""
    forms = [form for entry in entries for form in (entry, *entry.get("skins", ()))]
    found: dict[str, str] = {}
    for name_of in (lambda form: form["label"], lambda form: _unicode_name(key_of(form["hexcode"]))):
        for form in forms:
            found.setdefault(plain(name_of(form)), key_of(form["hexcode"]))
    found.pop("", None)
    return found


def match_icons(icons: Iterable[str], characters: dict[str, str], by_slug: dict[str, str]) -> dict[str, str]:
    """Key → icon of a set: by its own table of code points (`chars.json`) if it has one, else by slugs."""
    names = set(icons)
    found = {key_of(code): icon for code, icon in characters.items() if icon in names}
    if found:
        return found
    for variant in (_as_it_is, _first_of_several, _flag):
        for icon in sorted(names):
            key = by_slug.get(plain(variant(icon)))
            if key is not None:
                found.setdefault(key, icon)
    return found


def _as_it_is(slug: str) -> str:
    return slug


def _first_of_several(slug: str) -> str:
    return slug.removesuffix("-1")


def _flag(slug: str) -> str:
    return "flag-" + re.sub(r"^flag-(for-)?(flag-)?", "", slug)
