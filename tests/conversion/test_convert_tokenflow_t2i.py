"""The converter of TokenFlow-t2i on tiny random models in the released layout: there, back, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
from reference_tokenflow import random_released
from safetensors.torch import load_file, save_file
from tiny import tiny_vq_config
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor, tiny_t2i_tokenizer

from transformers_nextflow import NextFlowPipeline, NextFlowVQModel, TokenFlowT2IForConditionalGeneration
from transformers_nextflow.conversion import tokenflow_t2i as converter
from transformers_nextflow.conversion.checkpoints import fingerprint
from transformers_nextflow.conversion.tokenflow import convert_tokenflow, tokenflow_config
from transformers_nextflow.conversion.tokenflow_t2i import KEYS, TEXT_FIELDS, expected_layout, t2i_config
from transformers_nextflow.conversion.tokenflow_t2i import convert_tokenflow_t2i as convert
from transformers_nextflow.conversion.tokenflow_t2i import export_tokenflow_t2i as convert_back


sys.path.insert(0, str(Path(__file__).parents[2] / "conversion"))
from convert_tokenflow_t2i import main  # noqa: E402


CODES = len(random_released("clipb", positions=196)["quantize.embedding_vqkd.weight"])
PREFIXES = {"connector.": "model.mm_projector.", "scale_embedding.": "model.lvl_embed.", "lm_head.": "lm_head."}


def released_name(name: str) -> str:
    """The released name of one of our tensors, spelled out without the converter's table."""
    if name == "position_embedding":
        return "model.pos_1LC"
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    name = name.replace("language_model.", "model.")
    return name.replace("q_norm.", "qknorm.query_norm.").replace("k_norm.", "qknorm.key_norm.")


def released_state(model) -> dict[str, torch.Tensor]:
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vq_model.")}
    return {released_name(name): tensor.contiguous() for name, tensor in weights.items()}


