"""Conversations and texts of users as tokens. Special tokens that a text spells out are read as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..utils.short_repr import short_repr


# Marks around parts of texts: noncharacters of Unicode, which texts for interchange do not contain.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens, one placeholder for each image.

    Args:
        ids: token ids.
        starts: for each token the character of the rendered conversation at which it begins.
        is_answer: for each token whether the template's `generation` block marks it as the assistant's.
    """

    ids: list[int]
    starts: list[int]
    is_answer: list[bool]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[dict]],
    chat_template: str,
    with_answers: bool = False,
    image_token: str | None = None,
    **template_kwargs,
) -> list[EncodedChat]:
    """Encode conversations. Only the special tokens that the template writes are read as such.

    Args:
        with_answers: whether to find out which tokens the assistant wrote, by the template's `generation` blocks.
        image_token: the token that the template writes for each image; `None` for templates of other formats.
        template_kwargs: arguments of the template, such as `add_generation_prompt`.

    Raises:
        ValueError: for a text that no tokenizer can read (`text_fault`), and for a conversation that the template
            refuses or of which it leaves out a part.
    """
    special = _special_tokens(tokenizer)
    with template_errors():
        rendered, spans = render_jinja_template(
            conversations=[_mark_special_tokens(_gather_tokens(list(chat), special), special) for chat in chats],
            chat_template=chat_template,
            return_assistant_tokens_mask=with_answers,
            **tokenizer.special_tokens_map | template_kwargs,
        )
    check_rendered(chats, rendered, image_token)
    return [_encode(tokenizer, text, own) for text, own in zip(rendered, spans or [[]] * len(rendered))]


@contextmanager
def template_errors() -> Iterator[None]:
    """Turns errors of Jinja in a chat template, and errors that the template raises, into a `ValueError`."""
    try:
        yield
    except (TemplateError, ArithmeticError) as error:
        raise ValueError(f"The conversation cannot be written by the chat template: {error}") from error


def check_rendered(chats: Sequence[list[dict]], rendered: Sequence[str], image_token: str | None):
    """Raises `ValueError` for a text that is no answer, or an image, that the template left out of the rendered
    conversations.
    """
    for chat, written in zip(chats, rendered):
        written = written.replace(OPEN, "").replace(CLOSE, "")
        words, num_images = " ".join(written.split()), 0
        for message in chat:
            content = message.get("content") or ()
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                num_images += part.get("type") == "image"
                said = part.get("text") or ""
                num_images += said.count(image_token or "") if image_token else 0
                # Templates may trim texts.
                if message.get("role") != "assistant" and " ".join(said.split()) not in words:
                    raise ValueError(
                        f"The chat template leaves out the prompt {short_repr(said)}, so the model would not read it; "
                        "use the template that the checkpoint came with."
                    )
        if image_token and (found := written.count(image_token)) < num_images:
            raise ValueError(
                f"The chat template writes {image_token} {found} times for {num_images} images, so the model would not "
                "read them all; use the template that the checkpoint came with."
            )


def text_fault(text: str) -> str | None:
    """The reason why no tokenizer can read a text, such as "holds …"; `None` if it can be read."""
    if OPEN in text or CLOSE in text:
        return f"holds U+FDD0 or U+FDD1, which are no characters: {short_repr(text)}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"holds one half of a surrogate pair at {error.start}, which is no character: {short_repr(text)}"
        return f"{half}; it may come from bytes that are not UTF-8"
    return None


def check_text(text: str, name: str = "The text"):
    """Raises `ValueError` for a text that no tokenizer can read."""
    if fault := text_fault(text):
        raise ValueError(f"{name} {fault}.")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text outside of a template, such as a given answer."""
    return _encode(tokenizer, _mark_special_tokens(text, _special_tokens(tokenizer)), []).ids


def gather_special_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Any) -> Any:
    """Messages, or lists of them, in which no special token is spread over several text parts, such as "<|im_" and
    "end|>": it is moved into the part in which it begins.
    """
    return _gather_tokens(conversation, _special_tokens(tokenizer))


def check_has_no_special_tokens(tokenizer: PreTrainedTokenizerBase, value: Any):
    """Raises `ValueError` for a special token in any string of a conversation."""
    if found := _special_tokens(tokenizer).search("\n".join(_strings(value))):
        raise ValueError(
            f"The conversation spells out {found[0]}, which this version of transformers would obey; leave it out, or "
            "upgrade transformers."
        )


def check_texts(conversation: Any):
    """Raises `ValueError` for a text in a conversation that no tokenizer can read."""
    for text in _strings(conversation):
        check_text(text)


def _encode(tokenizer: PreTrainedTokenizerBase, marked: str, answers: Sequence[tuple[int, int]]) -> EncodedChat:
    ids, starts, place = [], [], 0
    # Every second piece is a special token that a text spells out.
    for index, piece in enumerate(re.split(f"{OPEN}(.*?){CLOSE}", marked, flags=re.DOTALL)):
        if index % 2:
            own = _plain_ids(tokenizer, piece)
            begins = [place] * len(own)
        else:
            encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            own, begins = encoded["input_ids"], [place + start for start, _ in encoded["offset_mapping"]]
        ids, starts, place = ids + own, starts + begins, place + len(piece)
    # Offsets refer to the text without marks.
    spans = [tuple(end - sum(map(marked[:end].count, (OPEN, CLOSE))) for end in span) for span in answers]
    return EncodedChat(ids, starts, [any(first <= start < last for first, last in spans) for start in starts])


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The tokenizer's own switch for this is a state that all threads share, so it is not used.
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _mark_special_tokens(value: Any, special: re.Pattern) -> Any:
    """The messages with marks around the special tokens in every string."""
    if isinstance(value, str):
        check_text(value)
        return special.sub(rf"{OPEN}\g<0>{CLOSE}", value)
    if isinstance(value, dict):
        return {key: _mark_special_tokens(inner, special) for key, inner in value.items()}
    return [_mark_special_tokens(inner, special) for inner in value] if isinstance(value, list | tuple) else value


def _gather_tokens(value: Any, special: re.Pattern) -> Any:
    if isinstance(value, dict):
        return {key: _gather_tokens(inner, special) for key, inner in value.items()}
    if not isinstance(value, list | tuple):
        return value
    parts = [_gather_tokens(inner, special) for inner in value]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    for first, text in enumerate(texts):
        # Parts that are rendered next to each other.
        run = list(takewhile(lambda following: isinstance(following, str), texts[first:]))
        if len(run) > 1:
            matches = special.finditer("".join(run))
            moved = next((m.end() - len(text) for m in matches if m.start() < len(text) < m.end()), 0)
            for place, following in enumerate(run[1:], first + 1):
                taken = following[:moved]
                texts[first], texts[place], moved = texts[first] + taken, following[len(taken) :], moved - len(taken)
    return [part | {"text": text} if isinstance(text, str) else part for part, text in zip(parts, texts)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for part in inner for text in _strings(part)]
