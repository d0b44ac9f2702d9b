"""Load the models that are timed: the backbone and heads of a checkpoint, or random ones, on any schedule."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowVQConfig


CHECKPOINT = "checkpoints/nextflow-shapes"
RESULTS = Path(__file__).parent / "results"
PRESET_7B = "nextflow-7b"
PRESETS = {
    "nextflow-0.5b": NextFlowConfig.nextflow_0_5b,
    "nextflow-1.5b": NextFlowConfig.nextflow_1_5b,
    "nextflow-3b": NextFlowConfig.nextflow_3b,
    PRESET_7B: NextFlowConfig.nextflow_7b,
}
# "random" has the size of the shapes checkpoint. A smaller model than "random-1b" does not keep a large GPU busy.
RANDOM_BACKBONES = {
    "random": {
        "vocab_size": 512,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    },
    "random-1b": {
        "vocab_size": 512,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
}


def random_config(name: str = "random") -> NextFlowConfig:
    """Returns a config of `RANDOM_BACKBONES` with the shapes checkpoint's schedule and a minimal tokenizer."""
    text_config = RANDOM_BACKBONES[name] | {"bos_token_id": None, "eos_token_id": None}
    vocab_size = text_config["vocab_size"]
    vq_config = NextFlowVQConfig(
        semantic_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 64,
            "patch_size": 16,
            "vision_use_head": False,
        },
        scales=(1, 1, 1, 2, 2, 4, 4),
        codebook_size=1024,
        semantic_code_dim=24,
        pixel_code_dim=16,
        upsample="nearest",
        pixel_encoder_type="patch",
        pixel_channels=16,
        pixel_num_res_blocks=1,
        pixel_decoder_channels=16,
        pixel_decoder_num_res_blocks=1,
        semantic_decoder_depth=1,
        semantic_decoder_heads=1,
        semantic_decoder_hidden_size=16,
        semantic_target_dim=16,
    )
    return NextFlowConfig(
        text_config=text_config,
        vq_config=vq_config,
        boi_token_id=vocab_size - 3,
        eoi_token_id=vocab_size - 2,
        image_token_id=vocab_size - 1,
    )


def with_sides(config: NextFlowConfig, sides: tuple[int, ...], level_sides: tuple[int, ...]) -> NextFlowConfig:
    """Returns the config with square grids of other `sides`; images may end on each of `level_sides`."""
    config = copy.deepcopy(config)
    patch_size = config.vq_config.patch_size
    config.vq_config.scales = list(sides)
    config.vq_config.levels = [[side * patch_size, sides.index(side) + 1] for side in level_sides]
    return config


def load_model(
    name: str = CHECKPOINT,
    sides: tuple[int, ...] | None = None,
    level_sides: tuple[int, ...] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> NextFlowForConditionalGeneration:
    """Loads a checkpoint or makes a model with random weights, in evaluation mode.

    `name` is a checkpoint, a key of `RANDOM_BACKBONES` or a key of `PRESETS`. With `sides` the model has another
    schedule; presets keep their own.
    """
    if name in PRESETS:
        if sides is not None:
            raise ValueError(f"{name} keeps the paper's schedule, got sides {sides}.")
        with torch.device(device):
            return NextFlowForConditionalGeneration._from_config(PRESETS[name](), dtype=dtype).eval()
    if name in RANDOM_BACKBONES:
        config, weights = random_config(name), {}
    else:
        checkpoint = NextFlowForConditionalGeneration.from_pretrained(name)
        config, weights = checkpoint.config, checkpoint.state_dict()
    if sides is not None:
        config = with_sides(config, sides, level_sides)
        # It has one row for each scale, so it does not fit another schedule. The time does not depend on its values.
        weights.pop("model.visual_embedding.scale.weight", None)
    torch.manual_seed(0)
    with torch.device(device):
        model = NextFlowForConditionalGeneration(config)
    model.load_state_dict(model.state_dict() | weights)
    return model.to(device, dtype).eval()


def random_prompt(config: NextFlowConfig, length: int, device: str = "cpu") -> torch.Tensor:
    """Returns a prompt (1, length) of random words that ends with `<boi>`."""
    special = {config.boi_token_id, config.eoi_token_id, config.image_token_id}
    words = torch.tensor([word for word in range(config.text_config.vocab_size) if word not in special])
    prompt = words[torch.randint(len(words), (1, length), generator=torch.Generator().manual_seed(0))]
    prompt[:, -1] = config.boi_token_id
    return prompt.to(device)