def released_config(model) -> dict:
    text, start = model.config.text_config, model.config.image_token_start
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": start + CODES,
        "vq_codebook_size": CODES,
        "mm_use_vq_token": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_vq_type": "TOKEN_FLOW",
        "mm_vision_tower": "tokenflow_clipb_32k_enhanced.pt",
        "tokenizer_model_max_length": 128,
        "tokenizer_padding_side": "left",
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def write_released(folder: Path, model, form: str, state: dict | None = None):
    """A folder as the released one: in two shards with an index, or in one file; as safetensors or as pickles."""
    folder.mkdir()
    state = released_state(model) if state is None else state
    save, stem, suffix = (save_file, "model", "safetensors") if "safe" in form else (torch.save, "pytorch_model", "bin")
    if "sharded" in form:
        names, index = sorted(state), {}
        for number, keys in enumerate((names[::2], names[1::2]), start=1):
            file = f"{stem}-0000{number}-of-00002.{suffix}"
            save({key: state[key] for key in keys}, folder / file)
            index |= dict.fromkeys(keys, file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        save(state, folder / f"{stem}.{suffix}")
    (folder / "config.json").write_text(json.dumps(released_config(model)))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    tiny_t2i_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def released_tokenizer(tmp_path_factory):
    """A tokenizer of TokenFlow's kind as it is released, for 224 pixels."""
    path = tmp_path_factory.mktemp("released") / "clipb.pt"
    torch.save({"model": random_released("clipb", positions=196)}, path)
    return path


@pytest.fixture(scope="module")
def vq_folder(released_tokenizer, tmp_path_factory):
    """The folder that it is converted to, for 256 pixels."""
    folder = tmp_path_factory.mktemp("tokenizer") / "clipb"
    convert_tokenflow(released_tokenizer, folder, interpolate=True, semantic_heads=2, semantic_decoder_heads=2)
    return folder


@pytest.fixture(scope="module")
def model(vq_folder):
    vq_model = NextFlowVQModel.from_pretrained(vq_folder)
    model = tiny_t2i_model(vq_config=vq_model.config, text_config={"vocab_size": 330 + CODES})
    model.vq_model.load_state_dict(vq_model.state_dict())
    return model


@pytest.mark.parametrize("form", ["safe", "safe sharded", "pickle", "pickle sharded"])
def test_a_converted_model_is_the_released_one_and_goes_back_to_it(model, vq_folder, tmp_path, form):
    buffers = {"image_token_start": torch.tensor(330), "image_token_end": torch.tensor([330 + CODES - 1])}
    write_released(tmp_path / "released", model, form, released_state(model) | buffers)
    convert(tmp_path / "released", vq_folder, tmp_path / "ours", max_shard_size="50KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    converted = TokenFlowT2IForConditionalGeneration.from_pretrained(tmp_path / "ours")
    told = released_config(model)
    for name in TEXT_FIELDS:
        assert getattr(converted.config.text_config, name) == told[name]
    assert converted.config.image_token_start == 330
    torch.testing.assert_close(converted.state_dict(), model.state_dict(), rtol=0, atol=0)

    convert_back(tmp_path / "ours", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    expected = released_state(model)
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == told
    convert(tmp_path / "again", vq_folder, tmp_path / "twice")
    twice = TokenFlowT2IForConditionalGeneration.from_pretrained(tmp_path / "twice")
    torch.testing.assert_close(twice.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_model_that_was_not_converted_goes_back_with_what_its_config_tells(model, tmp_path):
    NextFlowPipeline(model, tiny_t2i_processor()).save_pretrained(tmp_path / "ours")
    convert_back(tmp_path / "ours", tmp_path / "released")
    told = json.loads((tmp_path / "released" / "config.json").read_text())
    assert set(TEXT_FIELDS) < told.keys() and told["model_type"] == "llava_llama"
    text = t2i_config(told, model.config.vq_config).text_config
    for name in (*TEXT_FIELDS, "rope_parameters"):
        assert getattr(text, name) == getattr(model.config.text_config, name)


class Killed(BaseException):
    """What no handler catches, as a kill is."""


@pytest.mark.parametrize("form", ["safe sharded", "pickle"])
def test_a_killed_run_goes_on_and_one_from_other_weights_does_not(model, vq_folder, tmp_path, monkeypatch, form):
    write_released(tmp_path / "released", model, form)

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(converter, "check_written", killed)
        with pytest.raises(Killed):
            convert(tmp_path / "released", vq_folder, tmp_path / "ours", "50KB")
    shard = next((tmp_path / "ours.partial").glob("model-00001-*"))
    written = shard.stat().st_mtime_ns
    convert(tmp_path / "released", vq_folder, tmp_path / "ours", "50KB")
    assert (tmp_path / "ours" / shard.name).stat().st_mtime_ns == written

    (tmp_path / "ours").rename(tmp_path / "ours.partial")
    (tmp_path / "ours.partial" / "conversion.json").write_text(json.dumps({"source": "another"}))
    with pytest.raises(ValueError, match="started from other files"):
        convert(tmp_path / "released", vq_folder, tmp_path / "ours", "50KB")
    weights = next(path for path in (tmp_path / "released").iterdir() if path.suffix in (".bin", ".safetensors"))
    before = fingerprint(tmp_path / "released")
    weights.write_bytes(weights.read_bytes() + b"0")
    assert fingerprint(tmp_path / "released") != before


def test_the_converted_folder_draws_and_its_card_has_licence_base_and_prompts(model, vq_folder, tmp_path):
    write_released(tmp_path / "released", model, "safe")
    convert(tmp_path / "released", vq_folder, tmp_path / "ours", base_model="someone/TokenFlow-t2i")
    pipe = NextFlowPipeline.from_pretrained(tmp_path / "ours")
    pipe.set_progress_bar_config(disable=True)
    inputs = pipe.processor.apply_image_prompt("a red circle")
    negative = {f"negative_{k}": v for k, v in pipe.processor.apply_image_prompt("", allow_empty=True).items()}
    drawn = pipe("a red circle", generator=torch.Generator().manual_seed(0)).image_tokens
    expected = model.generate_images(**inputs, **negative, generator=torch.Generator().manual_seed(0)).image_tokens
    assert torch.equal(drawn, expected)
    card = (tmp_path / "ours" / "README.md").read_text()
    for line in ("license: apache-2.0", "base_model: someone/TokenFlow-t2i", "pipeline_tag: text-to-image", "widget:"):
        assert line in card


def test_the_released_config_gives_the_released_keys_and_shapes_at_full_width():
    llama = {
        "vocab_size": 64769, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "vq_codebook_size": 32768,
    }  # fmt: skip
    layout = expected_layout(t2i_config(llama, tokenflow_config("clipb_256")))
    released = KEYS.inverse({name: tensor for name, tensor in layout.items() if not name.startswith("vq_model.")})
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items()}
    assert len(shapes) == 32 * 11 + 9
    assert shapes["model.layers.31.self_attn.qknorm.key_norm.weight"] == (128,)
    assert shapes["model.pos_1LC"] == (817, 4096) and shapes["model.lvl_embed.weight"] == (10, 4096)
    assert shapes["model.mm_projector.0.weight"] == (4096, 40) and shapes["lm_head.weight"] == (64769, 4096)
    assert set(KEYS.forward(released)) == {name for name in layout if not name.startswith("vq_model.")}


class Code:
    def __reduce__(self):
        return print, ("run",)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "model.pos_1LC"), "missing: position_embedding"),
        (lambda state: state | {"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}, "not expected: language_model"),
        (lambda state: state | {"model.surprise": torch.zeros(1)}, "no row for 'model.surprise'"),
        (lambda state: state | {"model.norm.weight": torch.zeros(3)}, "of another shape: language_model.norm.weight"),
        (lambda state: state | {"model.norm.weight": torch.full((32,), torch.nan)}, "NaN"),
        (lambda state: state | {"image_token_start": torch.tensor(329)}, "image_token_start=329"),
        (lambda state: state | {"image_token_start": torch.tensor([1, 2])}, r"image_token_start=\[1, 2\]"),
    ],
)
@pytest.mark.parametrize("form", ["safe sharded", "pickle"])
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_written(model, vq_folder, tmp_path, change, message, form):
    write_released(tmp_path / "released", model, form, change(released_state(model)))
    check_refused(tmp_path, vq_folder, message)


def check_refused(folder, vq_folder, message):
    with pytest.raises(ValueError, match=message):
        convert(folder / "released", vq_folder, folder / "ours")
    assert {path.name for path in folder.iterdir()} == {"released"}


@pytest.mark.parametrize("form", ["safe sharded", "pickle sharded"])
def test_truncated_shards_and_an_index_that_lies_are_refused(model, vq_folder, tmp_path, form):
    write_released(tmp_path / "released", model, form)
    [index] = (tmp_path / "released").glob("*.index.json")
    told = json.loads(index.read_text())
    keys = list(told["weight_map"])
    index.write_text(json.dumps({"weight_map": without(told["weight_map"], keys[0])}))
    check_refused(tmp_path, vq_folder, "disagree")
    index.write_text(json.dumps(told))
    shard = tmp_path / "released" / told["weight_map"][keys[0]]
    shard.write_bytes(shard.read_bytes()[:-100])
    check_refused(tmp_path, vq_folder, "is it complete")


def test_a_pickle_with_code_in_it_is_not_opened(model, vq_folder, tmp_path, capsys):
    write_released(tmp_path / "released", model, "pickle", released_state(model) | {"code": Code()})
    check_refused(tmp_path, vq_folder, "was not opened")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"vq_codebook_size": 63}, f"draws with 63 codes, but the vision tokenizer has {CODES}"),
        ({"model_type": "llama"}, "of type 'llama', not llava_llama"),
        ({"model_type": "tokenflow_t2i"}, "of type 'tokenflow_t2i', not llava_llama"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type='yarn'"),
        ({"hidden_size": None}, "lacks .'hidden_size'"),
        ({"hidden_size": "wide"}, "does not describe a TokenFlow-t2i"),
        ({"vocab_size": 20}, "does not describe a TokenFlow-t2i"),
        ({"num_hidden_layers": 3}, "missing: language_model.layers.2"),
    ],
)
def test_a_config_of_another_model_is_refused(model, vq_folder, tmp_path, values, message):
    write_released(tmp_path / "released", model, "safe")
    config = {name: value for name, value in (released_config(model) | values).items() if value is not None}
    (tmp_path / "released" / "config.json").write_text(json.dumps(config))
    check_refused(tmp_path, vq_folder, message)


