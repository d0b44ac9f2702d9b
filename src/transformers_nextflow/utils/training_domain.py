"""The statement of a checkpoint about its training data, from which warnings about other inputs follow."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .short_repr import short_repr
from .typed_values import is_finite_number


# "3d" is a word and no number. Signs beyond Latin-1 that are no punctuation, such as emoji, count as words.
WORD = re.compile(
    r"\d*[^\W\d_]+|(?<!\w)[-−]?\d+\.\d+|(?<!\w)[-−]\d+|\d+|[^\w\s\x00-\xff\u2000-\u206f\u3000-\u303f\ufe00-\ufe0f]"
)
NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
NUMBERS = {"zero": 0, "no": 0} | {word: number for number, word in enumerate(NUMBER_WORDS, start=2)}
# Words that, between a number and a noun, mean that the number does not count the noun: "six minus four stars".
OPERATIONS = {"minus", "plus", "times", "more", "fewer", "less", "than", "of", "and", "after"}
# How many dB below the lowest PSNR of its training images an image counts as being of another kind.
MARGIN = 5.0


@dataclass(frozen=True)
class TrainingDomain:
    """The statement that a config may hold as `trained_on`.

    Args:
        domain: what its images show, such as "images of one to four flat shapes"; messages say "it knows only …" with
            it.
        words: the words of all prompts, in small letters; `None` for an open vocabulary.
        sizes: (height, width) in pixels of its images; `None` for all sizes of the scale schedules.
        most: the largest number of objects of one kind, and `counted` the words for several of them.
        lowest_psnr: the lowest PSNR in dB of reconstructions of its training images by its vision tokenizer.
    """

    domain: str
    words: tuple[str, ...] | None = None
    sizes: tuple[tuple[int, ...], ...] | None = None
    most: int | None = None
    counted: tuple[str, ...] = ()
    lowest_psnr: float | None = None

    def __post_init__(self):
        checks = {
            "domain": (bool(self.domain.strip()), "say what its images show"),
            "words": (self.words is None or bool(self.words), "be left out for an open vocabulary"),
            "sizes": (
                self.sizes is None or bool(self.sizes) and all(len(size) == 2 and min(size) > 0 for size in self.sizes),
                "hold pairs of height and width in pixels",
            ),
            "most": (self.most is None or self.most >= 1, "be a whole number from 1"),
            "lowest_psnr": (self.lowest_psnr is None or is_finite_number(self.lowest_psnr), "be a finite number of dB"),
        }
        for name, (is_valid, remedy) in checks.items():
            if not is_valid:
                raise ValueError(f"{name} must {remedy}, got {short_repr(getattr(self, name))}.")

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """Words of texts that no prompt of the training had, without numbers; a text of only signs counts as a word."""
        if self.words is None:
            return []
        said = [words_of(text) or text.split() for text in texts]
        found = [word for words in said for word in words if number_of(word) is None]
        return [word for word in dict.fromkeys(found) if word not in set(self.words)]

    def unseen_counts(self, texts: Iterable[str]) -> list[str]:
        """Phrases in texts whose number the training did not have (1 to `most`), such as "five red stars"."""
        return [phrase for text in texts if self.most is not None for phrase in self._unseen_counts(words_of(text))]

    def _unseen_counts(self, words: list[str]) -> Iterable[str]:
        for start, word in enumerate(words):
            number = number_of(word)
            is_other = number is not None and number not in range(1, self.most + 1)
            for stop in range(start + 1, min(start + 4, len(words))) if is_other else ():
                if words[stop] in OPERATIONS or number_of(words[stop]) is not None:
                    break
                if words[stop] in self.counted:
                    yield " ".join(words[start : stop + 1])
                    break

    def unseen_sizes(self, sizes: Iterable[tuple[int, int]]) -> list[str]:
        """Sizes (height, width) that no image of the training had, such as "32x128"."""
        if self.sizes is None:
            return []
        return [f"{h}x{w}" for h, w in dict.fromkeys(sizes) if [h, w] not in [list(size) for size in self.sizes]]

    def is_out_of_domain(self, psnr: float) -> bool:
        """Whether the tokenizer reconstructs an image so much worse than its own that it must be of another kind."""
        return self.lowest_psnr is not None and psnr < self.lowest_psnr - MARGIN


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return WORD.findall(text.lower())


def vocabulary_of(texts: Iterable[str]) -> tuple[str, ...]:
    """All words of texts, sorted, without numbers; "no" stays, since it is an answer too."""
    found = {word for text in texts for word in words_of(text)}
    return tuple(sorted(word for word in found if number_of(word) is None or word == "no"))


def number_of(word: str) -> float | None:
    """The number that a word of `words_of` means, in digits or spelled out; `None` if it is no number."""
    if word in NUMBERS:
        return NUMBERS[word]
    return float(word[:20].replace("\u2212", "-")) if word[-1].isdecimal() else None
