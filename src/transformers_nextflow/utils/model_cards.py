"""Model cards: the head, which the Hub reads, and the text below it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.utils import cached_file

from .atomic_files import atomic_write
from .folder_parts import pipeline_around


CARD = "README.md"
# Entries that a model takes over from the card of the weights from which it starts.
INHERITED = ("license", "license_name", "license_link", "language")
TAGS = ("nextflow", "next-scale-prediction")
# Code that loads the model of the card; `prompt` and `extras` are filled in.
USE = """\
```python
import torch
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("FOLDER or REPOSITORY")
pipe("{prompt}", generator=torch.Generator().manual_seed(0)).images[0].save("image.png")
```

`pip install transformers-nextflow[{extras}]` has what this needs."""
TOKENIZER_USE = """\
```python
from transformers_nextflow import NextFlowVQModel

vq_model = NextFlowVQModel.from_pretrained("FOLDER or REPOSITORY")
vq_model.reconstruct(pixel_values)  # (B, 3, H, W) in [-1, 1], through codes and back
```"""
DECODER_USE = """\
```python
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("MODEL", diffusion_decoder="FOLDER or REPOSITORY")
pipe("{prompt}", decoder="diffusion").images[0].save("image.png")
```

MODEL is a model with the vision tokenizer that the decoder was trained on; another one is refused.
`pip install transformers-nextflow[pipelines]` has what this needs."""
EXAMPLE_PROMPT = "a red circle"


def read_card_metadata(source: str | os.PathLike) -> dict[str, Any]:
    """The head of the card of a folder, or of a repository of the Hub whose card is in the cache; empty without one.
    The card of a pipeline's folder is that of the model in it, too.

    Raises:
        ValueError: if the head cannot be read.
    """
    path = Path(pipeline_around(source) or source) / CARD
    if not os.path.isdir(source):
        options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(str(source), CARD, _raise_exceptions_for_connection_errors=False, **options)
        path = Path(found or "")
    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The head of {path} cannot be read; correct or remove it. {error}") from error


def derived_card_metadata(source: str | os.PathLike | None, **data) -> dict[str, Any]:
    """The head of the card of a model made from a source: a folder, which is never named, or a repository of the Hub.

    Args:
        source: `None` or empty for random weights.
        data: entries of the head, which replace inherited ones; entries that are `None` or empty are left out.
    """
    metadata: dict[str, Any] = {}
    base = None
    if source:
        try:
            metadata = read_card_metadata(source)
        except ValueError:
            metadata = {}  # a broken card of the source must not keep the model from being saved
        base = metadata.get("base_model") if os.path.exists(source) else str(source)
    head = {"license": "unknown", "base_model": base} | {name: metadata[name] for name in INHERITED if name in metadata}
    return {name: value for name, value in (head | data).items() if value not in (None, [], "")}


def write_card(folder: str | os.PathLike, title: str, sections: Sequence[str], **data):
    """Write `README.md`.

    Args:
        sections: Markdown, one after the other.
        data: entries of the head, as arguments of `ModelCardData`; see `derived_card_metadata`.
    """
    card = ModelCardData(**data)
    text = "\n\n".join(section.strip() for section in sections)
    with atomic_write(Path(folder) / CARD) as partial:
        partial.write_text(f"---\n{card.to_yaml()}\n---\n\n# {title}\n\n{text}\n", encoding="utf-8")


def with_card(save_pretrained: Callable) -> Callable:
    """Wraps a model's `save_pretrained` so that it writes a card, `model.write_model_card(folder)`, to a folder
    without.

    If the model is also uploaded, a repository without a card gets this card first, since transformers would write its
    own.
    """

    @wraps(save_pretrained)
    def save(self, save_directory, *args, **kwargs):
        if kwargs.get("push_to_hub"):
            upload_card_if_missing(self, kwargs.get("repo_id", Path(save_directory).name), kwargs.get("token"))
        written = save_pretrained(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and not (Path(save_directory) / CARD).exists():
            self.write_model_card(save_directory)
        return written

    return save


class ModelCardMixin:
    """The card of a model of this package. Adapters and trainings have their own cards."""

    card_title = "NextFlow"
    card_origin = "[arXiv 2601.02204](https://arxiv.org/abs/2601.02204)"
    card_pipeline_tag: str | None = "any-to-any"
    card_library = "transformers"
    card_use = USE

    def push_to_hub(self, repo_id: str, **kwargs):
        upload_card_if_missing(self, repo_id, kwargs.get("token"), kwargs.get("private"))
        return super().push_to_hub(repo_id, **kwargs)

    def card_text(self) -> str:
        """A paragraph that describes the model."""
        vq_model = getattr(self, "vq_model", self)
        vq_config = vq_model.config
        schedules = vq_config.scale_schedules
        sizes = " and ".join(map(str, schedules.resolutions))
        largest = schedules.for_size(schedules.resolutions[-1], schedules.resolutions[-1])
        text = f"{self.card_title} ({self.card_origin}). "
        text += f"It has {format_count(self.num_parameters())} parameters, "
        if vq_model is not self:
            text += f"{format_count(vq_model.num_parameters())} of them in the vision tokenizer, "
        text += f"for images of {sizes} pixels in up to {largest.num_scales} scales, of "
        text += f"{vq_config.codebook_size} codes."
        stated = getattr(self.config, "trained_on", None)
        return text if stated is None else f"{text} It knows only {stated['domain']}."

    def write_model_card(self, folder: str | os.PathLike, **data):
        """Write the card of the model to a folder. Entries of the card of the weights from which it was loaded, such as
        the licence, are taken over.

        Args:
            data: entries of the card's head that replace the model's.
        """
        data = {"library_name": self.card_library, "pipeline_tag": self.card_pipeline_tag, "tags": list(TAGS)} | data
        head = derived_card_metadata(self.name_or_path, **data)
        use = self.card_use.format(prompt=EXAMPLE_PROMPT, extras="pipelines")
        write_card(folder, self.card_title, [self.card_text(), "## Use", use], **head)


def upload_card_if_missing(model, repo_id: str, token: str | None = None, private: bool | None = None):
    """Upload the model's card to a repository of the Hub without one; the repository is made if it does not exist."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if api.file_exists(repo_id, CARD):
        return
    with tempfile.TemporaryDirectory() as folder:
        model.write_model_card(folder)
        api.upload_file(path_or_fileobj=str(Path(folder) / CARD), path_in_repo=CARD, repo_id=repo_id)


def table(columns: tuple[str, str], values: dict[str, Any]) -> str:
    """A Markdown table of two columns."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join([f"| {columns[0]} | {columns[1]} |", "|---|---|", *rows])


def format_count(number: int) -> str:
    """A number of parameters, as people say it."""
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")[:200]
