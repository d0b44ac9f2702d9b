"""What transformers asks of every model, asked of ours; `test_library_contracts.py` says where each check stands."""

import copy
import math

import pytest
import torch
from test_modeling import attention, ragged_batch
from test_modeling_vq import CONVOLUTIONAL, SEMANTIC_ENCODERS, tiny_vq_model
from tiny import tiny_config, tiny_model, tiny_vq_config
from tiny_onecat import tiny_onecat_config, tiny_onecat_model
from tiny_tokenflow_t2i import tiny_t2i_config, tiny_t2i_model
from transformers import PreTrainedModel

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration, NextFlowModel


def whole_model():
    model = tiny_model()
    return model, ragged_batch(model.config)[1]


def backbone():
    model, inputs = whole_model()
    return model.model, inputs


def vision_tokenizer():
    pixels = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return tiny_vq_model(), {"pixel_values": pixels}


def tokenflow_t2i():
    inputs = {"input_ids": torch.arange(12).view(2, 6) + 20, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    inputs["attention_mask"][1, :3] = 0
    codes = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(0))
    return tiny_t2i_model(), inputs | {"image_tokens": codes}


def onecat():
    """Chats, one of them with an image."""
    model = tiny_onecat_model()
    ids = torch.arange(14).view(2, 7) + 20
    ids[0, 2:4] = model.config.image_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    inputs["attention_mask"][1, :3] = 0
    pixels = torch.randn(1, 3, 28, 56, generator=torch.Generator().manual_seed(0))
    return model, inputs | {"pixel_values": pixels, "pixel_sizes": torch.tensor([[28, 56]])}


def onecat_drawing():
    """Images behind prompts, of two sizes."""
    model = tiny_onecat_model()
    inputs = {"input_ids": torch.arange(12).view(2, 6) + 20, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    inputs["attention_mask"][1, :3] = 0
    codes = torch.randint(256, (2, 21), generator=torch.Generator().manual_seed(0))
    codes[1, 5:] = -1
    return model, inputs | {"image_tokens": codes, "image_grids": torch.tensor([[4, 4], [2, 2]])}


def bitwise_tokenizer():
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return tiny_onecat_model().vq_model, {"pixel_values": pixels}


def parametrized(*makes):
    return pytest.mark.parametrize("make", makes, ids=lambda make: make.__name__)


TRANSFORMERS = parametrized(whole_model, backbone, tokenflow_t2i, onecat)
# All but Infinity's tokenizer, which is not trained, and gives pixels and no output.
TRAINED = parametrized(whole_model, backbone, vision_tokenizer, tokenflow_t2i, onecat, onecat_drawing)
ALL = parametrized(whole_model, backbone, vision_tokenizer, tokenflow_t2i, onecat, bitwise_tokenizer)
# What a pass leaves out: experts of other tokens, and what reads or writes them.
UNUSED = {
    onecat: ("mlp_ge", "connector", "first_feature", "scale_embedding", "visual_head"),
    onecat_drawing: ("mlp_ue", "reader", "lm_head"),
}


def first_output(model, inputs) -> torch.Tensor:
    """Logits, hidden states or pixels, without those of padding."""
    output = model(**inputs)[0]
    if "attention_mask" not in inputs:
        return output
    # TokenFlow-t2i's slots follow the prompt, and are not in its mask.
    mask = inputs["attention_mask"]
    mask = torch.nn.functional.pad(mask, (0, output.shape[1] - mask.shape[1]), value=1)
    return output[mask.bool()]


# Weights --------------------------------------------------------------------------------------------------------------


@ALL
def test_the_initialisation_gives_every_weight_and_buffer_its_value(make):
    model, _ = make()
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(torch.nan)
        tensor.__dict__.pop("_is_hf_initialized", None)
    model.init_weights()
    unset = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if not value.isfinite().all()]
    assert not unset


@ALL
def test_a_model_holds_no_tensors_beside_weights_and_buffers(make):
    """What else it held would stay behind where it is moved, saved or divided."""
    model, inputs = make()
    model(**inputs)
    for name, module in model.named_modules():
        assert not [key for key, value in vars(module).items() if torch.is_tensor(value)], name


