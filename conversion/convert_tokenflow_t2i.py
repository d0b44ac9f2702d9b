"""TokenFlow-t2i as it was released, to a folder that `NextFlowPipeline.from_pretrained` draws with; and back.

    python conversion/convert_tokenflow_t2i.py TokenFlow-t2i tokenflow-t2i --vision-tokenizer tokenflow-clipb-256
    python conversion/convert_tokenflow_t2i.py tokenflow-t2i TokenFlow-t2i-again --back

`--vision-tokenizer` is what `convert_tokenflow.py … --interpolate` made of `tokenflow_clipb_32k_enhanced.pt`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from transformers_nextflow import (
    NextFlowImageProcessorPil,
    NextFlowVQConfig,
    TokenFlowT2IConfig,
    TokenFlowT2IForConditionalGeneration,
    TokenFlowT2IProcessor,
)
from transformers_nextflow.checkpoint_conversion import (
    KeyMap,
    ShardedCheckpoint,
    check_state,
    check_written,
    fingerprint,
    new_folder,
    read_state_dict,
    write_model_card,
    write_shards,
)
from transformers_nextflow.cli import errors_in_one_line


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
# What the released config says of the architecture; with other values this would be another model.
FIXED_FIELDS = {
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_vq_token": True,
    "attention_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CARD = """
Text to picture, scale by scale: TokenFlow-t2i (arXiv 2412.03069) in the form of transformers-nextflow.

```python
from transformers_nextflow import NextFlowPipeline

pipe = NextFlowPipeline.from_pretrained("THIS FOLDER", dtype="bfloat16").to("cuda")
pipe("An elephant walking under the sea.").images[0].save("picture.png")
```

Weights are those of the source, bit for bit; only their names changed. The vision tokenizer is part of the model.
"""


class PickledShards(Mapping):
    """The tensors of a folder with `pytorch_model.bin`, or with shards and their index; one file in memory at a time.

    Raises:
        ValueError: if files are missing or hold more than tensors, or the index and the files disagree.
    """

    def __init__(self, folder: Path):
        names, index = [PICKLE], None
        if (folder / PICKLE_INDEX).is_file():
            index = json.loads((folder / PICKLE_INDEX).read_text()).get("weight_map", {})
            names = sorted(set(index.values()))
        self.folder, self.files, self.layout = folder, {}, {}
        self._loaded: tuple[str, dict] = ("", {})
        for name in names:
            state = self._load(name)
            if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
                raise ValueError(f"{folder / name} holds more than tensors; is it a shard of the released model?")
            self.files |= dict.fromkeys(state, name)
            self.layout |= {key: tensor.to("meta") for key, tensor in state.items()}
        if index is not None and index != self.files:
            wrong = sorted(set(index.items()) ^ set(self.files.items()))
            raise ValueError(f"{PICKLE_INDEX} and the files of {folder} disagree on {wrong[0][0]!r}; fetch both again.")

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        if self._loaded[0] != name:
            self._loaded = ("", {})
            self._loaded = (name, read_state_dict(self.folder / name))
        return self._loaded[1]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._load(self.files[key])[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def read_config(path: Path, vq_config: NextFlowVQConfig) -> TokenFlowT2IConfig:
    """The released `config.json` and the vision tokenizer's config → ours. Raises `ValueError` if they do not fit."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}; the released folder has one.")
    released = json.loads(path.read_text())
    for name, expected in FIXED_FIELDS.items():
        if released.get(name, expected) != expected:
            raise ValueError(f"{path} says {name}={released[name]!r}; TokenFlow-t2i has {expected!r}.")
    size = released.get("vq_codebook_size", vq_config.codebook_size)
    if size != vq_config.codebook_size:
        raise ValueError(f"The model draws with {size} codes, but the vision tokenizer has {vq_config.codebook_size}.")
    missing = [name for name in TEXT_FIELDS if name not in released]
    if missing:
        raise ValueError(f"{path} lacks {missing}; is it the released config?")
    text = {name: released[name] for name in TEXT_FIELDS}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": released.get("rope_theta", 10000.0)}
    try:
        # The codes were added to the vocabulary last.
        return TokenFlowT2IConfig(text_config=text, vq_config=vq_config, image_token_start=text["vocab_size"] - size)
    except StrictDataclassError as error:
        raise ValueError(f"{path} does not describe a TokenFlow-t2i: {error}") from error


