"""Converts OneCAT and Infinity's tokenizer from their released layout to `OneCatForConditionalGeneration` and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config

from ..onecat.configuration_onecat import BitwiseVQConfig, OneCatConfig
from ..onecat.image_processing_onecat import OneCatImageProcessor
from ..onecat.modeling_bitwise_vq import BitwiseVQModel
from ..onecat.modeling_onecat import OneCatForConditionalGeneration
from ..onecat.processing_onecat import OneCatProcessor
from ..utils.checkpoint_checks import loading_errors
from ..utils.folder_parts import local_part
from ..utils.short_repr import short_repr
from .checkpoints import (
    KeyMap,
    State,
    check_repository,
    check_state,
    check_written,
    fingerprint,
    new_folder,
    open_checkpoint,
    open_exported,
    read_config,
    read_state_dict,
    widest_dtype,
    write_model_card,
    write_shards,
)
from .text_tokenizers import read_tokenizer


KEYS = KeyMap(
    {
        "patch_language_model.model.embed_tokens.weight": "language_model.embed_tokens.weight",
        "patch_language_model.model.layers.*.mlp_ge.*_proj.base_layer.weight": (
            "language_model.layers.*.mlp_ge.*_proj.weight"
        ),
        "patch_language_model.model.layers.*.mlp_ge.*_proj.lora_A.default.weight": (
            "language_model.layers.*.mlp_ge.*_proj.adapter_in"
        ),
        "patch_language_model.model.layers.*.mlp_ge.*_proj.lora_B.default.weight": (
            "language_model.layers.*.mlp_ge.*_proj.adapter_out"
        ),
        "patch_language_model.model.layers.*": "language_model.layers.*",
        "patch_language_model.model.norm.weight": "language_model.norm.weight",
        "patch_language_model.lm_head.weight": "lm_head.weight",
        "mlp.*": "reader.projector.*",
        "patch_vision_model.embeddings.*": "reader.*",
        "image_gen_projector.mlp.*": "connector.*",
        "image_gen_out_projector.mlp.*": "visual_head.*",
        "sos_embedding.weight": "first_feature.weight",
        "lvl_embed.weight": "scale_embedding.weight",
    },
    # The tokenizer has a separate file, and frequencies follow from the config.
    dropped=["vae_local.*", "*.rotary_emb.inv_freq"],
)
# Each layer is wrapped in the released file; files of other tools may have it without.
WRAPPED = {
    **{f"*.{name}.norm.*": f"*.{name}.*" for name in ("norm1", "norm2", "norm_out")},
    **{f"*.{name}.conv.*": f"*.{name}.*" for name in ("conv1", "conv2", "nin_shortcut", "conv_in", "conv_out")},
    **{f"*.{name}.conv.conv.*": f"*.{name}.*" for name in ("downsample", "upsample")},
}
VQ_KEYS = KeyMap(
    WRAPPED | {f"*.{name}.conv.*": f"*.{name}.*" for name in ("downsample", "upsample")} | {"*": "*"},
    # A buffer of constants, under its name and under an alias.
    dropped=["quantizer.lfq.mask", "quantize.lfq.mask"],
)
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
# Values of the released config that decide about the architecture; with others it would be another model.
FIXED_FIELDS = {"model_type": "onecat", "downsample_ratio": 0.5, "template": "onecat"}
FIXED_TEXT_FIELDS = {
    "architectures": ["Qwen2ForCausalLM"], "rope_scaling": None, "use_sliding_window": False, "hidden_act": "silu",
}  # fmt: skip
VISION_TOKENIZER = "infinity_vae_d32reg.pth"
CARD = """
OneCAT-3B, with Infinity's vision tokenizer, in the form of transformers-nextflow: it draws at 512 and 1024 pixels,
edits, reads images and answers. **Not yet verified on the released weights.**

```python
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("THIS FOLDER", dtype="bfloat16").to("cuda")
pipe("A lighthouse on a cliff at dawn, photograph.").images[0].save("image.png")
```

