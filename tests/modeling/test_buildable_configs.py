"""A config that cannot be built is refused when it is made, by the name of what is wrong."""

import copy

import pytest
import torch
from tiny import tiny_config, tiny_text_config, tiny_vq_config
from tiny_onecat import tiny_onecat_config
from tiny_tokenflow_t2i import tiny_t2i_config
from transformers import Qwen2Config

from transformers_nextflow import (
    BitwiseVQConfig,
    NextFlowForConditionalGeneration,
    NextFlowVQConfig,
    NextFlowVQModel,
    OneCatConfig,
    OneCatForConditionalGeneration,
)


VALUES = (-1, 0, 3, 24, 7.5, float("nan"), "x", True, [], [3], {}, None)
VQ = tiny_vq_config().to_dict()
OWN = [name for name in VQ if name in vars(NextFlowVQConfig)["__annotations__"]]
KINDS = {
    "patch": {"pixel_encoder_type": "patch"},
    "convolutional": {"pixel_encoder_type": "convolutional", "pixel_channel_multipliers": [1, 2, 2]},
    "both": {"pixel_decoder_type": "convolutional", "pixel_channel_multipliers": [1, 2, 2]},
}
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "patch_size")


def buildable(model_class, values: dict) -> bool:
    """Whether a model's config is made; if it is, so is the model."""
    try:
        config = model_class.config_class(**values)
    except ValueError:
        return False
    with torch.device("meta"):
        model_class(config)
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN)
def test_a_tokenizers_config_is_refused_or_built(kind, name):
    for value in VALUES:
        buildable(NextFlowVQModel, VQ | KINDS[kind] | {name: value})


@pytest.mark.parametrize("name", TOWER)
def test_a_towers_config_is_refused_or_built(name):
    for value in VALUES:
        tower = VQ["semantic_config"] | {name: value}
        buildable(NextFlowVQModel, VQ | {"semantic_config": tower})


@pytest.mark.parametrize("name", tiny_text_config())
def test_a_backbones_config_is_refused_or_built(name):
    config = tiny_config().to_dict()
    values = {key: config[key] for key in config if key not in ("model_type", "transformers_version")}
    for value in VALUES:
        changed = copy.deepcopy(values)
        changed["text_config"][name] = value
        buildable(NextFlowForConditionalGeneration, changed)


OWN_FIELDS = {"": OneCatConfig, "vq_config": BitwiseVQConfig, "text_config": Qwen2Config}


@pytest.mark.parametrize("part", OWN_FIELDS)
def test_a_config_of_onecat_is_refused_or_built(part):
    values = tiny_onecat_config().to_dict()
    values = {key: values[key] for key in values if key not in ("model_type", "transformers_version")}
    own = values[part] if part else values
    for name in own.keys() & (
        tiny_text_config() if part == "text_config" else vars(OWN_FIELDS[part])["__annotations__"]
    ):
        for value in (-1, 0, 7.5, "x", [3]):
            changed = copy.deepcopy(values)
            (changed[part] if part else changed)[name] = value
            buildable(OneCatForConditionalGeneration, changed)
    assert buildable(OneCatForConditionalGeneration, values)


def test_a_backbone_of_tokenflow_t2i_that_cannot_be_built_is_refused():
    for name, value in (("num_attention_heads", 0), ("rope_parameters", {"rope_type": "default", "rope_theta": "x"})):
        with pytest.raises(ValueError, match=f"text_config.{name}|cannot be created from these values"):
            tiny_t2i_config(text_config={name: value})


def test_what_may_be_built_is_built():
    assert buildable(NextFlowVQModel, VQ)
    assert buildable(NextFlowVQModel, VQ | KINDS["convolutional"] | {"pixel_channels": 32})
    assert not buildable(NextFlowVQModel, VQ | KINDS["convolutional"] | {"pixel_channels": 48})


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (tiny_config, {"image_token_id": 10**9}, "image_token_id"),
        (tiny_vq_config, {"patch_size": 0}, "patch_size"),
        (tiny_t2i_config, {"qk_norm_eps": -1.0}, "qk_norm_eps must be positive"),
        (tiny_onecat_config, {"drawing_frequencies": "float16"}, "drawing_frequencies must be one of"),
        (tiny_onecat_config, {"vq_config": {"code_bits": 100}}, "code_bits"),
    ],
)
def test_values_given_beside_a_file_are_looked_at_as_those_in_it(make, value, message, tmp_path):
    config = make()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        type(config).from_pretrained(tmp_path, **value)
