"""The sizes of the recipe: "full", for a GPU; "medium", some hours of two cores; "small", the whole path there within
45 minutes.

A size decides which scenes there are, and the shapes of tokenizer, transformer and judge. The recipes in `recipes` say
how long and at which learning rates these are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import Qwen2_5_VLTextConfig

from transformers_nextflow import NextFlowVQConfig
from transformers_nextflow.worlds.emoji import RATIOS, Art, World


PATCH_SIZE = 8
# Sides of the grids: the 64 level ends on 8 x 8 cells, the 128 level on 16 x 16.
SCALES, SMALL_SCALES = (1, 2, 3, 4, 6, 8, 11, 16), 6
# The dimension in which each concept has a direction, which the semantic decoder learns for the cells that show it.
SEMANTIC_DIM = 64
# The style and the concept that only the LoRA trainings of a new style and a new concept show (`lora.py`).
KEPT_STYLE, KEPT_CONCEPT = "streamline", "unicorn"
SMALL_STYLES = ("flat", "noto", "3d")
SMALL_CONCEPTS = (
    "monkey", "dog", "cat", "lion", "tiger", "horse", "cow", "pig", "rabbit", "elephant", "bear", "panda", "chicken",
    "penguin", "frog", "turtle", "snake", "fish", "octopus", "butterfly", "snail", "honeybee", "lady beetle", "owl",
    "shark", "banana", "red apple", "strawberry", "watermelon", "pineapple", "cherries", "grapes", "lemon", "tomato",
    "carrot", "mushroom", "bread", "cheese wedge", "hamburger", "pizza", "doughnut", "cookie", "birthday cake",
    "ice cream", "hot beverage", "beer mug", "egg", "rocket", "automobile", "bus", "airplane", "bicycle", "sailboat",
    "house", "tent", "sun", "rainbow", "snowman", "umbrella", "ferris wheel",
)  # fmt: skip
SMALL_KINDS = {"single": 0.7, "count": 0.15, "pair": 0.15}
MEDIUM_CONCEPTS = SMALL_CONCEPTS + (
    "mouse", "fox", "koala", "duck", "whale", "giraffe", "peach", "avocado", "ear of corn", "sushi", "french fries",
    "deciduous tree", "palm tree", "cactus", "sunflower", "rose", "crescent moon", "star", "fire", "snowflake",
    "red heart", "grinning face", "smiling face with sunglasses", "ghost", "robot", "skull", "crown", "top hat", "key",
    "guitar", "soccer ball", "balloon", "wrapped gift", "light bulb", "camera", "alarm clock", "helicopter", "castle",
    "trophy", "gem stone",
)  # fmt: skip
MEDIUM_KINDS = {"single": 1.0}


@dataclass(frozen=True)
class Size:
    """The settings that differ between the sizes.

    Args:
        sides: pixels of square images, level by level.
        num_scales: how many of `SCALES` there are.
        judge_width: number of channels of the judge's first layer.
        semantic, pixel, text: settings of the semantic encoder's, the tokenizer's and the backbone's config.
        vocabulary: largest number of text tokens.
    """

    name: str
    sides: tuple[int, ...]
    num_scales: int
    judge_width: int
    semantic: dict
    pixel: dict
    text: dict
    vocabulary: int


SMALL = Size(
    name="small",
    sides=(64,),
    num_scales=SMALL_SCALES,
    judge_width=24,
    semantic={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    pixel={
        "codebook_size": 1024,
        "semantic_code_dim": 16,
        "pixel_code_dim": 16,
        "pixel_encoder_type": "patch",
        "pixel_channels": 192,
        "pixel_num_res_blocks": 2,
        "pixel_decoder_channels": 256,
        "pixel_decoder_num_res_blocks": 3,
        "semantic_decoder_depth": 1,
        "semantic_decoder_heads": 4,
        "semantic_decoder_hidden_size": 128,
    },
    text={
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1] * 16},
    },
    vocabulary=640,
)
MEDIUM = replace(
    SMALL,
    name="medium",
    judge_width=32,
    # The decoder sees the whole image; if patches are decoded separately, their edges show.
    pixel=SMALL.pixel
    | {
        "codebook_size": 2048,
        "pixel_decoder_type": "convolutional",
        "pixel_channel_multipliers": (1, 2, 4, 8),
        "pixel_latent_dim": 64,
        "pixel_decoder_channels": 16,
        "pixel_decoder_num_res_blocks": 1,
    },
    vocabulary=1024,
)
# It takes 46 MiB with the parts that decide about codes in float32 and the rest in bfloat16.
FULL = Size(
    name="full",
    sides=(64, 128),
    num_scales=len(SCALES),
    judge_width=64,
    semantic={"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6},
    pixel={
        "codebook_size": 4096,
        "semantic_code_dim": 24,
        "pixel_code_dim": 16,
        "pixel_encoder_type": "convolutional",
        "pixel_channels": 32,
        "pixel_channel_multipliers": (1, 2, 2, 3),
        "pixel_num_res_blocks": 2,
        "pixel_latent_dim": 128,
        "pixel_decoder_channels": 64,
        "pixel_decoder_num_res_blocks": 2,
        "semantic_decoder_depth": 1,
        "semantic_decoder_heads": 4,
        "semantic_decoder_hidden_size": 192,
    },
    text={
        "hidden_size": 320,
        "intermediate_size": 768,
        "num_hidden_layers": 9,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1] * 16},
    },
    vocabulary=3072,
)
SIZES = {size.name: size for size in (SMALL, MEDIUM, FULL)}


def world_of(size: Size, art: Art | Path | str, side: int | None = None) -> World:
    """Returns the world of a size at a resolution (default: its largest), without `KEPT_STYLE` and `KEPT_CONCEPT`."""
    art = art if isinstance(art, Art) else Art(art)
    side = side or size.sides[-1]
    if size is FULL:
        styles = tuple(style for style in art.styles if style != KEPT_STYLE)
        concepts = tuple(key for key, concept in art.concepts.items() if concept.name != KEPT_CONCEPT)
        return World(art, side, PATCH_SIZE, RATIOS, concepts, styles)
    keys = {concept.name: key for key, concept in art.concepts.items()}
    names, kinds = (SMALL_CONCEPTS, SMALL_KINDS) if size is SMALL else (MEDIUM_CONCEPTS, MEDIUM_KINDS)
    concepts = tuple(keys[name] for name in names if name in keys)
    styles = tuple(style for style in SMALL_STYLES if style in art.styles)
    return World(art, side, PATCH_SIZE, concepts=concepts, styles=styles, kinds=kinds, plain=True)


def tokenizer_config(size: Size) -> NextFlowVQConfig:
    """Returns a tokenizer of the paper's kind: two branches, area down, bicubic up, a level for each resolution."""
    scales = SCALES[: size.num_scales]
    counts = {64: SMALL_SCALES, 128: len(SCALES)}
    return NextFlowVQConfig(
        semantic_config={
            "model_type": "siglip_vision_model",
            "image_size": size.sides[-1],
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
            **size.semantic,
        },
        patch_size=PATCH_SIZE,
        scales=scales,
        levels=[[side, counts[side]] for side in size.sides],
        normalize_codes=False,
        semantic_target_dim=SEMANTIC_DIM,
        **size.pixel,
    )


def text_config(size: Size, tokenizer) -> Qwen2_5_VLTextConfig:
    """Returns the backbone's config, with a vocabulary for the words of the tokenizer."""
    return Qwen2_5_VLTextConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size.text,
    )