@parametrized(backbone, vision_tokenizer, tokenflow_t2i, onecat, bitwise_tokenizer)
def test_a_model_outlives_saving_and_loading(make, tmp_path):
    model, inputs = make()
    model.save_pretrained(tmp_path / "first")
    loaded, report = type(model).from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(first_output(loaded, inputs), first_output(model, inputs))
    assert {path.suffix for path in (tmp_path / "first").iterdir()} == {".json", ".md", ".safetensors"}
    by_state = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(first_output(by_state.eval(), inputs), first_output(model, inputs))
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()


def test_a_whole_model_loads_as_its_backbone_and_a_backbone_not_as_a_whole_model(tmp_path):
    model, inputs = whole_model()
    model.save_pretrained(tmp_path / "whole")
    loaded = NextFlowModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(first_output(loaded, inputs), first_output(model.model, inputs))
    loaded.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="lacks lm_head.weight, visual_head.weight; is it complete"):
        NextFlowForConditionalGeneration.from_pretrained(tmp_path / "backbone")


def test_tensors_of_another_size_are_drawn_anew_where_this_is_asked_for(tmp_path):
    model, _ = whole_model()
    model.save_pretrained(tmp_path)
    config = tiny_config(text_config={"vocab_size": 328})
    loaded = type(model).from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (328, 32) and loaded.lm_head.weight.isfinite().all()
    assert torch.equal(loaded.visual_head.weight, model.visual_head.weight)


@ALL
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_model_loads_in_half_precision_and_keeps_what_decides_codes(make, name, tmp_path):
    model, inputs = make()
    model.save_pretrained(tmp_path)
    dtype = {"dtype": torch.bfloat16, "torch_dtype": torch.float16}[name]
    loaded = type(model).from_pretrained(tmp_path, **{name: dtype})
    types = {parameter: value.dtype for parameter, value in loaded.named_parameters()}
    code_parts = getattr(model, "vq_model", model).code_parts
    decides_codes = {parameter: any(f"{part}." in f"{parameter}." for part in code_parts) for parameter in types}
    assert {kind for parameter, kind in types.items() if decides_codes[parameter]} == {torch.float32}
    # In float16 transformers keeps more in float32: what is named for quantisation to leave out, the decoders too.
    others = [p for p in types if not decides_codes[p] and not (dtype == torch.float16 and "vq_model." in p)]
    assert {types[parameter] for parameter in others} == {dtype}
    assert first_output(loaded, inputs).isfinite().all()


@ALL
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_model_loads_with_a_device_map(make, device_map, tmp_path):
    pytest.importorskip("accelerate")
    model, inputs = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(first_output(loaded, inputs), first_output(model, inputs))


