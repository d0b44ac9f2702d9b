"""Converts TokenFlow's tokenizers (arXiv 2412.03069) to `NextFlowVQModel` and back: configs, key table, checks.

A state is a dict name → tensor; "released" means the layout of TokenFlow's files; see `docs/conversion_tokenflow.md`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from ..configuration_nextflow import NextFlowVQConfig
from ..modeling_nextflow_vq import NextFlowVQModel
from ..utils.atomic_files import atomic_write
from .checkpoints import (
    KeyMap,
    State,
    check_repository,
    check_state,
    new_folder,
    read_config,
    read_state_dict,
    write_model_card,
)


CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"

# Settings that do not follow from the tensors, and the widths of the released files.
TOKENIZERS = {
    "clipb_224": {
        "semantic_config": {
            "model_type": CLIP,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "scales": (1, 2, 4, 6, 8, 10, 12, 14),
        "pixel_decoder_channels": 256,
        "pixel_decoder_num_res_blocks": 5,
        "semantic_decoder_hidden_size": 768,
        "semantic_target_dim": 512,
    },
    "siglip_384": {
        "semantic_config": {
            "model_type": SIGLIP,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        "semantic_layer": -2,
        "image_size": 384,
        "scales": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
        "semantic_decoder_hidden_size": 1152,
        "semantic_target_dim": 1152,
    },
}
COMMON = {
    "patch_size": 16,
    "downsample": "area",
    "upsample": "bicubic",
    "normalize_codes": True,
    "semantic_decoder_hidden_act": "gelu",
    "semantic_decoder_positions": "learned",
}
# The CLIP tokenizer at 256 pixels has one more scale, and interpolated positions.
INTERPOLATED_SIDE = 16

_CLIP_LAYERS, _TOWER_LAYERS = "encoder_vqkd.transformer.resblocks.*", "semantic_encoder.encoder.layers.*"

# Released → NextFlow, for the keys that both kinds share; `key_map` adds the others. The first row that matches is
# used.
KEYS = {
    "quant_conv.*": "pixel_encoder.output_projection.*",
    "post_quant_conv.*": "pixel_decoder.input_projection.*",
    "encode_task_layer.*": "semantic_projection.*",
    "decode_task_layer.*": "semantic_decoder.output_projection.*",
    "quantize.embedding_vqkd.weight": "quantizer.semantic_codebook.weight",
    "quantize.embedding_vqgan.weight": "quantizer.pixel_codebook.weight",
    "decoder_vqkd.cls_token": "semantic_decoder.positions.class_token",
    "decoder_vqkd.pos_embed": "semantic_decoder.positions.positions",
    "decoder_vqkd.patch_embed.proj.*": "semantic_decoder.input_projection.*",
    "decoder_vqkd.fc_norm.*": "semantic_decoder.norm.*",
    "decoder_vqkd.blocks.*.norm*.*": "semantic_decoder.encoder.layers.*.layer_norm*.*",
    "decoder_vqkd.blocks.*.mlp.*": "semantic_decoder.encoder.layers.*.mlp.*",
    "decoder_vqkd.blocks.*.attn.proj.*": "semantic_decoder.encoder.layers.*.self_attn.out_proj.*",
    "decoder_vqkd.blocks.*.attn.*.*": "semantic_decoder.encoder.layers.*.self_attn.*_proj.*",
}
TOWER_KEYS = {
    SIGLIP: {"encoder_vqkd.vision_model.*": "semantic_encoder.*"},
    CLIP: {
        "encoder_vqkd.class_embedding": "semantic_encoder.embeddings.class_embedding",
        "encoder_vqkd.positional_embedding": "semantic_encoder.embeddings.position_embedding.weight",
        "encoder_vqkd.conv1.*": "semantic_encoder.embeddings.patch_embedding.*",
        "encoder_vqkd.ln_pre.*": "semantic_encoder.pre_layrnorm.*",
        "encoder_vqkd.ln_post.*": "semantic_encoder.post_layernorm.*",
        f"{_CLIP_LAYERS}.ln_*.*": f"{_TOWER_LAYERS}.layer_norm*.*",
        f"{_CLIP_LAYERS}.mlp.c_fc.*": f"{_TOWER_LAYERS}.mlp.fc1.*",
        f"{_CLIP_LAYERS}.mlp.c_proj.*": f"{_TOWER_LAYERS}.mlp.fc2.*",
        f"{_CLIP_LAYERS}.attn.out_proj.*": f"{_TOWER_LAYERS}.self_attn.out_proj.*",
        f"{_CLIP_LAYERS}.attn.*.*": f"{_TOWER_LAYERS}.self_attn.*_proj.*",
    },
}
ATTENTION_KEYS = {
    "q.*": "query.*",
    "k.*": "key.*",
    "v.*": "value.*",
    "proj_out.*": "output.*",
}


# --- Configs ------------------------------------------------------------------------------------------------------


def tokenflow_config(name: str, **values) -> NextFlowVQConfig:
    """The config of a released tokenizer, "clipb_224" (the enhanced one), "clipb_256" or "siglip_384".

    Args:
        values: fields with other values; `semantic_config` holds those of the tower.

    Raises:
        ValueError: for another name.
    """
    names = [*TOKENIZERS, "clipb_256"]
    if name not in names:
        raise ValueError(f"TokenFlow has the tokenizers {names}, got {name!r}.")
    preset = COMMON | TOKENIZERS["clipb_224" if name == "clipb_256" else name]
    tower = dict(preset["semantic_config"])
    if name == "clipb_256":
        preset["scales"] = (*preset["scales"], INTERPOLATED_SIDE)
        tower["image_size"] = 256
    return NextFlowVQConfig(**(preset | values | {"semantic_config": tower | values.get("semantic_config", {})}))


def config_of(
    released: Mapping[str, torch.Tensor], semantic_heads: int | None = None, semantic_decoder_heads: int | None = None
) -> NextFlowVQConfig:
    """The config of a released state: its kind and widths are read from the shapes.

    Args:
        semantic_heads, semantic_decoder_heads: numbers of attention heads, which do not follow from shapes; default:
            those of the releases.

    Raises:
        ValueError: if a tensor that gives a width is missing or has another number of dimensions.
    """

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in released or released[key].ndim != dimensions:
            found = f"has shape {tuple(released[key].shape)}" if key in released else "is missing"
            raise ValueError(f"{key!r} {found}, {dimensions} dimensions expected; is this a tokenizer of TokenFlow?")
        return released[key].shape

    def count(pattern: str) -> int:
        indices = (re.match(pattern, key) for key in released)
        return 1 + max((int(match[1]) for match in indices if match), default=-1)

    siglip = any(key.startswith("encoder_vqkd.vision_model.") for key in released)
    positions = shape("decoder_vqkd.pos_embed", 3)[1] - 1
    name = "siglip_384" if siglip else "clipb_256" if positions == INTERPOLATED_SIDE**2 else "clipb_224"
    tower, layers, mlp = "encoder_vqkd.", r"transformer\.resblocks", "transformer.resblocks.0.mlp.c_fc.weight"
    if siglip:
        tower, layers, mlp = "encoder_vqkd.vision_model.", r"encoder\.layers", "encoder.layers.0.mlp.fc1.weight"
    intermediate_size, hidden_size = shape(tower + mlp, 2)
    semantic = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": count(rf"{re.escape(tower)}{layers}\.(\d+)\."),
    }
    channels, levels = shape("encoder.conv_in.weight", 4)[0], count(r"encoder\.conv_blocks\.(\d+)\.")
    widths = [shape(f"encoder.conv_blocks.{level}.res.0.conv2.weight", 4)[0] for level in range(levels)]
    if any(width % channels for width in widths):
        raise ValueError(f"The widths {widths} of the pixel encoder are not multiples of the first, {channels}.")
    codebook_size, semantic_code_dim = shape("quantize.embedding_vqkd.weight", 2)
    values = {
        "codebook_size": codebook_size,
        "semantic_code_dim": semantic_code_dim,
        "pixel_code_dim": shape("quantize.embedding_vqgan.weight", 2)[1],
        "pixel_channels": channels,
        "pixel_channel_multipliers": [width // channels for width in widths],
        "pixel_num_res_blocks": count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "pixel_latent_dim": shape("quant_conv.weight", 4)[1],
        "pixel_decoder_channels": shape("decoder.conv_out.weight", 4)[1],
        "pixel_decoder_num_res_blocks": count(r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
        "semantic_decoder_depth": count(r"decoder_vqkd\.blocks\.(\d+)\."),
        "semantic_decoder_hidden_size": shape("decoder_vqkd.fc_norm.weight", 1)[0],
        "semantic_target_dim": shape("decode_task_layer.2.weight", 2)[0],
    }
    for option, heads in (("semantic_heads", semantic_heads), ("semantic_decoder_heads", semantic_decoder_heads)):
        if heads is not None and heads < 1:
            raise ValueError(f"{option} must be at least 1, got {heads}.")
    if semantic_heads is not None:
        semantic["num_attention_heads"] = semantic_heads
    if semantic_decoder_heads is not None:
        values["semantic_decoder_heads"] = semantic_decoder_heads
    try:
        return tokenflow_config(name, semantic_config=semantic, **values)
    except ValueError as error:
        raise ValueError(f"The widths in the file do not fit together: {error}") from error


def empty_model(config: NextFlowVQConfig) -> NextFlowVQModel:
    """A model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return NextFlowVQModel(config)


