"""Converts a SigLIP2 NaFlex or SigLIP to the semantic encoder of a new vision tokenizer (paper, section 2.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from ..configuration_nextflow import NextFlowVQConfig
from ..modeling_nextflow_vq import NextFlowVQModel
from .checkpoints import (
    KeyMap,
    check_repository,
    check_state,
    config_errors,
    new_folder,
    open_checkpoint,
    read_config,
    write_model_card,
)


TOWER_TYPES = ("siglip2", "siglip")
VISION_TYPES = ("siglip2_vision_model", "siglip_vision_model")
# The grid of the image with which the written encoder is compared with its source.
CHECKED_GRID = (4, 6)
# The pooling head is not read. The first row is the layout with both towers, the others that of only the vision tower.
SIGLIP_KEYS = KeyMap(
    {
        "vision_model.*": "semantic_encoder.*",
        "embeddings.*": "semantic_encoder.embeddings.*",
        "encoder.*": "semantic_encoder.encoder.*",
        "post_layernorm.*": "semantic_encoder.post_layernorm.*",
    },
    dropped=["text_model.*", "logit_scale", "logit_bias", "vision_model.head.*", "head.*"],
)

CARD = """\
A vision tokenizer for NextFlow ([arXiv 2601.02204](https://arxiv.org/abs/2601.02204)) whose semantic encoder is that of
`{source}`. Its other parts are new: it is to be trained before it encodes or decodes anything.

```python
from transformers_nextflow import NextFlowVQModel

model = NextFlowVQModel.from_pretrained("{name}")
```
"""


def convert_siglip2(
    source: Path | str,
    output: Path | str,
    vq_config: NextFlowVQConfig | None = None,
    base_model: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a new vision tokenizer whose semantic encoder is a SigLIP2's or a SigLIP's vision tower, in float32.

    Args:
        source: folder of the model, with both towers or only the vision tower.
        output: folder to make.
        vq_config: config of the tokenizer; its `semantic_config` and `semantic_target_dim` are replaced by the
            source's. Default: that of the large tokenizer.
        base_model: repository of the source on the Hub, for the model card.
        seed: seed of the new weights.

    Raises:
        ValueError: if the source is another model, its files are damaged or incomplete, or the written encoder's
            features are not the source's; then there is no `output`.
    """
    check_repository(base_model)
    source, output = Path(source), Path(output)
    config = (vq_config or NextFlowVQConfig(levels=[[256, 12], [512, 16], [1024, 18]])).to_dict()
    vision_config = read_vision_config(source)
    config |= {"semantic_config": vision_config, "semantic_target_dim": vision_config["hidden_size"]}
    state = SIGLIP_KEYS.forward(open_checkpoint(source))
    with torch.random.fork_rng(devices=[]), config_errors(source):
        torch.manual_seed(seed)
        model = NextFlowVQModel(NextFlowVQConfig.from_dict(config)).eval()
    expected = {key: value for key, value in model.state_dict().items() if key.startswith("semantic_encoder.")}
    check_state(state, expected)
    model.load_state_dict(state, strict=False)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        text = CARD.format(source=base_model or source.name, name=output.name)
        write_model_card(folder, source, output.name, text, base_model, pipeline_tag="image-feature-extraction")
        check_features(source, folder)
    return output


def read_vision_config(folder: Path) -> dict:
    """The vision tower's config, without its pooling head. Raises `ValueError` for another model."""
    config = read_config(folder, *TOWER_TYPES, *VISION_TYPES)
    if config["model_type"] in TOWER_TYPES:
        # Missing values of a config are the defaults of its own class.
        with config_errors(folder):
            config = AutoConfig.from_pretrained(folder).vision_config.to_dict()
    return config | {"vision_use_head": False}


@torch.no_grad()
def check_features(source: Path, tokenizer: Path):
    """Raises `ValueError` if a tokenizer's semantic features are not those of the model that it was converted from."""
    model = NextFlowVQModel.from_pretrained(tokenizer)
    generator = torch.Generator().manual_seed(0)
    size = [cells * model.config.patch_size for cells in CHECKED_GRID]
    pixels = torch.rand(1, 3, *size, generator=generator) * 2 - 1
    features = model.encode_semantics(pixels, CHECKED_GRID)
    original = AutoModel.from_pretrained(source, dtype=torch.float32)
    model.semantic_encoder = getattr(original, "vision_model", original).eval()
    if not torch.equal(features, model.encode_semantics(pixels, CHECKED_GRID)):
        raise ValueError(f"The converted encoder gives other features than {source}; do its config and weights fit?")
