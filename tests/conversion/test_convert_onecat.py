"""The converter of OneCAT on tiny random models in the released layout: there, back, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tiny_onecat import tiny_onecat_model, tiny_onecat_tokenizer

from transformers_nextflow import NextFlowPipeline, OneCatConfig, OneCatForConditionalGeneration
from transformers_nextflow.conversion import onecat as converter
from transformers_nextflow.conversion.onecat import KEYS, VQ_KEYS, expected_layout, onecat_config
from transformers_nextflow.conversion.onecat import convert_onecat as convert
from transformers_nextflow.conversion.onecat import export_onecat as convert_back
from transformers_nextflow.onecat.configuration_onecat import BitwiseVQConfig


sys.path.insert(0, str(Path(__file__).parents[2] / "conversion"))
from convert_onecat import main  # noqa: E402


LEVELS = [[512, 10], [1024, 13]]
VAE = "infinity_vae_d32reg.pth"
# Ours → the released name, spelled out without the converter's table.
PREFIXES = {
    "connector.": "image_gen_projector.mlp.", "visual_head.": "image_gen_out_projector.mlp.",
    "first_feature.": "sos_embedding.", "scale_embedding.": "lvl_embed.", "lm_head.": "patch_language_model.lm_head.",
    "reader.projector.": "mlp.", "reader.": "patch_vision_model.embeddings.",
    "language_model.": "patch_language_model.model.",
}  # fmt: skip
DRAWN = {"adapter_in": "lora_A.default.weight", "adapter_out": "lora_B.default.weight", "weight": "base_layer.weight"}


def released_name(name: str) -> str:
    ours = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    name = PREFIXES[ours] + name.removeprefix(ours)
    if "mlp_ge" in name:
        stem, last = name.rsplit(".", 1)
        name = f"{stem}.{DRAWN[last]}"
    return name


def released_state(model) -> dict[str, torch.Tensor]:
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vq_model.")}
    return {released_name(name): tensor.contiguous() for name, tensor in weights.items()}


def released_vae(model) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in model.vq_model.state_dict().items():
        stem, last = name.rsplit(".", 1)
        inner = "norm" if "norm" in stem.rsplit(".", 1)[1] else "conv"
        stem += ".conv" if "sample" in stem else ""
        state[f"{stem}.{inner}.{last}"] = tensor
    mask = 2 ** torch.arange(7, -1, -1)
    return state | {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask}


def released_config(model) -> dict:
    text = model.config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llm = {name: getattr(text, name) for name in (*names, "num_key_value_heads", "max_position_embeddings")}
    llm |= {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    return {
        "architectures": ["OneCatVLModel"],
        "model_type": "onecat",
        "llm_config": llm | {"use_flex_for_i2t": False, "use_flex_for_t2i": False},
        "patch_vision_config": {"hidden_size": 12, "image_size": 56, "patch_size": 14},
        "downsample_ratio": 0.5,
        "template": "onecat",
        "vae_embed_dim": 8,
    }


@pytest.fixture(scope="module")
def model():
    return tiny_onecat_model(vq_config={"levels": LEVELS}, adapter_rank=64)


def write_released(folder: Path, model, sharded: bool = False, state=None, vae=None, config=None):
    """A folder as the released one, with the vision tokenizer's file in it."""
    folder.mkdir()
    state = released_state(model) if state is None else state
    if sharded:
        names, index = sorted(state), {}
        for number, keys in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({key: state[key].contiguous() for key in keys}, folder / file)
            index |= dict.fromkeys(keys, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(released_config(model) if config is None else config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    torch.save({"vae": released_vae(model) if vae is None else vae, "trainer": {"step": 1}}, folder / VAE)
    tiny_onecat_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_converted_model_is_the_released_one_and_goes_back_to_it(model, tmp_path, sharded):
    surplus = {"vae_local.encoder.conv_in.weight": torch.zeros(1)}  # of which no one knows whether the release has it
    write_released(tmp_path / "released", model, sharded, released_state(model) | surplus)
    convert(tmp_path / "released", tmp_path / "released" / VAE, tmp_path / "ours", max_shard_size="50KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    converted = OneCatForConditionalGeneration.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(converted.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert converted.config.drawing_frequencies == "bfloat16" and converted.generation_config.eos_token_id == 300

    NextFlowPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "pipeline")
    convert_back(tmp_path / "pipeline", tmp_path / "again")
    again, expected = load_file(tmp_path / "again" / "model.safetensors"), released_state(model)
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == released_config(model)
    vae = torch.load(tmp_path / "again" / VAE, weights_only=True)["vae"]
    assert vae.keys() == released_vae(model).keys() - {"quantizer.lfq.mask", "quantize.lfq.mask"}
    convert(tmp_path / "again", tmp_path / "again" / VAE, tmp_path / "twice")
    twice = OneCatForConditionalGeneration.from_pretrained(tmp_path / "twice")
    torch.testing.assert_close(twice.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_tokenizers_file_without_the_wrappers_of_layers_is_the_same(model, tmp_path):
    plain = dict(model.vq_model.state_dict())
    downsampled = {name.replace("sample.", "sample.conv."): tensor for name, tensor in plain.items()}
    write_released(tmp_path / "released", model, vae=downsampled)
    convert(tmp_path / "released", tmp_path / "released" / VAE, tmp_path / "ours")
    converted = OneCatForConditionalGeneration.from_pretrained(tmp_path / "ours").vq_model.state_dict()
    assert all(torch.equal(converted[name], tensor) for name, tensor in plain.items())


def test_the_card_has_licence_base_and_prompts_and_says_what_was_not_verified(model, tmp_path):
    write_released(tmp_path / "released", model)
    convert(tmp_path / "released", tmp_path / "released" / VAE, tmp_path / "ours", base_model="onecat-ai/OneCAT-3B")
    card = (tmp_path / "ours" / "README.md").read_text()
    for line in (
        "license: apache-2.0",
        "base_model: onecat-ai/OneCAT-3B",
        "widget:",
        "Not yet verified on the released",
    ):
        assert line in card
    pipe = NextFlowPipeline.from_pretrained(tmp_path / "ours")
    assert pipe.model.config.vq_config.scale_schedules.resolutions == (512, 1024)


class Killed(BaseException):
    """What no handler catches, as a kill is."""


def test_a_killed_run_goes_on_and_one_from_other_weights_does_not(model, tmp_path, monkeypatch):
    write_released(tmp_path / "released", model)

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(converter, "check_written", killed)
        with pytest.raises(Killed):
            convert(tmp_path / "released", tmp_path / "released" / VAE, tmp_path / "ours", "50KB")
    shard = next((tmp_path / "ours.partial").glob("model-00001-*"))
    written = shard.stat().st_mtime_ns
    (tmp_path / "ours.partial" / ".tmpAbCdEf").write_bytes(b"half of a shard")
    convert(tmp_path / "released", tmp_path / "released" / VAE, tmp_path / "ours", "50KB")
    assert (tmp_path / "ours" / shard.name).stat().st_mtime_ns == written
    assert not list((tmp_path / "ours").glob(".*"))
    (tmp_path / "ours").rename(tmp_path / "ours.partial")
    (tmp_path / "ours.partial" / "conversion.json").write_text(json.dumps({"source": "another"}))
    with pytest.raises(ValueError, match="started from other files"):
        convert(tmp_path / "released", tmp_path / "released" / VAE, tmp_path / "ours", "50KB")


def test_the_assumed_config_gives_the_released_keys_and_shapes_at_full_width():
    layout = expected_layout(OneCatConfig())
    vq = {name.removeprefix("vq_model."): t for name, t in layout.items() if name.startswith("vq_model.")}
    released = KEYS.inverse({name: t for name, t in layout.items() if not name.startswith("vq_model.")})
    assert len(released) == 888 and sum(t.numel() for t in released.values()) == 9_466_916_960
    shapes = {name: tuple(t.shape) for name, t in released.items()}
    layer = "patch_language_model.model.layers.35."
    assert shapes[layer + "mlp_ge.down_proj.lora_A.default.weight"] == (832, 11008)
    assert shapes[layer + "mlp_ge.gate_proj.lora_B.default.weight"] == (11008, 832)
    assert shapes[layer + "self_attn.k_proj.bias"] == (256,) and shapes[layer + "mlp_ue.up_proj.weight"] == (
        11008,
        2048,
    )
    assert shapes["image_gen_out_projector.mlp.2.weight"] == (64, 2048) and shapes["lvl_embed.weight"] == (15, 2048)
    assert shapes["patch_vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    assert set(KEYS.forward(released)) == {name for name in layout if not name.startswith("vq_model.")}
    vq_released = VQ_KEYS.inverse(vq)
    assert "decoder.up.1.upsample.conv.conv.weight" in vq_released
    assert vq_released["encoder.down.1.block.0.nin_shortcut.conv.weight"].shape == (256, 128, 1, 1)
    assert VQ_KEYS.forward(vq_released).keys() == vq.keys()
    assert sum(t.numel() for n, t in vq.items() if n.startswith("encoder")) == pytest.approx(45.0e6, rel=0.01)
    assert sum(t.numel() for n, t in vq.items() if n.startswith("decoder")) == pytest.approx(65.1e6, rel=0.01)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


NORM = "patch_language_model.model.norm.weight"
HEAD = "patch_language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, HEAD), "missing: lm_head.weight"),
        (lambda state: state | {"patch_language_model.model.layers.9.mlp_te.x": torch.zeros(1)}, "not expected"),
        (lambda state: state | {"surprise": torch.zeros(1)}, "no rows? for .*surprise"),
        (lambda state: state | {NORM: torch.zeros(3)}, "of another shape: language_model.norm.weight"),
        (lambda state: state | {NORM: torch.full((32,), torch.nan)}, "NaN"),
        (lambda state: state | {NORM: torch.ones(32, dtype=torch.long)}, "integers: language_model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_written(model, tmp_path, change, message):
    write_released(tmp_path / "released", model, state=change(released_state(model)))
    check_refused(tmp_path, message)


def check_refused(folder, message, vae=VAE):
    with pytest.raises(ValueError, match=message):
        convert(folder / "released", folder / "released" / vae, folder / "ours")
    assert {path.name for path in folder.iterdir()} == {"released"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: without(vae, "decoder.conv_in.conv.weight"), "missing: decoder.conv_in.weight"),
        (lambda vae: without(vae, "encoder.conv_in.conv.weight"), "not a vision tokenizer of Infinity's kind"),
        (lambda vae: vae | {"decoder.more": torch.zeros(1)}, "not expected: decoder.more"),
        (lambda vae: vae | {"decoder.conv_in.conv.bias": torch.zeros(3)}, "of another shape: decoder.conv_in.bias"),
        (lambda vae: vae | {"decoder.conv_in.conv.bias": torch.full((32,), torch.inf)}, "NaN or infinite"),
        (lambda vae: {"a": 1}, 'no tensors under the key "vae"'),
    ],
)
def test_a_vision_tokenizer_that_does_not_fit_is_refused(model, tmp_path, change, message):
    write_released(tmp_path / "released", model, vae=change(released_vae(model)))
    check_refused(tmp_path, message)


def test_a_vision_tokenizer_of_other_bits_and_files_that_are_none_are_refused(model, tmp_path):
    other = released_vae(tiny_onecat_model(vq_config={"code_bits": 16}))
    write_released(tmp_path / "released", model, vae=other)
    check_refused(tmp_path, "codes of 8 bits .vae_embed_dim., but the vision tokenizer has 16")
    check_refused(tmp_path, "There is no file", vae="none.pth")
    torch.save({"ema": {}}, tmp_path / "released" / VAE)
    check_refused(tmp_path, 'no tensors under the key "vae"')


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "qwen2"}, "of type 'qwen2', not onecat"),
        ({"template": "other"}, "template='other'"),
        ({"downsample_ratio": 1.0}, "downsample_ratio=1.0"),
        ({"llm_config": None}, "no llm_config"),
        ({"vae_embed_dim": None}, "codes of None bits"),
        ({"llm": {"architectures": ["LlamaForCausalLM"]}}, "LlamaForCausalLM"),
        ({"llm": {"hidden_size": None}}, "does not describe a OneCAT"),
        ({"llm": {"num_hidden_layers": 3}}, "missing: language_model.layers.2"),
        ({"llm": {"rope_scaling": {"type": "yarn"}}}, "rope_scaling"),
        ({"llm": {"num_attention_heads": 0}}, "num_attention_heads"),
        ({"llm": {"rope_theta": "1e6"}}, "rope_theta must be a number above 0"),
    ],
)
def test_a_config_of_another_model_is_refused(model, tmp_path, values, message):
    config = released_config(model) | {name: value for name, value in values.items() if name != "llm"}
    if config["llm_config"]:
        config["llm_config"] |= values.get("llm", {})
    write_released(tmp_path / "released", model, config=config)
    check_refused(tmp_path, message)


