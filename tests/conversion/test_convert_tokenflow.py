"""TokenFlow's tokenizers: the originals' own outputs, the slow reference, layouts, round trips, damaged files."""

import argparse
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from reference_tokenflow import (
    pixel_features,
    pixel_reconstruction,
    random_released,
    released_layout,
    semantic_features,
    semantic_reconstruction,
)
from safetensors.torch import load_file
from tiny import tiny_vq_config

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.conversion.tokenflow import (
    config_of,
    convert_tokenflow,
    empty_model,
    export_tokenflow,
    interpolate_positions,
    key_map,
    load_tokenflow,
    read_tokenflow,
    split_attention,
    to_tokenflow,
    tokenflow_config,
)
from transformers_nextflow.vision_tokenizer.multiscale_quantizer import NextFlowVQQuantizer
from transformers_nextflow.vision_tokenizer.semantic_branches import SemanticDecoder


DATA = Path(__file__).parents[1] / "fixtures" / "tokenflow"
CONVERSION = Path(__file__).parents[2] / "conversion"
POSITIONS = {"clipb": 196, "siglip": 729}
HEADS = {"semantic_heads": 2, "semantic_decoder_heads": 2}
# Attention heads of the small checkpoints that the originals' outputs are of.
ORIGINAL_HEADS = {"semantic_heads": 4, "semantic_decoder_heads": 4}
# Widths of the released files as `released_layout` takes them.
RELEASED = {
    "clipb_224": {"kind": "clipb", "tower": 768, "layers": 12, "intermediate": 3072, "positions": 196, "target": 512}
    | {"decoder_channels": 256, "decoder_blocks": 5},
    "siglip_384": {"kind": "siglip", "tower": 1152, "layers": 27, "intermediate": 4304, "positions": 729}
    | {"target": 1152, "decoder_channels": 128, "decoder_blocks": 3},
}
SHARED = {"channels": 128, "multipliers": (1, 1, 2, 2, 4), "encoder_blocks": 2, "latent": 256, "codes": 32768}
SHARED |= {"code_dims": (32, 8), "depth": 3}


def released(kind: str) -> dict[str, torch.Tensor]:
    return random_released(kind, positions=POSITIONS[kind])


def write(path: Path, state, **content) -> Path:
    torch.save({"model": state, "steps": 7, "args": argparse.Namespace(teacher="any")} | content, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("released")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return {kind: write(folder / f"{kind}.pt", released(kind)) for kind in POSITIONS}


def assert_within(actual: torch.Tensor, expected: torch.Tensor):
    """Equal to 1e-4 of the largest value: random layers one after the other let the size of what passes grow."""
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def meta(layout: dict) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in layout.items()}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# --- Outputs ------------------------------------------------------------------------------------------------------


def original(kind: str):
    """Config of the original's small checkpoint, the weights of it that the repository holds, and its outputs."""
    config = config_of(meta(json.loads((DATA / "layouts.json").read_text())[kind]), **ORIGINAL_HEADS)
    data = load_file(DATA / f"{kind}.safetensors")
    weights = {name.removeprefix("weights."): data.pop(name) for name in list(data) if name.startswith("weights.")}
    return config, key_map(config).forward(split_attention(weights)), data


def load_part(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str):
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items() if prefix in name})
    return module.eval()