Weights are those of the source, bit for bit; only their names changed. The vision tokenizer is part of the model; it is
Infinity's, under the MIT licence.
"""


def onecat_config(released: dict, vq_config: BitwiseVQConfig, **token_ids: int) -> OneCatConfig:
    """The released config and the tokenizers' → ours. Raises `ValueError` if they do not fit."""
    text, reader = released.get("llm_config"), released.get("patch_vision_config")
    if not isinstance(text, dict) or not isinstance(reader, dict):
        raise ValueError("The config has no llm_config and patch_vision_config; is it the released config of OneCAT?")
    for given, fixed, place in ((released, FIXED_FIELDS, ""), (text, FIXED_TEXT_FIELDS, "llm_config.")):
        for name, expected in fixed.items():
            if given.get(name, expected) != expected:
                raise ValueError(f"The config says {place}{name}={given[name]!r}; OneCAT has {expected!r}.")
    if missing := [name for name in TEXT_FIELDS if name != "hidden_act" and name not in text]:
        raise ValueError(f"llm_config lacks {missing}; is it the released one?")
    if released.get("vae_embed_dim") != vq_config.code_bits:
        raise ValueError(
            f"The model draws codes of {released.get('vae_embed_dim')} bits (vae_embed_dim), but the vision tokenizer "
            f"has {vq_config.code_bits}; use {VISION_TOKENIZER}."
        )
    # transformers writes the second form since its version 5.
    given = text.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(
            f"The config says rope_parameters={short_repr(given)}, which is not a mapping of names to values."
        )
    rope = {"rope_type": "default", "rope_theta": text.get("rope_theta", 10000.0)} | given
    if rope["rope_type"] != "default":
        raise ValueError(f"The config says rope_type={rope['rope_type']!r}; OneCAT has 'default'.")
    try:
        return OneCatConfig(
            text_config={name: text[name] for name in TEXT_FIELDS if name in text} | {"rope_parameters": rope},
            vq_config=vq_config,
            reader_hidden_size=reader.get("hidden_size", 3200),
            reader_image_size=reader.get("image_size", 224),
            reader_patch_size=reader.get("patch_size", 14),
            # The released scripts cast the frequencies to bfloat16 with the model.
            drawing_frequencies="bfloat16",
            released_config=released,
            **token_ids,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"The config does not describe a OneCAT: {error}") from error


def released_config(config: OneCatConfig) -> dict:
    """The inverse of `onecat_config`: the config from which a model was converted, or for other models the known
    values.
    """
    text = {name: getattr(config.text_config, name) for name in TEXT_FIELDS}
    text |= FIXED_TEXT_FIELDS | {"rope_theta": config.text_config.rope_parameters["rope_theta"]}
    reader = {name: getattr(config, f"reader_{name}") for name in ("hidden_size", "image_size", "patch_size")}
    values = {"architectures": ["OneCatVLModel"], "llm_config": text, "patch_vision_config": reader}
    return config.released_config or FIXED_FIELDS | values | {"vae_embed_dim": config.vq_config.code_bits}


def read_vision_tokenizer(file: Path) -> tuple[BitwiseVQConfig, State]:
    """Config and weights, under our names, of Infinity's tokenizer.

    Raises:
        ValueError: if the file is damaged, holds no tokenizer of this kind, or tensors are missing, surplus, misshapen
            or not finite.
    """
    found = read_state_dict(file)
    state = found.get("vae") if isinstance(found, dict) else None
    tensors = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors):
        raise ValueError(f'{file} has no tensors under the key "vae"; use {VISION_TOKENIZER} of Infinity.')
    state = VQ_KEYS.forward(state)
    config = bitwise_vq_config(state, file)
    with torch.device("meta"):
        check_state(state, BitwiseVQModel(config).state_dict())
    return config, state


