"""New models of your own (`init`): settings that fit the data and the machine are chosen, written and explained."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import yaml
from transformers import Qwen2_5_VLTextConfig

from ..configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from ..data.columns import Columns
from ..data.row_errors import BadRowError
from ..data.rows import load_image, read_row
from ..data.sources import open_rows
from ..image_processing_nextflow import NextFlowImageProcessor
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..processing_nextflow import NextFlowProcessor
from ..tokenization_nextflow import train_tokenizer
from ..utils.atomic_files import atomic_write
from .nextflow_trainer import has_bfloat16_units
from .presets import PRESETS, Preset
from .recipes import OWN_RECIPES, RECIPES


# How many rows are examined, spread over all.
NUM_EXAMINED = 512
# The number of epochs, within the limits of steps.
EPOCHS = {"tokenizer": 300, "transformer": 150, "lora": 150}
STEPS = {"tokenizer": (600, 50_000), "transformer": (600, 50_000), "lora": (200, 5_000)}
WARMUP_SHARE = 0.05
# Bytes of activations of each position, layer and channel for the backward pass: a generous estimate.
BYTES_PER_CHANNEL = 48
# The share of the memory for activations.
MEMORY_SHARE = 0.4


@dataclass
class DataStatistics:
    """Properties of the rows: their number, and of the `num_examined` examined ones the shorter sides, ratios and
    texts.
    """

    rows: int
    num_examined: int = 0
    sides: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """The machine on which the model is trained."""

    gpu: str | None
    memory: int
    bfloat16: bool
    cores: int

    @classmethod
    def detect(cls) -> Machine:
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            return cls(properties.name, properties.total_memory, torch.cuda.is_bf16_supported(), os.cpu_count() or 1)
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
        return cls(None, pages, has_bfloat16_units(), os.cpu_count() or 1)


def examine_rows(source: str | os.PathLike, columns: Columns | None = None) -> DataStatistics:
    """Examine some rows of a source (`open_rows`).

    Raises:
        ValueError: naming row and field of invalid values, or for rows without images.
    """
    rows, root = open_rows(source, columns)
    statistics = DataStatistics(len(rows))
    for number in range(0, len(rows), max(1, len(rows) // NUM_EXAMINED)):
        row = rows[number]
        statistics.num_examined += 1
        try:
            sample = read_row(row, root)
            for place, image in zip(sample.fields, sample.images):
                width, height = load_image(image, place).size
                statistics.sides.append(min(width, height))
                statistics.ratios.append(max(width, height) / min(width, height))
        except BadRowError as error:
            raise error.of_row(number) from error
        statistics.texts += [part["text"] for m in sample.messages for part in m["content"] if part["type"] == "text"]
    if not statistics.sides:
        raise ValueError(f"{source} has no images to create a model for; rows that hold only codes have none.")
    return statistics


def create_model(
    source: str | os.PathLike,
    output: str | os.PathLike,
    preset: str = "small",
    columns: Columns | None = None,
    seed: int = 0,
    machine: Machine | None = None,
) -> list[str]:
    """Write config, processor, random weights and recipes that fit a source of rows to a new folder.

    Returns:
        For each choice a sentence with its reason.

    Raises:
        ValueError: for an unknown preset, and for all that `examine_rows` refuses.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {preset!r}.")
    size, statistics, machine = PRESETS[preset], examine_rows(source, columns), machine or Machine.detect()
    choices = [f"preset {preset}: {size.purpose}"]
    vq_config = _vision(size, statistics, choices)
    processor = _processor(size, statistics, vq_config, choices)
    config = _config(size, vq_config, processor)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NextFlowForConditionalGeneration(config)
    millions = [part.num_parameters() / 1e6 for part in (model, model.vq_model)]
    choices.append(f"{millions[0]:.1f} million parameters, {millions[1]:.1f} of them in the vision tokenizer")
    recipes = _recipes(size, statistics, config, machine, columns or Columns(), choices)
    with atomic_write(Path(output)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / OWN_RECIPES).mkdir()
        for name, values in recipes.items():
            text = f"# Made by init for {statistics.rows} rows and this machine.\n"
            text += yaml.safe_dump(values, sort_keys=False)
            (folder / OWN_RECIPES / f"{name}.yaml").write_text(text)
    return choices


