"""A pipeline with adapters is saved whole: what is loaded generates what was saved."""

import peft
import pytest
import torch
from library_versions import matching_peft
from tiny import tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoModelForMultimodalLM

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowPipeline
from transformers_nextflow.adapters import lora_config


def randomized(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta", "ia3")):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def own_adapter(*names: str, **options):
    """The model with adapters of its own."""
    model = tiny_model()
    for name in names or ("default",):
        model.add_adapter(lora_config(model, 2, init_lora_weights=False, **options), name)
    return randomized(model)


def wrapped(model=None, **options):
    model = model or tiny_model()
    return randomized(peft.get_peft_model(model, lora_config(model, 2, init_lora_weights=False, **options)))


def one_active_of_two():
    model = own_adapter("one", "two")
    model.set_adapter("two")
    return model


def disabled():
    model = own_adapter()
    model.disable_adapters()
    return model


def with_new_tokens():
    model, size = tiny_model(), len(tiny_tokenizer())
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    return wrapped(model, new_token_ids=[20, size + 1])


def of_another_kind():
    options = {"target_modules": r".*language_model\.layers\.\d+\.self_attn\.[kv]_proj", "feedforward_modules": []}
    return randomized(peft.get_peft_model(tiny_model(), peft.IA3Config(**options)))


MODELS = {
    "own": own_adapter,
    "wrapped": wrapped,
    "one active of two": one_active_of_two,
    "disabled": disabled,
    "new tokens": with_new_tokens,
    "a whole head": lambda: wrapped(modules_to_save=["visual_head"]),
    "another kind": of_another_kind,
    "merged": lambda: wrapped().merge_and_unload(),
}


def pipeline(model) -> NextFlowPipeline:
    pipe = NextFlowPipeline(model, tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def codes(pipe: NextFlowPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("one", guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).image_tokens


@matching_peft
@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_pipeline_generates_with_its_adapters(kind, tmp_path):
    pipe = pipeline(MODELS[kind]())
    expected = codes(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(codes(pipe), expected)
    loaded = NextFlowPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(codes(loaded), expected)
    assert torch.equal(codes(pipeline(tiny_model())), expected) == (kind == "disabled")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(codes(NextFlowPipeline.from_pretrained(tmp_path / "again")), expected)


def test_adapters_that_may_be_taken_out_again_are_not_saved_in_the_weights(tmp_path):
    model = wrapped()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        pipeline(model).save_pretrained(tmp_path)


def test_prompt_learning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=8, num_layers=1)
    model = peft.PeftModel(tiny_model(), peft.LoraConfig(r=2, target_modules=r".*q_proj"))
    model.peft_config["default"] = config
    with pytest.raises(ValueError, match="not supported for drawing; use LoRA"):
        NextFlowPipeline(model, tiny_processor())


def test_weights_that_are_saved_over_a_folder_with_adapters_stay_without_them(tmp_path):
    pipeline(wrapped()).save_pretrained(tmp_path)
    other = tiny_model(seed=3)
    other.save_pretrained(tmp_path / "model")
    assert torch.equal(codes(NextFlowPipeline.from_pretrained(tmp_path)), codes(pipeline(other)))


def test_options_of_saving_reach_a_model_with_adapters(tmp_path):
    pipeline(wrapped()).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1


@matching_peft
def test_an_adapter_whose_base_holds_adapters_is_loaded_as_it_was_saved(tmp_path):
    pipeline(wrapped()).save_pretrained(tmp_path)
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "model")
    expected = {"again": codes(pipeline(model))}
    model.save_pretrained(tmp_path / "again")  # the active adapter only, as transformers does
    model.add_adapter(lora_config(model, 3, init_lora_weights=False), "more")
    model.set_adapter("more")
    expected["more"] = codes(pipeline(model))
    model.save_pretrained(tmp_path / "more")
    assert not torch.equal(*expected.values())
    for name, found in expected.items():
        tiny_processor().save_pretrained(tmp_path / name)
        for load in (NextFlowForConditionalGeneration, AutoModelForMultimodalLM):
            assert torch.equal(codes(pipeline(load.from_pretrained(tmp_path / name))), found)
        assert torch.equal(codes(NextFlowPipeline.from_pretrained(tmp_path / name)), found)
