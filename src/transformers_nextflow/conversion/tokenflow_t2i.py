"""Converts TokenFlow-t2i from its released layout to `TokenFlowT2IForConditionalGeneration` and back; only names
change.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from ..configuration_nextflow import NextFlowVQConfig
from ..image_processing_nextflow import NextFlowImageProcessor
from ..tokenflow_t2i.configuration_tokenflow_t2i import TokenFlowT2IConfig
from ..tokenflow_t2i.modeling_tokenflow_t2i import TokenFlowT2IForConditionalGeneration
from ..tokenflow_t2i.processing_tokenflow_t2i import TokenFlowT2IProcessor
from ..utils.checkpoint_checks import loading_errors
from ..utils.folder_parts import local_part
from .checkpoints import (
    KeyMap,
    ShardedCheckpoint,
    check_repository,
    check_state,
    check_written,
    fingerprint,
    new_folder,
    open_checkpoint,
    open_exported,
    read_config,
    read_vq_config,
    widest_dtype,
    write_model_card,
    write_shards,
)
from .text_tokenizers import read_tokenizer
from .tokenflow import check_is_tokenflow


KEYS = KeyMap(
    {
        "model.embed_tokens.weight": "language_model.embed_tokens.weight",
        "model.layers.*.self_attn.qknorm.query_norm.weight": "language_model.layers.*.self_attn.q_norm.weight",
        "model.layers.*.self_attn.qknorm.key_norm.weight": "language_model.layers.*.self_attn.k_norm.weight",
        "model.layers.*": "language_model.layers.*",
        "model.norm.weight": "language_model.norm.weight",
        "model.mm_projector.*": "connector.*",
        "model.lvl_embed.weight": "scale_embedding.weight",
        "model.pos_1LC": "position_embedding",
        "lm_head.weight": "lm_head.weight",
    },
    # The first two are buffers that follow from the vocabulary, the last one follows from the config.
    dropped=["image_token_start", "image_token_end", "*.rotary_emb.inv_freq"],
)
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id",
)  # fmt: skip
# Values of the released config that decide about the architecture; with others it would be another model.
FIXED_FIELDS = {
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_vq_token": True,
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
VISION_TOKENIZER = "tokenflow_clipb_32k_enhanced.pt"
POSITIONS = "model.pos_1LC"
# The released tokenizer may hold the codes as tokens after its own.
CODE_TOKEN = re.compile(r"<vq_token_\d+>")
CARD = """
Text to image, scale by scale: TokenFlow-t2i (arXiv 2412.03069) in the form of transformers-nextflow.

```python
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("THIS FOLDER", dtype="bfloat16").to("cuda")
flaws = "lowres, blurry, jpeg artifacts, watermark, cropped"
pipe("An elephant walking under the sea.", negative_prompt=flaws).images[0].save("image.png")
```

The released script always gives a negative prompt that lists flaws. Weights are those of the source, bit for bit; only
their names changed. The vision tokenizer is part of the model.
"""


def t2i_config(released: dict, vq_config: NextFlowVQConfig) -> TokenFlowT2IConfig:
    """The released config and the vision tokenizer's → ours. Raises `ValueError` if they do not fit."""
    for name, expected in FIXED_FIELDS.items():
        if released.get(name, expected) != expected:
            raise ValueError(f"The config says {name}={released[name]!r}; TokenFlow-t2i has {expected!r}.")
    check_is_tokenflow(vq_config)
    size = released.get("vq_codebook_size", vq_config.codebook_size)
    if size != vq_config.codebook_size:
        raise ValueError(f"The model draws with {size} codes, but the vision tokenizer has {vq_config.codebook_size}.")
    missing = [name for name in TEXT_FIELDS if name not in released]
    if missing:
        raise ValueError(f"The config lacks {missing}; is it the released one?")
    # transformers writes the second form since its version 5.
    rope = {"rope_type": "default", "rope_theta": released.get("rope_theta", 10000.0)}
    rope |= released.get("rope_parameters") or {}
    if rope["rope_type"] != "default":
        raise ValueError(f"The config says rope_type={rope['rope_type']!r}; TokenFlow-t2i has 'default'.")
    text = {name: released[name] for name in TEXT_FIELDS} | {"rope_parameters": rope}
    try:
        # The codes were added to the vocabulary last.
        start = text["vocab_size"] - size
        return TokenFlowT2IConfig(
            text_config=text, vq_config=vq_config, image_token_start=start, released_config=released
        )
    except ValueError as error:
        raise ValueError(f"The config does not describe a TokenFlow-t2i: {error}") from error


def released_config(config: TokenFlowT2IConfig) -> dict:
    """The inverse of `t2i_config`: the config from which a model was converted, or for other models the known
    values.
    """
    text = {name: getattr(config.text_config, name) for name in TEXT_FIELDS}
    theta = config.text_config.rope_parameters["rope_theta"]
    values = FIXED_FIELDS | text | {"rope_theta": theta, "vq_codebook_size": config.vq_config.codebook_size}
    return config.released_config or values


def vision_tokenizer_config(folder: Path) -> NextFlowVQConfig:
    """The config of a vision tokenizer's folder. Otherwise raises a `ValueError` that says how to make such a
    folder.
    """
    how = f"conversion/convert_tokenflow.py {VISION_TOKENIZER} FOLDER --interpolate makes one"
    if folder.is_file():
        raise ValueError(f"--vision-tokenizer {folder} is a file, but has to be a folder; {how}.")
    try:
        return read_vq_config(folder)
    except ValueError as error:
        raise ValueError(f"--vision-tokenizer is none: {error} {how}.") from error