def test_both_forms_of_the_rotary_base_are_read(model):
    for form in ({"rope_theta": 77.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}):
        config = t2i_config(released_config(model) | form, model.config.vq_config)
        assert config.text_config.rope_parameters["rope_theta"] == 77


@pytest.mark.parametrize("content", ["{oops", "[]"])
def test_a_config_that_is_none_is_refused(model, vq_folder, tmp_path, content):
    write_released(tmp_path / "released", model, "safe")
    (tmp_path / "released" / "config.json").write_text(content)
    check_refused(tmp_path, vq_folder, str(tmp_path / "released" / "config.json"))


def test_a_vision_tokenizer_of_another_kind_or_size_is_refused(model, released_tokenizer, vq_folder, tmp_path):
    write_released(tmp_path / "released", model, "safe")
    others = tmp_path / "released" / "others"
    heads = {"semantic_heads": 2, "semantic_decoder_heads": 2}
    convert_tokenflow(released_tokenizer, others / "small", **heads)
    NextFlowVQModel(tiny_vq_config(codebook_size=CODES)).save_pretrained(others / "nextflow")
    shutil.copytree(vq_folder, others / "rotary")
    path = others / "rotary" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"upsample": "rotary"}))
    for vq, message in (
        (others / "small", "have 817 codes, those of the vision tokenizer 561 .224 x 224 pixels.; convert"),
        (others / "nextflow", "Only TokenFlow's own kind"),
        (others / "rotary", "upsample"),
        (tmp_path / "released", "holds a model of type 'llava_llama'.*convert_tokenflow.py"),
        (released_tokenizer, "is a file, but has to be a folder; conversion/convert_tokenflow.py"),
        (others / "none", "There is no file"),
    ):
        check_refused(tmp_path, vq, message)


