"""The model card of a trained model: its start, settings, rows, losses, and how to load it."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult
from transformers import __version__ as transformers_version

from ...utils.model_cards import EXAMPLE_PROMPT, TAGS, derived_card_metadata, table, write_card
from ...utils.short_repr import short_repr
from .training_record import HARMLESS, HARMLESS_FAMILIES, NOT_RECORDED


# Entries of the log other than losses.
LOGGED = ("reward", "kl", "text_accuracy")
# Settings that a card leaves out: without information, or internal to the libraries.
NOT_SHOWN = HARMLESS | NOT_RECORDED | {"accelerator_config", "fsdp_config", "label_names"}
NOT_A_RESULT = ("_runtime", "_per_second", "_seconds", "epoch")


class TrainingCardMixin:
    """Writes a card with everything that a trainer on `Trainer` saves, in place of the libraries' own."""

    # The name of the data set if rows are from the Hub, and the first captions of rows, with which samples are drawn.
    dataset_name: str | None = None
    # Files beside the weights that the card shows, with their captions.
    card_images: dict[str, str] = {}
    # Results other than those of evaluations.
    card_results: dict[str, float] = {}
    card_prompts: tuple[str, ...] = ()

    def create_model_card(self, *args, **kwargs):
        """As in `Trainer`, which calls it; arguments are ignored, since the trainer knows what the card says."""
        if self.is_world_process_zero():
            self.write_training_card(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.write_training_card(output_dir or self.args.output_dir)

    def write_training_card(self, folder: str | os.PathLike, around=None):
        """Write `README.md` to a folder.

        Args:
            around: the model in the folder, if the trained model is a part of it.
        """
        model = around or self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if is_peft_model(model) else model
        title, what = self._card_description(model, base)
        prompt = (self.card_prompts or (EXAMPLE_PROMPT,))[0]
        extras = "pipelines,peft" if is_peft_model(model) else "pipelines"
        sections = [what, self._card_rows()]
        images = {name: caption for name, caption in self.card_images.items() if (Path(folder) / name).is_file()}
        sections += [f"![{caption}]({name})" for name, caption in images.items()]
        sections += ["## Use", base.card_use.replace("{prompt}", prompt.replace('"', "'")).replace("{extras}", extras)]
        if losses := self._card_losses():
            sections += ["## Losses", "The last that were logged.", table(("", "value"), losses)]
        results = self._card_results()
        if results:
            sections += ["## Evaluation", table(("metric", "value"), results)]
        sections += ["## Training", f"Settings that differ from the defaults of `{type(self.args).__name__}`:"]
        sections += [table(("setting", "value"), self._card_settings()), f"transformers {transformers_version}."]
        name, set_of_rows = self.dataset_name or "local", self.dataset_name or "the training's own evaluation"
        head = derived_card_metadata(
            base.name_or_path,
            library_name="peft" if is_peft_model(model) else base.card_library,
            pipeline_tag=base.card_pipeline_tag,
            tags=[
                *TAGS,
                *(["lora"] if is_peft_model(model) else []),
                *(["grpo", "rl"] if self._card_rewards() else []),
            ],
            datasets=[self.dataset_name] if self.dataset_name else None,
            widget=self._card_widget(images),
            model_name=title if results else None,
            eval_results=[
                EvalResult(base.card_pipeline_tag or "image-to-image", name, set_of_rows, metric, value)
                for metric, value in results.items()
            ],
        )
        write_card(folder, title, sections, **head)

    def _card_description(self, model, base) -> tuple[str, str]:
        """Title, and the paragraph that says what the weights are."""
        steps = f"{self.state.global_step} of {self.state.max_steps} steps" if self.state.max_steps > 0 else "no step"
        by = (
            f"GRPO on rewards of what it draws ({', '.join(self._card_rewards())})"
            if self._card_rewards()
            else "training"
        )
        if not is_peft_model(model):
            part = "It" if model is self.accelerator.unwrap_model(self.model) else "Its vision tokenizer"
            return base.card_title, f"{base.card_text()} {part} stands after {by}, {steps}."
        ranks = sorted({getattr(config, "r", None) for config in model.peft_config.values()} - {None})
        whole = sorted({name for config in model.peft_config.values() for name in config.modules_to_save or ()})
        text = f"An adapter (LoRA, rank {' and '.join(map(str, ranks))}) for a {base.card_title}, after {by}, {steps}."
        if whole:
            text += f" It holds {', '.join(whole)} whole, too."
        return f"LoRA for {base.card_title}", f"{text} The model that it is for: {base.card_text()}"

    def _card_rows(self) -> str:
        rows = getattr(self.train_dataset, "rows", self.train_dataset)  # a pack holds several
        count = f"{len(rows)} rows" if hasattr(rows, "__len__") else "a stream of rows"
        where = (
            f"[{self.dataset_name}](https://huggingface.co/datasets/{self.dataset_name})" if self.dataset_name else ""
        )
        return f"Trained on {count} of {where or 'a local data set'}."

    def _card_rewards(self) -> list[str]:
        return list(getattr(self, "reward_func_names", []))

    def _card_widget(self, images: dict[str, str]) -> list[dict] | None:
        first = next(iter(images), None)
        return [
            {"text": prompt} | ({"output": {"url": first}} if first else {}) for prompt in self.card_prompts
        ] or None

    def _card_settings(self) -> dict[str, Any]:
        values, known = self.args.to_dict(), {f.name: f for f in fields(self.args)}
        found = {}
        for name, value in values.items():
            one = known.get(name)
            if one is None or name in NOT_SHOWN or name.startswith(HARMLESS_FAMILIES) or value is None:
                continue
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if isinstance(value, dict):
                value = {key: own for key, own in value.items() if own is not None}
            if value != default and value not in ({}, [], "") and not (value is False and default is None):
                found[name] = value if isinstance(value, int | float | str) else short_repr(value)
        return found

    def _card_losses(self) -> dict[str, float]:
        """The last logged value of each loss."""
        found: dict[str, float] = {}
        for entry in self.state.log_history:
            for name, value in entry.items():
                if not name.startswith("eval_") and (name.endswith("loss") or name in LOGGED):
                    found[name] = float(value)
        return found

    def _card_results(self) -> dict[str, float]:
        """The newest evaluation's metrics."""
        evaluations = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        newest = evaluations[-1] if evaluations else {}
        metrics = {
            name.removeprefix("eval_"): float(value)
            for name, value in newest.items()
            if name.startswith("eval_") and not name.endswith(NOT_A_RESULT) and isinstance(value, int | float)
        }
        return metrics | self.card_results
