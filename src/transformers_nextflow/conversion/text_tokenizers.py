"""The text tokenizer of a released folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


# What holds a vocabulary; without it transformers makes some classes empty, and says nothing.
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})


def read_tokenizer(folder: Path, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, as its files name it.

    Args:
        config: of a text model whose tokenizer it is; default: by the folder's own config.

    Raises:
        ValueError: if there is none, or its files are damaged.
    """
    files = {path.name for path in folder.iterdir()}
    if not any(names <= files for names in VOCABULARIES):
        raise ValueError(f"{folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt); add it.")
    try:
        return AutoTokenizer.from_pretrained(folder, config=config)
    except Exception as error:  # of Rust's tokenizers too, each its own
        raise ValueError(f"The tokenizer in {folder} cannot be read; is it whole? {error}") from error