def test_a_model_with_its_vision_tokenizer_on_disk_reads_images(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = whole_model()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.language_model", "model.visual_embedding", "lm_head", "visual_head"), "cpu")
    places["model.vq_model"] = "disk"
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    pixels, grids = torch.rand(1, 3, 16, 16), torch.tensor([[4, 4]])
    assert torch.equal(loaded.get_image_tokens(pixels, grids), model.get_image_tokens(pixels, grids))


@ALL
def test_a_model_builds_on_the_meta_device(make):
    model, _ = make()
    with torch.device("meta"):
        built = type(model)(model.config)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert built.state_dict().keys() == model.state_dict().keys()


# Configs --------------------------------------------------------------------------------------------------------------


@parametrized(tiny_config, tiny_vq_config, tiny_t2i_config, tiny_onecat_config)
def test_a_config_outlives_dicts_json_and_copies(make, tmp_path):
    config = make()
    config.save_pretrained(tmp_path)
    others = (
        type(config).from_dict(config.to_dict()),
        type(config).from_pretrained(tmp_path),
        type(config).from_json_file(tmp_path / "config.json"),
        copy.deepcopy(config),
    )
    for other in others:
        assert type(other) is type(config) and other.to_json_string() == config.to_json_string()
        for name in config.sub_configs:
            assert type(getattr(other, name)) is type(getattr(config, name))
    assert type(config).from_pretrained(tmp_path, initializer_range=0.5).initializer_range == 0.5


@parametrized(whole_model, tokenflow_t2i, onecat)
def test_the_text_part_of_a_config_is_the_backbones_own(make):
    model, _ = make()
    assert model.config.get_text_config() is model.config.text_config
    assert model.config.text_config is model.get_decoder().config


# What a pass gives ----------------------------------------------------------------------------------------------------


@TRAINED
def test_two_passes_give_the_same_also_in_train_mode(make):
    model, inputs = make()
    expected = first_output(model, inputs)
    assert torch.equal(first_output(model, inputs), expected)
    assert torch.equal(first_output(model.train(), inputs), expected)


@TRAINED
def test_a_tuple_holds_what_the_output_holds(make):
    model, inputs = make()
    for options in [{}] if make is vision_tokenizer else [{}, {"output_hidden_states": True}]:
        output = model(**inputs, **options)
        as_tuple = model(**inputs, **options, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output.to_tuple())
        assert torch.equal(as_tuple[0], output[0])


@TRANSFORMERS
def test_hidden_states_and_attentions_are_given_where_they_are_asked_for(make):
    model, inputs = make()
    model.set_attn_implementation("eager")
    text = model.config.text_config
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    batch, length = output[0].shape[:2]
    assert [tuple(states.shape) for states in output.hidden_states] == [(batch, length, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [
        (batch, text.num_attention_heads, length, length)
    ] * 2
    shares = output.attentions[1][0, :, -1].sum(-1)
    torch.testing.assert_close(shares, torch.ones(text.num_attention_heads))
    # They are part of the graph, the last ones as they go to the head.
    output.hidden_states[0].retain_grad()
    output[0].sum().backward()
    assert output.hidden_states[0].grad.abs().sum() > 0
    head = getattr(model, "head", None) or getattr(model, "lm_head", torch.nn.Identity())
    torch.testing.assert_close(head(output.hidden_states[-1]), output[0])
    plain = model(**inputs)
    assert plain.get("hidden_states") is None and plain.get("attentions") is None


@parametrized(whole_model, backbone)
def test_embeddings_of_a_text_give_what_its_tokens_give(make):
    model, _ = make()
    ids = torch.arange(20, 26).view(2, 3)
    positions = torch.arange(3).expand(3, 2, -1)
    expected = model(input_ids=ids)[0]
    found = model(inputs_embeds=model.get_input_embeddings()(ids), position_ids=positions)[0]
    torch.testing.assert_close(found, expected)


@TRANSFORMERS
def test_the_main_input_comes_first(make):
    model, inputs = make()
    ids = inputs["input_ids"][:1, -1:]
    assert model.main_input_name == "input_ids"
    assert torch.equal(model(ids)[0], model(input_ids=ids)[0])


# Attention ------------------------------------------------------------------------------------------------------------


@ALL
def test_an_attention_implementation_is_set_on_every_part(make, caplog):
    model, _ = make()
    parts = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert {config._attn_implementation for config in parts} == {implementation}
    with pytest.raises(ValueError, match="foo"):
        model.set_attn_implementation("foo")
    assert {config._attn_implementation for config in parts} == {"sdpa"}
    assert "does not support setting its attention" not in caplog.text


@parametrized(vision_tokenizer, tokenflow_t2i, onecat, onecat_drawing, bitwise_tokenizer)
def test_every_attention_implementation_gives_the_same(make):
    model, inputs = make()
    outputs = {}
    for implementation in ("sdpa", "eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), attention(implementation):
            outputs[implementation] = first_output(model, inputs)
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs["flex_attention"], outputs["sdpa"], atol=1e-4, rtol=0)


def test_flash_attention_which_drops_the_masks_of_images_is_refused(tmp_path):
    model, _ = whole_model()
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, ImportError)):
        type(model).from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_the_attention_of_the_text_part_can_be_another(tmp_path):
    model, _ = whole_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation={"text_config": "eager"})
    boi = model.config.boi_token_id
    inputs = {"input_ids": torch.tensor([[0, 0, 20, boi], [21, 22, 23, boi]]), "image_sizes": [(16, 16)] * 2}
    inputs |= {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), "sampling": ImageSampling(temperature=0)}
    drawn = [one.generate_images(**inputs).image_tokens for one in (model, loaded)]
    assert torch.equal(*drawn)


