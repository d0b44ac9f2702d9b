"""A checkpoint's own sampling settings, which its generation config stores."""

from __future__ import annotations

from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..utils.checkpoint_checks import read_json
from ..utils.user_warnings import warn_user
from .sampling import ImageSampling


# Entries of a generation config: settings for images drawn from text, and for images drawn after other images.
SAMPLINGS = ("image_sampling", "editing_sampling")


class StoredSamplingMixin:
    """Reads the settings when a model is loaded; must come before transformers' `GenerationMixin` in the bases."""

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, source, **kwargs):
        # If the file is broken, transformers silently uses its own defaults; and a config that it makes from the
        # model's config lacks our settings.
        is_stored = generation_config is None and source is not None
        stored = _stored_generation_config(source, kwargs) if is_stored else {}
        super().adjust_generation_fn(generation_config, from_auto_class, from_pipeline, source, **kwargs)
        for name in stored.keys() & SAMPLINGS:
            setattr(self.generation_config, name, stored[name])
        file = f"{GENERATION_CONFIG_NAME} of {source}" if is_stored else "generation_config"
        self._check_samplings(file)
        end = self.config.text_config.eos_token_id
        if is_stored and self.generation_config.eos_token_id is None and end is not None:
            warn_user(
                f"There is no eos_token_id in {file}: text goes on until its limit, though the model ends its turns "
                f"with {end}.",
            )

    def _check_samplings(self, file: str):
        """Raises `ValueError` for invalid sampling settings, and warns if there are none."""
        counts = [count for _, count in self.config.vq_config.scale_schedules.levels]
        settings = {name: getattr(self.generation_config, name, None) for name in SAMPLINGS}
        for name, values in settings.items():
            try:
                ImageSampling.from_dict({} if values is None else values).check_scales(counts)
            except ValueError as error:
                raise ValueError(f"{name} in {file} cannot be used: {error}") from error
        if settings["image_sampling"] is None:
            warn_user(
                f"There is no image_sampling in {file}: images are drawn without guidance and at temperature 1, unless "
                "a call says otherwise. A model that was tuned with other settings has lost them with that file.",
            )


def _stored_generation_config(source, options: dict) -> dict:
    """The entries of the generation config in a folder or a repository; empty if there is no such file.

    Raises:
        ValueError: for a file that is no JSON object.
    """
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    options = {name: options[name] for name in names if options.get(name) is not None}
    try:
        file = cached_file(source, GENERATION_CONFIG_NAME, **options)
    except OSError:
        return {}
    return read_json(file)