# --- Keys ---------------------------------------------------------------------------------------------------------


def key_map(config: NextFlowVQConfig) -> KeyMap:
    """The table released → NextFlow, after `split_attention` and before `join_attention`.

    Raises:
        ValueError: if the model has parts that TokenFlow does not have.
    """
    check_is_tokenflow(config)
    table = KEYS | TOWER_KEYS[config.semantic_config.model_type]
    levels = len(config.pixel_channel_multipliers)
    branches = {
        "encoder": _encoder_blocks(levels, config.pixel_num_res_blocks),
        "decoder": _decoder_blocks(levels, config.pixel_decoder_num_res_blocks),
    }
    for branch, blocks in branches.items():
        for index, block in enumerate(blocks):
            rows = ATTENTION_KEYS if ".attn." in block or block == "mid.1" else {"nin_shortcut.*": "shortcut.*"}
            for source, target in (rows | {"*": "*"}).items():
                table[f"{branch}.{block}.{source}"] = f"pixel_{branch}.layers.{index}.{target}"
    return KeyMap(table, dropped=_restored(config))


def check_is_tokenflow(config: NextFlowVQConfig):
    """Raises `ValueError`, naming the differences, for a tokenizer with parts that TokenFlow does not have."""
    wanted = COMMON | {"pixel_encoder_type": "convolutional", "pixel_decoder_type": None}
    wrong = {name: getattr(config, name) for name, value in wanted.items() if getattr(config, name) != value}
    if config.semantic_config.model_type not in TOWER_KEYS:
        wrong["semantic_config.model_type"] = config.semantic_config.model_type
    if wrong:
        raise ValueError(f"Only TokenFlow's own kind of tokenizer has TokenFlow's layout; this one differs in {wrong}.")