@pytest.mark.parametrize("kind", POSITIONS)
def test_codes_and_sums_are_the_originals(kind):
    config, state, data = original(kind)
    quantizer = load_part(NextFlowVQQuantizer(config), state, "quantizer.")
    schedule = config.scale_schedules.build()
    semantic = data["semantic_features"].transpose(1, 2).unflatten(2, schedule.final_grid)
    output = quantizer.encode(torch.cat([semantic, data["pixel_features"]], dim=1), schedule)
    assert torch.equal(output.image_tokens, data["indices"].long())
    torch.testing.assert_close(output.features, data["f_hat"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_semantic_features_of_all_scales_and_of_the_first_ones_are_the_originals():
    config, state, data = original("siglip")
    quantizer = load_part(NextFlowVQQuantizer(config), state, "quantizer.")
    decoder = load_part(SemanticDecoder(config), state, "semantic_decoder.")
    schedule = config.scale_schedules.build()
    for name, num_scales in (("semantic_recon", -1), ("prefix_semantic_recon", int(data["prefix_num_scales"]))):
        features = quantizer.decode(data["indices"].long()[:, : schedule.offsets[num_scales]], schedule)
        features = decoder(features[:, : config.semantic_code_dim]).flatten(1, 2)[:, ::81]
        torch.testing.assert_close(features, data[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, interpolate", [("clipb", False), ("clipb", True), ("siglip", False)])
@torch.no_grad()
def test_a_converted_model_equals_the_reference(kind, interpolate, files):
    model, state = load_tokenflow(files[kind], interpolate=interpolate, **HEADS), released(kind)
    size = 384 if kind == "siglip" else 256 if interpolate else 224
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    # The pixel branch of the SigLIP tokenizer works on a grid of 27 cells of 16 pixels.
    resized = torch.nn.functional.interpolate(pixels, (432, 432), mode="bicubic") if kind == "siglip" else pixels
    expected = torch.cat([semantic_features(state, pixels, heads=2), pixel_features(state, resized)], dim=1)
    assert_within(model.encode_latents(pixels), expected)

    schedule = model.schedule_of(pixels)
    codes = model.encode(pixels).image_tokens[:, : schedule.offsets[6]]
    features = model.quantizer.decode(codes, schedule)
    semantic = semantic_reconstruction(state, features[:, :4], heads=2)
    assert_within(model.decode_semantics(features).flatten(1, 2), semantic)
    expected = pixel_reconstruction(state, features[:, 4:])
    if kind == "siglip":
        expected = torch.nn.functional.interpolate(expected, (384, 384), mode="bicubic")
    assert expected.shape == pixels.shape
    assert_within(model.decode_features(features), expected)


# --- Layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_layout_is_that_of_the_originals_checkpoints(kind):
    layout = {name: tuple(shape) for name, shape in json.loads((DATA / "layouts.json").read_text())[kind].items()}
    config = config_of(meta(layout), **ORIGINAL_HEADS)
    assert shapes(to_tokenflow(empty_model(config).state_dict(), config)) == layout


@pytest.mark.parametrize("name, tensors, decoder", [("clipb_224", 649, 237), ("siglip_384", 848, 42)])
def test_configs_of_full_width_have_the_released_tensors(name, tensors, decoder):
    config = tokenflow_config(name)
    model = empty_model(config)
    layout = shapes(to_tokenflow(model.state_dict(), config))
    assert len(layout) == tensors
    assert layout == {key: tuple(shape) for key, shape in released_layout(**(RELEASED[name] | SHARED)).items()}
    # Millions of parameters of the pixel decoder, as TokenFlow tells them.
    assert round(sum(parameter.numel() for parameter in model.pixel_decoder.parameters()) / 1e6) == decoder
    assert config_of(meta(layout)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "name, size, sides",
    [
        ("clipb_224", 224, [1, 2, 4, 6, 8, 10, 12, 14]),
        ("clipb_256", 256, [1, 2, 4, 6, 8, 10, 12, 14, 16]),
        ("siglip_384", 384, [*range(1, 11), 12, 14, 17, 22, 27]),
    ],
)
def test_a_tokenizer_reads_its_own_size_in_its_own_scales(name, size, sides):
    model = empty_model(tokenflow_config(name))
    schedule = model.schedule_of(torch.empty(1, 3, size, size, device="meta"))
    assert schedule.grids == tuple((side, side) for side in sides)


def test_what_the_model_cannot_take_is_refused():
    model = empty_model(tokenflow_config("siglip_384"))
    with pytest.raises(ValueError, match="only images of 384x384 pixels, got 432x432"):
        model.schedule_of(torch.empty(1, 3, 432, 432))
    with pytest.raises(ValueError, match=r"only for the grid \(27, 27\)"):
        model.semantic_decoder.positions(torch.empty(1, 4, 1152), (2, 2))
    with pytest.raises(ValueError, match="tokenizers .*, got 'clipl'"):
        tokenflow_config("clipl")
    config = tiny_vq_config()
    with pytest.raises(ValueError, match="Only TokenFlow's own kind"):
        to_tokenflow(NextFlowVQModel(config).state_dict(), config)


# --- Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POSITIONS)
def test_there_and_back_gives_the_same_file(kind, files, tmp_path, monkeypatch):
    heads = ["--semantic-heads", "2", "--semantic-decoder-heads", "2"]
    for script, *arguments in (
        ["convert_tokenflow.py", files[kind], tmp_path / "model", "--base-model", "someone/tokenizer", *heads],
        ["export_tokenflow.py", tmp_path / "model", tmp_path / "back.pt"],
    ):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(CONVERSION / script), run_name="__main__")
        assert end.value.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pt", "model"]
    before, after = read_tokenflow(files[kind]), read_tokenflow(tmp_path / "back.pt")
    assert before.keys() == after.keys()
    # How often codes were used in the training is not kept.
    assert before["quantize.codebook_used"].any() and not after.pop("quantize.codebook_used").any()
    assert all(torch.equal(before[name], after[name]) for name in after)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "someone/tokenizer" and "tokenflow" in card.data.tags


def test_a_tokenizer_with_interpolated_positions_goes_there_and_back(files, tmp_path):
    convert_tokenflow(files["clipb"], tmp_path / "model", interpolate=True, **HEADS)
    export_tokenflow(tmp_path / "model", tmp_path / "back.pt")
    back = read_tokenflow(tmp_path / "back.pt")
    expected = interpolate_positions(read_tokenflow(files["clipb"]))
    assert math.isqrt(len(back["encoder_vqkd.positional_embedding"]) - 1) == 16
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in back if name != "quantize.codebook_used")
    again = load_tokenflow(tmp_path / "back.pt", **HEADS)
    assert again.config.scale_schedules.sides[-1] == 16
    with pytest.raises(ValueError, match="Only positions of the clipb tokenizer"):
        load_tokenflow(files["siglip"], interpolate=True, **HEADS)


def test_positions_are_interpolated_once(files, tmp_path):
    convert_tokenflow(files["clipb"], tmp_path / "model", interpolate=True, **HEADS)
    export_tokenflow(tmp_path / "model", tmp_path / "back.pt")
    with pytest.raises(ValueError, match="16 x 16 cells already"):
        load_tokenflow(tmp_path / "back.pt", interpolate=True, **HEADS)


@pytest.mark.parametrize(
    "setting",
    [{"downsample": "nearest"}, {"upsample": "rotary"}, {"pixel_distance_weight": 3.0}, {"semantic_layer": -2},
     {"scales": [1, 2, 3, 14]}, {"semantic_decoder_hidden_act": "relu"}],
)  # fmt: skip
def test_a_tokenizer_that_the_layout_cannot_tell_is_not_exported(files, tmp_path, setting):
    convert_tokenflow(files["clipb"], tmp_path / "model", **HEADS)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=f"{next(iter(setting))}"):
        export_tokenflow(tmp_path / "model", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_images_that_are_scaled_otherwise_are_refused(tmp_path):
    state = released("siglip")
    state["scaling_layer.scale"] = torch.full((1, 3, 1, 1), 0.25)
    with pytest.raises(ValueError, match=r"scaling_layer.scale is \[0.25, 0.25, 0.25\]"):
        load_tokenflow(write(tmp_path / "file.pt", state), **HEADS)


def test_what_is_no_tokenizer_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        export_tokenflow(tmp_path / "none", tmp_path / "back.pt")
    (tmp_path / "config.json").write_text('{"model_type": "nextflow"}')
    with pytest.raises(ValueError, match="of type 'nextflow', not nextflow_vq"):
        export_tokenflow(tmp_path, tmp_path / "back.pt")


def test_averaged_weights_come_first(tmp_path):
    state = released("clipb")
    averaged = {name: 2 * tensor for name, tensor in state.items()}
    assert torch.equal(
        read_tokenflow(write(tmp_path / "a.pt", state, ema=averaged))["quant_conv.bias"], 2 * state["quant_conv.bias"]
    )


class Code:
    def __reduce__(self):
        return print, ("this must not be printed",)


def damaged(state: dict[str, torch.Tensor], fault: str) -> dict:
    name = "encoder.conv_blocks.2.res.0.conv1.weight"
    if fault == "missing":
        del state[name]
    elif fault == "missing width":
        del state["quant_conv.weight"]
    elif fault == "extra":
        state["encoder.more.weight"] = torch.zeros(2)
    elif fault == "misshapen":
        state[name] = state[name][:-1]
    elif fault == "integers":
        state["quant_conv.bias"] = state["quant_conv.bias"].long()
    elif fault == "NaN":
        state[name][0, 0, 0, 0] = math.nan
    return state


@pytest.mark.parametrize(
    "fault, message",
    [
        ("missing", "missing: encoder.conv_blocks.2.res.0.conv1.weight"),
        ("missing width", "'quant_conv.weight' is missing"),
        ("extra", "not expected: encoder.more.weight"),
        ("misshapen", "of another shape: encoder.conv_blocks.2.res.0.conv1.weight"),
        ("NaN", "'encoder.conv_blocks.2.res.0.conv1.weight' holds NaN"),
        ("integers", "integers: quant_conv.bias"),
        ("truncated", "is it complete"),
        ("code", "not a pickle of only tensors"),
        ("no tokenizer", "no tensors under 'ema' or 'model'"),
        ("heads", "do not fit together"),
        ("no heads", "semantic_decoder_heads must be at least 1, got 0"),
    ],
)
def test_a_faulty_file_is_refused_and_nothing_is_written(fault, message, tmp_path, capsys):
    path = write(tmp_path / "file.pt", damaged(released("clipb"), fault))
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "code":
        write(path, released("clipb"), args=Code())
    elif fault == "no tokenizer":
        torch.save({"weights": released("clipb")}, path)
    heads = HEADS | {"semantic_decoder_heads": {"heads": 3, "no heads": 0}.get(fault, 2)}
    with pytest.raises(ValueError, match=message):
        convert_tokenflow(path, tmp_path / "model", **heads)
    assert [file.name for file in tmp_path.iterdir()] == ["file.pt"]
    assert "must not be printed" not in capsys.readouterr().out


def test_what_is_there_already_is_kept(files, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "back.pt").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        convert_tokenflow(files["clipb"], tmp_path / "model", **HEADS)
    with pytest.raises(ValueError, match="already exists"):
        export_tokenflow(tmp_path / "model", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_text() == "mine"