def test_a_pass_over_text_compiles_as_one_graph():
    model, _ = whole_model()
    ids = torch.arange(20, 26).view(2, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


# Training -------------------------------------------------------------------------------------------------------------


def gradients(make, checkpointing: dict | None) -> dict[str, torch.Tensor]:
    """Of everything that is trained, by the sum of squares of all outputs with a gradient."""
    model, inputs = make()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        assert model.is_gradient_checkpointing
    model.train()
    if make is whole_model:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    elif make is vision_tokenizer:
        output = model(**inputs)
        loss = output.reconstruction.square().mean() + output.semantic_features.square().mean()
        loss = loss + output.codebook_loss + output.commitment_loss
    else:
        loss = first_output(model, inputs).square().mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@TRAINED
def test_gradient_checkpointing_of_either_kind_changes_no_gradient(make):
    expected = gradients(make, None)
    # The vision tower's pooled answer is not used; an untied head and what it reads are the whole model's.
    left_out = UNUSED.get(make, ("semantic_encoder.head.",))
    unused = {name for name in expected if any(part in name for part in left_out)}
    assert {name for name, gradient in expected.items() if gradient is None} == unused
    for reentrant in (False, True):
        found = gradients(make, {"use_reentrant": reentrant})
        for name in expected.keys() - unused:
            torch.testing.assert_close(found[name], expected[name], msg=name)


def test_gradient_checkpointing_can_be_switched_off():
    model, _ = whole_model()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@TRANSFORMERS
def test_embeddings_can_be_made_to_ask_for_gradients(make):
    """What adapters need under reentrant checkpointing, where the first layer's input must have a gradient."""
    model, inputs = make()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert first_output(model, inputs).requires_grad
    model.disable_input_require_grads()
    assert not first_output(model, inputs).requires_grad


# Embeddings and plans -------------------------------------------------------------------------------------------------


@TRANSFORMERS
def test_embeddings_can_be_taken_and_replaced(make):
    model, inputs = make()
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    expected = first_output(model, inputs)
    model.set_input_embeddings(copy.deepcopy(embeddings))
    assert model.get_input_embeddings() is not embeddings
    assert torch.equal(first_output(model, inputs), expected)
    if (head := model.get_output_embeddings()) is not None:
        model.set_output_embeddings(copy.deepcopy(head))
        assert model.get_output_embeddings() is not head
        assert torch.equal(first_output(model, inputs), expected)


def test_a_larger_vocabulary_leaves_the_codes_of_tokenflow_t2i_where_they_are():
    model, inputs = tokenflow_t2i()
    size, expected = model.config.text_config.vocab_size, first_output(model, inputs)
    model.resize_token_embeddings(size + 8)
    assert model.config.text_config.vocab_size == size + 8
    torch.testing.assert_close(first_output(model, inputs)[:, :size], expected)


@parametrized(backbone, tokenflow_t2i, onecat)
def test_the_plans_of_tensor_parallelism_name_modules_that_exist(make):
    model, _ = make()
    modules = dict(model.named_modules())
    assert model.tp_plan
    for pattern in model.tp_plan:
        assert pattern.replace("*", "0") in modules, pattern


def test_parts_that_are_not_divided_are_named_as_they_are():
    encoders = [SEMANTIC_ENCODERS[name] for name in ("siglip2 naflex", "siglip", "clip")]
    tokenizers = [tiny_vq_model(semantic_config=encoder) for encoder in encoders] + [tiny_vq_model(**CONVOLUTIONAL)]
    for models in ([whole_model()[0]], [tokenflow_t2i()[0]], tokenizers):
        found = {type(module).__name__ for model in models for module in model.modules()}
        # An instance adds what its parts name themselves.
        assert set(type(models[0])._no_split_modules) <= found


def test_models_that_draw_tell_their_size():
    for make in (whole_model, tokenflow_t2i):
        model, _ = make()
        expected = sum(math.prod(parameter.shape) for parameter in model.parameters())
        assert model.num_parameters() == expected
        frozen = sum(math.prod(parameter.shape) for parameter in model.vq_model.parameters())
        assert model.num_parameters(only_trainable=True) == expected - frozen