def _encoder_blocks(levels: int, num_res_blocks: int) -> list[str]:
    """Released names of `ConvolutionalEncoder.layers` in order; those without tensors are empty."""
    blocks = ["conv_in"]
    for level in range(levels):
        for block in range(num_res_blocks):
            lowest = level == levels - 1
            blocks += [f"conv_blocks.{level}.res.{block}"] + [f"conv_blocks.{level}.attn.{block}"] * lowest
        if not lowest:
            blocks += ["", f"conv_blocks.{level}.downsample.conv"]
    return [*blocks, "mid.0", "mid.1", "mid.2", "norm_out", "", "conv_out"]


def _decoder_blocks(levels: int, num_res_blocks: int) -> list[str]:
    """Released names of `ConvolutionalDecoder.layers` in order; those without tensors are empty."""
    blocks = ["conv_in", "mid.0", "mid.1", "mid.2"]
    for level in range(levels):
        for block in range(num_res_blocks):
            blocks += [f"conv_blocks.{level}.res.{block}"] + [f"conv_blocks.{level}.attn.{block}"] * (level == 0)
        if level < levels - 1:
            blocks += ["", f"conv_blocks.{level}.upsample.conv"]
    return [*blocks, "norm_out", "", "conv_out"]


SCALING = {"scaling_layer.shift", "scaling_layer.scale"}


def _restored(config: NextFlowVQConfig) -> State:
    """Released tensors that our tokenizer does not have: a statistic of the training, and constants."""
    restored = {"quantize.codebook_used": torch.zeros(131072)}
    if config.semantic_config.model_type == SIGLIP:
        restored |= {name: torch.full((1, 3, 1, 1), 0.5) for name in sorted(SCALING)}
    return restored


# --- States -------------------------------------------------------------------------------------------------------

_FUSED = re.compile(r"((?:encoder|decoder)_vqkd\..+\.attn\.)(?:in_proj_|qkv\.)(weight|bias)")
_BIAS = re.compile(r"(decoder_vqkd\..+\.attn\.)([qv])_bias")
_SPLIT = re.compile(r"((?:encoder|decoder)_vqkd\..+\.attn\.)([qkv])\.(weight|bias)")
_CELL_PROJECTION = "decoder_vqkd.patch_embed.proj.weight"