def bitwise_vq_config(state: State, source: Path | str = "the file") -> BitwiseVQConfig:
    """The config of a tokenizer, from the shapes of its weights."""
    try:
        levels = 1 + max(int(match[1]) for name in state if (match := re.match(r"encoder\.down\.(\d+)\.", name)))
        blocks = 1 + max(int(m[1]) for name in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name)))
        channels = len(state["encoder.conv_in.weight"])
        widths = [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)]
        bits = len(state["encoder.conv_out.weight"])
        multipliers = [width // channels for width in widths]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else f"its tensors tell no sizes ({error})"
        raise ValueError(f"{source} is not a vision tokenizer of Infinity's kind: {lacks}.") from error
    return BitwiseVQConfig(
        code_bits=bits, channels=channels, num_res_blocks=blocks,
        channel_multipliers=multipliers,
        # 16 pixels a cell are what OneCAT's levels are made for.
        levels=[[32 * 2 ** (levels - 1), 10], [64 * 2 ** (levels - 1), 13]],
    )  # fmt: skip


def expected_layout(config: OneCatConfig) -> State:
    """Names and shapes of the model's tensors, as meta tensors."""
    with torch.device("meta"):
        return OneCatForConditionalGeneration(config).state_dict()


def convert_onecat(
    source: Path, vision_tokenizer: Path, target: Path, max_shard_size: str = "2GB", base_model: str | None = None
):
    """Write the converted model, its processor and its card to `target`.

    Raises:
        ValueError: if source, vision tokenizer, text tokenizer and config do not fit together, tensors are missing,
            surplus, misshapen or not finite, or files are damaged. Then nothing is left behind.
    """
    check_repository(base_model)
    source_config, released = read_config(source, FIXED_FIELDS["model_type"]), open_checkpoint(source)
    vq_config, vq_state = read_vision_tokenizer(vision_tokenizer)
    processor = make_processor(source, vq_config)
    config = onecat_config(
        source_config,
        vq_config,
        image_token_id=processor.image_token_id,
        reference_token_id=processor.reference_token_id,
    )
    processor.check_fits(config)
    # Also checks for two names of one tensor.
    renamed = KEYS.forward(released.layout)
    names = {ours: key for key in released if (ours := KEYS.forward_key(key)) is not None}
    layout = renamed | {f"vq_model.{name}": tensor.to("meta") for name, tensor in vq_state.items()}
    check_state(layout, expected_layout(config))
    config.dtype = widest_dtype(renamed.values())

    def make(name: str) -> torch.Tensor:
        return released[names[name]] if name in names else vq_state[name.removeprefix("vq_model.")]

    file = vision_tokenizer.stat()
    plan = {
        "source": fingerprint(source),
        "vision_tokenizer": [vision_tokenizer.name, file.st_size, file.st_mtime_ns],
        "max_shard_size": max_shard_size,
    }
    with new_folder(target, plan) as folder:
        write_shards(folder, layout, make, max_shard_size)
        config.architectures = [OneCatForConditionalGeneration.__name__]
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        end = processor.end_token_id
        GenerationConfig(eos_token_id=end, pad_token_id=end, max_new_tokens=1000).save_pretrained(folder)
        write_model_card(
            folder, source, "OneCAT", CARD, base_model, "any-to-any", tags=["onecat"],
            prompts=["A lighthouse on a cliff at dawn, photograph.", "A cat that reads a newspaper."],
        )  # fmt: skip
        check_written(folder, layout, make)


def export_onecat(source: Path, target: Path, max_shard_size: str = "2GB"):
    """Write a converted model to `target` in the released layout: the model as safetensors, with the text tokenizer's
    files, and the vision tokenizer as `infinity_vae_d32reg.pth`.

    Raises:
        ValueError: if tensors are missing, surplus, misshapen or not finite, there are adapters beside them, or files
            are damaged; nothing is left.
    """
    source = local_part("model", source)
    if "released_config" not in read_config(source, OneCatConfig.model_type):
        raise ValueError(f"{source} is a released OneCAT already, not a converted one.")
    config, ours = OneCatConfig.from_pretrained(source), open_exported(source)
    if config.drawing_only:
        raise ValueError(
            f"{source} was saved with drawing_only=True and has no weights for reading and writing text; convert "
            "it again."
        )
    check_state(ours.layout, expected_layout(config))
    with loading_errors(source):
        tokenizer = OneCatProcessor.from_pretrained(local_part("processor", source)).tokenizer
    sources = {KEYS.inverse_key(key): key for key in ours if not key.startswith("vq_model.")}
    layout = {name: ours.layout[key] for name, key in sources.items()}
    vq_names = {VQ_KEYS.inverse_key(key.removeprefix("vq_model.")): key for key in ours if key.startswith("vq_model.")}

    def make(name: str) -> torch.Tensor:
        return ours[sources[name]]

    plan = {"source": fingerprint(source), "max_shard_size": max_shard_size}
    with new_folder(target, plan) as folder:
        write_shards(folder, layout, make, max_shard_size)
        torch.save({"vae": {name: ours[key] for name, key in vq_names.items()}}, folder / VISION_TOKENIZER)
        (folder / "config.json").write_text(json.dumps(released_config(config), indent=2) + "\n")
        tokenizer.save_pretrained(folder)
        check_written(folder, layout, make)


def make_processor(source: Path, vq_config: BitwiseVQConfig) -> OneCatProcessor:
    """The processor of the released text tokenizer. Raises `ValueError` if it lacks one of OneCAT's tokens."""
    levels = [list(level) for level in vq_config.levels]
    image_processor = OneCatImageProcessor(patch_size=vq_config.patch_size, levels=levels)
    return OneCatProcessor(image_processor, read_tokenizer(source, Qwen2Config()))
