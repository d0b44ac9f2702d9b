"""Reading of the text tokenizer of a released folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


# Files that hold a vocabulary; without them transformers silently makes empty tokenizers of some classes.
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"tokenizer.model"})


def read_tokenizer(folder: Path, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, of the class that its files name.

    Args:
        config: config of the text model to which it belongs; default: the folder's own config.

    Raises:
        ValueError: if there is no tokenizer, or its files are damaged.
    """
    files = {path.name for path in folder.iterdir()}
    if not any(names <= files for names in VOCABULARIES):
        raise ValueError(f"{folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt); add it.")
    try:
        return AutoTokenizer.from_pretrained(folder, config=config)
    except Exception as error:  # tokenizers in Rust have their own kinds of errors
        raise ValueError(f"The tokenizer in {folder} cannot be read; is it complete? {error}") from error