def from_tokenflow(released: Mapping[str, torch.Tensor], config: NextFlowVQConfig) -> State:
    """The state of a `NextFlowVQModel`, in float32, from a released state.

    Raises:
        ValueError: naming the tensors that are missing, not expected, misshapen or not finite.
    """
    restored = _restored(config)
    for name in restored.keys() & released.keys() & SCALING:
        if not torch.equal(released[name].float(), restored[name]):
            raise ValueError(f"{name} is {released[name].flatten().tolist()}; TokenFlow's images are scaled by 0.5.")
    released = {name: tensor for name, tensor in released.items() if name not in restored}
    expected = to_tokenflow(empty_model(config).state_dict(), config)
    check_state(released, {name: expected[name] for name in expected if name not in restored})
    return {name: tensor.float() for name, tensor in key_map(config).forward(split_attention(released)).items()}


def to_tokenflow(state: Mapping[str, torch.Tensor], config: NextFlowVQConfig) -> State:
    """A `NextFlowVQModel`'s state in the released layout, with the tensors that `from_tokenflow` leaves out; also for
    meta tensors.

    Raises:
        ValueError: if the model has parts that TokenFlow has not.
    """
    return join_attention(key_map(config).inverse(state)) | _restored(config)


def split_attention(released: Mapping[str, torch.Tensor]) -> State:
    """Splits queries, keys and values, each with weight and bias, as in transformers."""
    state: State = {}
    for name, tensor in released.items():
        if match := _FUSED.fullmatch(name):
            state |= {f"{match[1]}{part}.{match[2]}": rows for part, rows in zip("qkv", tensor.chunk(3))}
        elif match := _BIAS.fullmatch(name):
            state[f"{match[1]}{match[2]}.bias"] = tensor
            # TokenFlow's keys have no bias.
            state.setdefault(f"{match[1]}k.bias", torch.zeros_like(tensor))
        else:
            # TokenFlow has a 1x1 convolution in place of our linear layer.
            state[name] = tensor.flatten(1) if name == _CELL_PROJECTION else tensor
    return state


def join_attention(state: Mapping[str, torch.Tensor]) -> State:
    """The inverse of `split_attention`. The bias of the decoder's keys is dropped, since it shifts all scores of a
    query equally.
    """
    released: State = {}
    for name, tensor in state.items():
        match = _SPLIT.fullmatch(name)
        if match is None:
            released[name] = tensor[..., None, None] if name == _CELL_PROJECTION else tensor
            continue
        prefix, part, kind = match.groups()
        in_decoder = prefix.startswith("decoder_vqkd.")
        if in_decoder and kind == "bias":
            if part != "k":
                released[f"{prefix}{part}_bias"] = tensor
        elif part == "q":
            fused = f"{prefix}qkv.{kind}" if in_decoder else f"{prefix}in_proj_{kind}"
            released[fused] = torch.cat([state[f"{prefix}{each}.{kind}"] for each in "qkv"])
    return released


def interpolate_positions(released: Mapping[str, torch.Tensor], side: int = INTERPOLATED_SIDE) -> State:
    """A released state of CLIP's tokenizer with positions for another grid, as TokenFlow interpolates them.

    Raises:
        ValueError: if the state has no learned positions of CLIP, or has them for that grid already.
    """
    tables = ("encoder_vqkd.positional_embedding", "decoder_vqkd.pos_embed")
    if any(name not in released for name in tables):
        raise ValueError("Only positions of the clipb tokenizer are interpolated; this file is not one.")
    state = dict(released)
    for name in tables:
        # (1 + n*n, D), the class token's first; in the decoder with one more dimension of size one.
        table = state[name].reshape(-1, state[name].shape[-1])
        old = math.isqrt(len(table) - 1)
        if old == side:
            raise ValueError(f"The positions are those of {side} x {side} cells already; leave the interpolation out.")
        grid = table[1:].T.reshape(1, -1, old, old)
        # By a slightly larger factor, and not to a size, which gives other positions.
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic", align_corners=False)
        table = torch.cat([table[:1], grid.flatten(2)[0].T])
        state[name] = table.reshape(*state[name].shape[:-2], *table.shape)
    return state


# --- Files --------------------------------------------------------------------------------------------------------


def read_tokenflow(path: Path | str) -> State:
    """The tensors of a released file: its averaged weights (`ema`) if it has them, else `model`.

    Raises:
        ValueError: if the file is damaged, holds code, or holds no tokenizer.
    """
    content = read_state_dict(path, allowed=[argparse.Namespace])
    state = (content.get("ema") or content.get("model")) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no tensors under 'ema' or 'model'; is it a tokenizer of TokenFlow?")
    return dict(state)