def test_a_text_tokenizer_whose_tokens_reach_into_the_codes_is_refused(model, vq_folder, tmp_path):
    write_released(tmp_path / "released", model, "safe")
    tokenizer = tiny_t2i_tokenizer()
    tokenizer.add_tokens([f"filler {index}" for index in range(330 - len(tokenizer))])
    tokenizer.add_tokens([f"<vq_token_{code}>" for code in range(CODES)])
    tokenizer.save_pretrained(tmp_path / "released")
    convert(tmp_path / "released", vq_folder, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours")
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path / "released")
    check_refused(tmp_path, vq_folder, f"'one more' is token {330 + CODES}")


def test_the_script_converts_and_says_in_one_line_what_is_wrong(model, vq_folder, tmp_path, capsys):
    write_released(tmp_path / "released", model, "safe")
    main(tmp_path / "released", tmp_path / "ours", vq_folder)
    main(tmp_path / "ours", tmp_path / "again", back=True)
    assert capsys.readouterr().out.splitlines() == [f"Written and checked: {tmp_path / n}" for n in ("ours", "again")]
    for arguments, message in (
        ((tmp_path / "released", tmp_path / "other"), "Error: Give --vision-tokenizer"),
        ((tmp_path / "none", tmp_path / "other", vq_folder), f"Error: {tmp_path / 'none'} holds neither"),
        ((tmp_path / "ours", tmp_path / "other", vq_folder, True), "Error: --back takes neither"),
        ((tmp_path / "released", tmp_path / "other", None, True), f"Error: {tmp_path / 'released'} holds a model of"),
        ((tmp_path / "none", tmp_path / "other", None, True), "Error: There is no file"),
    ):
        with pytest.raises(typer.Exit):
            main(*arguments)
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_a_target_that_is_there_is_left_alone(model, vq_folder, tmp_path):
    write_released(tmp_path / "released", model, "safe")
    (tmp_path / "ours").mkdir()
    with pytest.raises(ValueError, match="already exists"):
        convert(tmp_path / "released", vq_folder, tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())