def test_a_text_tokenizer_without_the_models_tokens_and_converted_folders_are_refused(model, tmp_path):
    from tiny import tiny_tokenizer

    write_released(tmp_path / "released", model)
    with pytest.raises(ValueError, match="convert it by conversion/convert_onecat.py first"):
        OneCatConfig.from_pretrained(tmp_path / "released")
    tiny_tokenizer().save_pretrained(tmp_path / "released")
    check_refused(tmp_path, "The tokenizer lacks <img>")
    (tmp_path / "released" / "tokenizer.json").write_text("{")
    check_refused(tmp_path, "The tokenizer in .*released cannot be read; is it complete")
    (tmp_path / "released" / "tokenizer.json").unlink()
    check_refused(tmp_path, "released holds no tokenizer")


def test_a_model_without_its_processor_does_not_go_back_and_leaves_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(OSError, match="ours"):
        convert_back(tmp_path / "ours", tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_released_config_raises_no_warning(model, tmp_path, capfd):
    write_released(tmp_path / "released", model)
    convert(tmp_path / "released", tmp_path / "released" / VAE, tmp_path / "ours")
    assert "using a model of type" not in capfd.readouterr().err


def test_a_file_of_the_released_width_tells_its_config():
    with torch.device("meta"):
        told = {name: t for name, t in expected_layout(OneCatConfig()).items() if name.startswith("vq_model.")}
    found = converter.bitwise_vq_config({name.removeprefix("vq_model."): t for name, t in told.items()})
    assert found.to_dict() == BitwiseVQConfig().to_dict() | {"levels": [[512, 10], [1024, 13]]} | {
        "channel_multipliers": [1, 2, 4, 4, 4]
    }
    assert onecat_config(converter.released_config(OneCatConfig()), found).text_config.hidden_size == 2048


def test_the_script_converts_and_says_in_one_line_what_is_wrong(model, tmp_path, capsys):
    write_released(tmp_path / "released", model)
    main(tmp_path / "released", tmp_path / "ours", tmp_path / "released" / VAE)
    main(tmp_path / "ours", tmp_path / "again", back=True)
    assert capsys.readouterr().out.splitlines() == [f"Written and checked: {tmp_path / n}" for n in ("ours", "again")]
    for arguments, message in (
        ((tmp_path / "released", tmp_path / "other"), "Error: Give --vision-tokenizer"),
        ((tmp_path / "ours", tmp_path / "other", tmp_path / "x", True), "Error: --back takes neither"),
        ((tmp_path / "released", tmp_path / "other", None, True), f"Error: {tmp_path / 'released'} is a released"),
        ((tmp_path / "ours", tmp_path / "other", tmp_path / "released" / VAE), "Error: The config has no llm_config"),
    ):
        with pytest.raises(typer.Exit):
            main(*arguments)
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)