def load_tokenflow(
    path: Path | str,
    interpolate: bool = False,
    semantic_heads: int | None = None,
    semantic_decoder_heads: int | None = None,
) -> NextFlowVQModel:
    """A released file as a model, in float32.

    Args:
        path: `tokenflow_siglip_32k.pt`, `tokenflow_clipb_32k_enhanced.pt`, or one of their layout.
        interpolate: only for clipb: images of 256 pixels in place of 224, with interpolated positions.
        semantic_heads, semantic_decoder_heads: numbers of attention heads, which do not follow from shapes; default:
            those of the releases.

    Raises:
        ValueError: for a file that is damaged, holds code, or whose tensors do not fit.
    """
    released = read_tokenflow(path)
    # Checked before the interpolation, which needs complete tables.
    config = config_of(released, semantic_heads, semantic_decoder_heads)
    state = from_tokenflow(released, config)
    if interpolate:
        released = interpolate_positions(released)
        config = config_of(released, semantic_heads, semantic_decoder_heads)
        state = from_tokenflow(released, config)
    return NextFlowVQModel.from_pretrained(None, config=config, state_dict=state).eval()


def convert_tokenflow(source: Path | str, target: Path | str, base_model: str | None = None, **options):
    """Write a released file as a folder of `NextFlowVQModel`, and read it back.

    Args:
        options: arguments of `load_tokenflow`.
        base_model: repository of the source, for the card.

    Raises:
        ValueError: for a file that is damaged, holds code, or whose tensors do not fit, or a target that exists
            already; then nothing is written.
    """
    check_repository(base_model)
    model = load_tokenflow(source, **options)
    size = model.config.image_size or model.config.scale_schedules.resolutions[-1]
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        write_model_card(
            folder,
            source,
            title="A tokenizer of TokenFlow for transformers-nextflow",
            text=CARD.format(size=size, codes=model.config.scale_schedules.build().num_tokens),
            base_model=base_model,
            pipeline_tag="image-feature-extraction",
            tags=["tokenflow", "image-tokenizer"],
        )
        check_equal(NextFlowVQModel.from_pretrained(folder).state_dict(), model.state_dict())


CARD = """Converted from TokenFlow (arXiv 2412.03069). Images of {size} x {size} pixels become {codes} codes.

```python
from transformers_nextflow import NextFlowVQModel

model = NextFlowVQModel.from_pretrained("this folder").eval()
codes = model.encode(pixel_values).image_tokens  # pixel_values (B, 3, {size}, {size}) in [-1, 1]
pixels = model.decode(codes, model.schedule_of(pixel_values))
```
"""


def export_tokenflow(source: Path | str, target: Path | str):
    """Write a folder of `NextFlowVQModel` as a file of the released layout, and read it back.

    Raises:
        ValueError: if the source is no folder of a tokenizer, the model has parts that TokenFlow does not have, or the
            target exists already.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} already exists; remove it or choose another file.")
    read_config(source, NextFlowVQConfig.model_type)
    model = NextFlowVQModel.from_pretrained(source)
    released = to_tokenflow(model.state_dict(), model.config)
    _check_layout_is_lossless(model.config, released)
    with atomic_write(target) as partial:
        torch.save({"model": {name: tensor.contiguous() for name, tensor in released.items()}}, partial)
        check_equal(read_tokenflow(partial), released)


def _check_layout_is_lossless(config: NextFlowVQConfig, released: State):
    """Raises `ValueError` naming settings of a tokenizer that would be lost in the released layout."""
    own = _settings(config)
    read = _settings(config_of(released, config.semantic_config.num_attention_heads, config.semantic_decoder_heads))
    lost = {name: value for name, value in own.items() if read[name] != value}
    if lost:
        raise ValueError(f"TokenFlow's layout cannot store {lost}: the file would be read as another tokenizer.")


def _settings(config: NextFlowVQConfig) -> dict:
    """The settings on which, besides its weights, a tokenizer's results depend."""
    own = NextFlowVQConfig.__annotations__.keys() - {"semantic_config", "commitment_weight", "initializer_range"}
    tower = TOKENIZERS["clipb_224"]["semantic_config"]
    values = {name: getattr(config, name) for name in sorted(own)}
    values |= {f"semantic_config.{name}": getattr(config.semantic_config, name) for name in tower}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_equal(written: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]):
    """Raises `ValueError` naming tensors that differ in any bit."""
    check_state(written, expected)
    different = [name for name in expected if not torch.equal(written[name], expected[name])]
    if different:
        raise ValueError(f"What was written differs from its source in {different}; check the disk.")