def _vision(size: Preset, statistics: DataStatistics, choices: list[str]) -> NextFlowVQConfig:
    side = median(statistics.sides)
    level = max([level for level in size.levels if level <= side], default=size.levels[0])
    scales = [side for side in size.sides if side * size.patch_size <= level]
    codes_of_image = sum(side * side for side in scales)
    enough = statistics.rows * codes_of_image // 4
    codes = min(size.max_codes, 2 ** max(6, int(math.log2(max(enough, 1)))))
    choices.append(
        f"{level} pixels: half of the images have {side:.0f} or more on their shorter side, and the preset goes up to "
        f"{size.levels[-1]}"
    )
    choices.append(f"grids of {', '.join(map(str, scales))} cells a side: {codes_of_image} codes a square image")
    if max(statistics.ratios) > 1.1:
        choices.append(
            f"images keep their ratios, up to {max(statistics.ratios):.1f}:1; the tokenizer is trained on squares"
        )
    choices.append(f"{codes} codes: {statistics.rows} rows give about {4 * enough}, and each code wants a few")
    return NextFlowVQConfig(
        semantic_config={
            "model_type": "siglip_vision_model", "image_size": level, "patch_size": size.patch_size,
            "vision_use_head": False, **size.semantic,
        },
        patch_size=size.patch_size,
        scales=scales,
        codebook_size=codes,
        normalize_codes=False,
        semantic_target_dim=size.semantic["hidden_size"],
        **size.pixel,
    )  # fmt: skip


def _processor(
    size: Preset, statistics: DataStatistics, vq_config: NextFlowVQConfig, choices: list[str]
) -> NextFlowProcessor:
    tokenizer = train_tokenizer(statistics.texts, size.max_words)
    words = {word for text in statistics.texts for word in text.split()}
    choices.append(f"{len(tokenizer)} text tokens, from {len(words)} words; any other text is spelt in bytes")
    return NextFlowProcessor(NextFlowImageProcessor(vq_config.scales, vq_config.patch_size), tokenizer)


def _config(size: Preset, vq_config: NextFlowVQConfig, processor: NextFlowProcessor) -> NextFlowConfig:
    tokenizer, frequencies = processor.tokenizer, size.text["hidden_size"] // size.text["num_attention_heads"] // 2
    text_config = Qwen2_5_VLTextConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        max_position_embeddings=4096,
        # Sections of one, so that rows, columns and scales each get high and low frequencies.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1] * frequencies},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size.text,
    )
    return NextFlowConfig(
        text_config=text_config,
        vq_config=vq_config,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
        # Neighbouring cells of the finest grid are one apart.
        rope_range=float(vq_config.scales[-1]),
    )


def _recipes(
    size: Preset,
    statistics: DataStatistics,
    config: NextFlowConfig,
    machine: Machine,
    columns: Columns,
    choices: list[str],
) -> dict[str, dict]:
    """The package's recipes for small machines, with batches, steps and warm-up that fit."""
    batch = _batch_size(size, statistics, config, machine)
    where = machine.gpu or f"{machine.cores} CPU cores"
    choices.append(f"batches of {batch} on {where} with {machine.memory / 2**30:.0f} GiB")
    device = {"bf16": machine.bfloat16} if machine.gpu else {"use_cpu": True}
    found = {}
    for name in ("tokenizer", "transformer", "lora", "rl"):
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        arguments = values["arguments"] | device
        if name in EPOCHS:
            least, most = STEPS[name]
            steps = min(most, max(least, EPOCHS[name] * statistics.rows // batch))
            arguments |= {"per_device_train_batch_size": batch, "max_steps": steps}
            arguments["warmup_steps"] = max(10, round(WARMUP_SHARE * steps))
            arguments["save_steps"] = max(50, steps // 5)
            choices.append(
                f"{name}: {steps} steps, {steps * batch / statistics.rows:.0f} passes over the rows, the first "
                f"{arguments['warmup_steps']} to warm up"
            )
        if name == "tokenizer":
            arguments["kmeans_images"] = min(4096, statistics.rows)
            # Codes are learned in float32.
            arguments.pop("bf16", None)
        if machine.gpu:
            values.pop("attention", None)
        named = {"image_column": columns.image, "caption_column": columns.caption}
        named |= {"edited_image_column": columns.edited_image}
        found[name] = values | {"arguments": arguments} | {n: value for n, value in named.items() if value is not None}
    return found


def _batch_size(size: Preset, statistics: DataStatistics, config: NextFlowConfig, machine: Machine) -> int:
    text, schedule = config.text_config, config.vq_config.scale_schedules.build()
    length = schedule.sequence_length() * math.ceil(len(statistics.sides) / statistics.num_examined) + 64
    of_row = length * text.hidden_size * text.num_hidden_layers * BYTES_PER_CHANNEL
    return max(1, min(size.batch_size, statistics.rows, int(MEMORY_SHARE * machine.memory / of_row)))