def released_config(config: TokenFlowT2IConfig) -> dict:
    """The inverse of `read_config`: the fields of the released `config.json`."""
    text = {name: getattr(config.text_config, name) for name in TEXT_FIELDS}
    theta = config.text_config.rope_parameters["rope_theta"]
    return FIXED_FIELDS | text | {"rope_theta": theta, "vq_codebook_size": config.vq_config.codebook_size}


def open_released(folder: Path) -> ShardedCheckpoint | PickledShards:
    """The tensors of the released folder, in either form."""
    is_pickled = (folder / PICKLE).is_file() or (folder / PICKLE_INDEX).is_file()
    return PickledShards(folder) if is_pickled else ShardedCheckpoint(folder)


def expected_layout(config: TokenFlowT2IConfig) -> dict[str, torch.Tensor]:
    """Names and shapes of the model's tensors, as meta tensors."""
    with torch.device("meta"):
        return TokenFlowT2IForConditionalGeneration(config).state_dict()


def convert(source: Path, vq_folder: Path, target: Path, max_shard_size: str = "2GB", base_model: str | None = None):
    """Write the converted model, its processor and its card to `target`.

    Raises:
        ValueError: if source, vision tokenizer and config do not fit together, tensors are missing, surplus, misshapen
            or not finite, or files are damaged. Nothing is left then.
    """
    released, vq_model = open_released(source), ShardedCheckpoint(vq_folder)
    config = read_config(source / "config.json", NextFlowVQConfig.from_pretrained(vq_folder))
    for name, start in (("image_token_start", 0), ("image_token_end", config.vq_config.codebook_size - 1)):
        if name in released and int(released[name]) != config.image_token_start + start:
            raise ValueError(
                f"The file says {name}={int(released[name])}, but the codes begin at {config.image_token_start} by "
                "the config; do they belong together?"
            )
    sources = {ours: (released, key) for key in released if (ours := KEYS.forward_key(key)) is not None}
    sources |= {f"vq_model.{key}": (vq_model, key) for key in vq_model}
    layout = {name: checkpoint.layout[key] for name, (checkpoint, key) in sources.items()}
    check_state(layout, expected_layout(config))
    config.dtype = layout["lm_head.weight"].dtype
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


def convert_back(source: Path, target: Path, max_shard_size: str = "2GB"):
    """Write a converted model to `target` in the released layout, as safetensors, with the text tokenizer's files.

    Raises:
        ValueError: if tensors are missing, surplus, misshapen or not finite, or files are damaged; nothing is left.
    """
    config, ours = TokenFlowT2IConfig.from_pretrained(source), ShardedCheckpoint(source)
    check_state(ours.layout, expected_layout(config))
    sources = {KEYS.inverse_key(key): key for key in ours if not key.startswith("vq_model.")}
    layout = {name: ours.layout[key] for name, key in sources.items()}

    def make(name: str) -> torch.Tensor:
        return ours[sources[name]]

    plan = {"source": fingerprint(source), "max_shard_size": max_shard_size}
    with new_folder(target, plan) as folder:
        write_shards(folder, layout, make, max_shard_size)
        (folder / "config.json").write_text(json.dumps(released_config(config), indent=2) + "\n")
        TokenFlowT2IProcessor.from_pretrained(source).tokenizer.save_pretrained(folder)
        check_written(folder, layout, make)


def make_processor(source: Path, config: TokenFlowT2IConfig) -> TokenFlowT2IProcessor:
    """The processor of the released text tokenizer, whose padding token is added when it is loaded."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    vq = config.vq_config
    image_processor = NextFlowImageProcessorPil(scales=vq.scales, patch_size=vq.patch_size, levels=vq.levels)
    return TokenFlowT2IProcessor(image_processor, tokenizer)


def main(
    source: Annotated[Path, typer.Argument(help="The released folder; with --back a converted one.")],
    output: Annotated[Path, typer.Argument(help="Folder that is made.")],
    vision_tokenizer: Annotated[Path | None, typer.Option(help="Folder of the converted vision tokenizer.")] = None,
    back: Annotated[bool, typer.Option("--back", help="Write the released layout again.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Repository of the source, for the model card.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "2GB",
):
    """Convert TokenFlow-t2i. Run it again to go on after an interruption."""
    with errors_in_one_line():
        if back:
            convert_back(source, output, max_shard_size)
        elif vision_tokenizer is None:
            raise ValueError("Give --vision-tokenizer, the folder of the converted vision tokenizer.")
        else:
            convert(source, vision_tokenizer, output, max_shard_size, base_model)
    typer.echo(f"Written and checked: {output}")


if __name__ == "__main__":
    typer.run(main)
