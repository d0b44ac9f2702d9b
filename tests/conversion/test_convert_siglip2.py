"""SigLIP2 NaFlex and SigLIP to the semantic encoder of a vision tokenizer."""

import pytest
import torch
import typer
from safetensors import SafetensorError
from tiny import tiny_vq_config
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.cli import errors_in_one_line
from transformers_nextflow.conversion import siglip2 as conversion_siglip2
from transformers_nextflow.conversion.siglip2 import convert_siglip2


TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
KINDS = {
    "siglip2": (Siglip2Model, Siglip2Config, {"num_patches": 16}),
    "siglip": (SiglipModel, SiglipConfig, {"image_size": 16}),
}


def save_siglip(folder, kind, vision_alone=False):
    model_class, config_class, size = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(text_config=TEXT, vision_config=VISION | size)).eval()
    if vision_alone:
        tower = type(model.vision_model)(model.config.vision_config)
        tower.load_state_dict(model.vision_model.state_dict())
        tower.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    return model.vision_model


def features_of(tower, kind, pixels):
    """What transformers' own tower makes of (1, 3, H, W), with its patches cut out one by one."""
    if kind == "siglip":
        return tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    rows, columns = pixels.shape[2] // 4, pixels.shape[3] // 4
    patches = [
        pixels[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].permute(0, 2, 3, 1).flatten(1)
        for i in range(rows)
        for j in range(columns)
    ]
    mask, shapes = torch.ones(1, rows * columns, dtype=torch.long), torch.tensor([[rows, columns]])
    return tower(torch.stack(patches, 1), pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state


@pytest.mark.parametrize("vision_alone", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_features_are_those_of_transformers_own_model(kind, vision_alone, tmp_path):
    tower = save_siglip(tmp_path / "siglip", kind, vision_alone)
    convert_siglip2(tmp_path / "siglip", tmp_path / "tokenizer", tiny_vq_config(), base_model="google/siglip")
    model = NextFlowVQModel.from_pretrained(tmp_path / "tokenizer")
    pixels = torch.rand(1, 3, 12, 20) * 2 - 1
    assert torch.equal(model.encode_semantics(pixels, (3, 5)).flatten(1, 2), features_of(tower, kind, pixels))
    assert model.config.semantic_target_dim == 24
    assert "base_model: google/siglip" in (tmp_path / "tokenizer" / "README.md").read_text()


def test_another_model_or_a_damaged_one_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "siglip"
    save_siglip(folder, "siglip")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="'clip', not siglip2 or siglip"):
        convert_siglip2(folder, tmp_path / "out", tiny_vq_config())
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match="missing: semantic_encoder.encoder.layers.2"):
        convert_siglip2(folder, tmp_path / "out", tiny_vq_config())
    (folder / "config.json").write_text(config)
    encode = NextFlowVQModel.encode_semantics
    monkeypatch.setattr(
        conversion_siglip2.NextFlowVQModel, "encode_semantics", lambda *args: encode(*args) + torch.rand(1)
    )
    with pytest.raises(ValueError, match="other features"):
        convert_siglip2(folder, tmp_path / "out", tiny_vq_config())
    assert [path.name for path in tmp_path.iterdir()] == ["siglip"]


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def full(self, folder):
        raise SafetensorError("No space left on device (os error 28)")

    save_siglip(tmp_path / "siglip", "siglip")
    monkeypatch.setattr(NextFlowVQModel, "save_pretrained", full)
    with pytest.raises(typer.Exit), errors_in_one_line():
        convert_siglip2(tmp_path / "siglip", tmp_path / "tokenizer", tiny_vq_config())
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: No space left on device")
    assert not (tmp_path / "tokenizer").exists()