def check_codes(released: ShardedCheckpoint, config: TokenFlowT2IConfig):
    """Raises `ValueError` if the model's codes of an image differ in number from those of the vision tokenizer."""
    if POSITIONS in released and len(released.layout[POSITIONS]) != config.schedule.num_tokens:
        height, width = config.image_size
        raise ValueError(
            f"The model's images have {len(released.layout[POSITIONS])} codes, those of the vision tokenizer "
            f"{config.schedule.num_tokens} ({height} x {width} pixels); convert {VISION_TOKENIZER} with --interpolate."
        )
    stop = config.image_token_start + config.vq_config.codebook_size
    for name, token in (("image_token_start", config.image_token_start), ("image_token_end", stop - 1)):
        if name in released and released[name].flatten().tolist() != [token]:
            raise ValueError(
                f"The file says {name}={released[name].tolist()}, but by the config the codes are the tokens "
                f"{config.image_token_start} to {stop - 1}; do they belong together?"
            )


def expected_layout(config: TokenFlowT2IConfig) -> dict[str, torch.Tensor]:
    """Names and shapes of the model's tensors, as meta tensors."""
    with torch.device("meta"):
        return TokenFlowT2IForConditionalGeneration(config).state_dict()


def convert_tokenflow_t2i(
    source: Path, vq_folder: Path, target: Path, max_shard_size: str = "2GB", base_model: str | None = None
):
    """Write the converted model, its processor and its card to `target`.

    Raises:
        ValueError: if source, vision tokenizer and config do not fit together, tensors are missing, surplus, misshapen
            or not finite, or files are damaged. Then nothing is left behind.
    """
    check_repository(base_model)
    vq_config = vision_tokenizer_config(vq_folder)
    released, vq_model = open_checkpoint(source), ShardedCheckpoint(vq_folder)
    config = t2i_config(read_config(source, FIXED_FIELDS["model_type"]), vq_config)
    check_codes(released, config)
    sources = {ours: (released, key) for key in released if (ours := KEYS.forward_key(key)) is not None}
    sources |= {f"vq_model.{key}": (vq_model, key) for key in vq_model}
    layout = {name: checkpoint.layout[key] for name, (checkpoint, key) in sources.items()}
    check_state(layout, expected_layout(config))
    config.dtype = widest_dtype(tensor for name, tensor in layout.items() if not name.startswith("vq_model."))
    processor = make_processor(source, config)

    def make(name: str) -> torch.Tensor:
        checkpoint, key = sources[name]
        return checkpoint[key]

    plan = {
        "source": fingerprint(source),
        "vision_tokenizer": fingerprint(vq_folder),
        "max_shard_size": max_shard_size,
    }
    with new_folder(target, plan) as folder:
        write_shards(folder, layout, make, max_shard_size)
        config.architectures = [TokenFlowT2IForConditionalGeneration.__name__]
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_model_card(
            folder, source, "TokenFlow-t2i", CARD, base_model, "text-to-image", tags=["tokenflow"],
            prompts=["An elephant walking under the sea.", "A portrait of a woman."],
        )  # fmt: skip
        check_written(folder, layout, make)


def export_tokenflow_t2i(source: Path, target: Path, max_shard_size: str = "2GB"):
    """Write a converted model to `target` in the released layout, as safetensors, with the text tokenizer's files.

    Raises:
        ValueError: if tensors are missing, surplus, misshapen or not finite, there are adapters beside them, or files
            are damaged; nothing is left.
    """
    source = local_part("model", source)
    read_config(source, TokenFlowT2IConfig.model_type)
    config, ours = TokenFlowT2IConfig.from_pretrained(source), open_exported(source)
    check_state(ours.layout, expected_layout(config))
    with loading_errors(source):
        tokenizer = TokenFlowT2IProcessor.from_pretrained(local_part("processor", source)).tokenizer
    sources = {KEYS.inverse_key(key): key for key in ours if not key.startswith("vq_model.")}
    layout = {name: ours.layout[key] for name, key in sources.items()}

    def make(name: str) -> torch.Tensor:
        return ours[sources[name]]

    plan = {"source": fingerprint(source), "max_shard_size": max_shard_size}
    with new_folder(target, plan) as folder:
        write_shards(folder, layout, make, max_shard_size)
        (folder / "config.json").write_text(json.dumps(released_config(config), indent=2) + "\n")
        tokenizer.save_pretrained(folder)
        check_written(folder, layout, make)


def make_processor(source: Path, config: TokenFlowT2IConfig) -> TokenFlowT2IProcessor:
    """The processor of the released text tokenizer, whose padding token is added when it is loaded.

    Raises:
        ValueError: if a text token has the id of a code.
    """
    tokenizer = read_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    start = config.image_token_start
    text = {token: row for token, row in tokenizer.get_vocab().items() if not CODE_TOKEN.fullmatch(token)}
    last = max(text, key=text.get)
    if text[last] >= start:
        raise ValueError(
            f"{last!r} is token {text[last]} of the tokenizer in {source}, but the codes begin at {start}; do they "
            "belong together?"
        )
    vq = config.vq_config
    image_processor = NextFlowImageProcessor(scales=vq.scales, patch_size=vq.patch_size, levels=vq.levels)
    return TokenFlowT2IProcessor(image_processor, tokenizer)
