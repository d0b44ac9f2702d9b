"""LoRA: what is adapted, what is left alone, and that an adapter acts the same wherever it is loaded."""

import sys
from pathlib import Path

import peft
import pytest
import torch
from processes import in_processes
from safetensors.torch import load_file
from test_trainer import make_trainer, rows
from tiny import tiny_model, tiny_processor, tiny_tokenizer
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.adapters import NOT_QUANTIZED, lora_config, quantization_config
from transformers_nextflow.trainers import NextFlowCollator


BATCH = NextFlowCollator(tiny_processor())(rows())
INPUTS = {name: value for name, value in BATCH.items() if name not in ("labels", "image_labels")}


def adapted(seed: int = 1, model=None, **options) -> peft.PeftModel:
    """A tiny model with an adapter that does something: PEFT starts from one that does nothing."""
    model = model or tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, lora_config(model, rank=2, init_lora_weights=False, **options))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**INPUTS).logits


def test_every_linear_layer_of_the_backbone_is_adapted_and_nothing_else():
    model = tiny_model()
    backbone = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    backbone = {name for name in backbone if "language_model.layers." in name}
    model = adapted(model=model).get_base_model()
    found = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert found == backbone and len(found) == 2 * 7
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_training_changes_the_adapter_alone(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = peft.get_peft_model(model, lora_config(model, rank=2))
    untouched = logits(model)
    make_trainer(tmp_path, model, rows(), max_steps=3).train()
    assert not torch.equal(logits(model.eval()), untouched)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), untouched, atol=0, rtol=0)
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_checkpoint_of_a_training_holds_the_adapter_and_resumes(tmp_path):
    data = rows()

    def train(seed: int, checkpoint=None) -> dict[str, torch.Tensor]:
        model = tiny_model()
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, lora_config(model, rank=2))
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
        make_trainer(tmp_path, model, data, **options).train(resume_from_checkpoint=checkpoint)
        return peft.get_peft_model_state_dict(model)

    whole = train(seed=0)
    resumed = train(seed=1, checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert sum(map(torch.numel, saved.values())) == sum(map(torch.numel, whole.values()))
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()


def _save_logits(rank: int, folder: Path):
    """What a process of its own makes of the saved model and adapter."""
    torch.set_num_threads(1)
    model = NextFlowForConditionalGeneration.from_pretrained(folder / "base")
    torch.save(logits(peft.PeftModel.from_pretrained(model, folder / "adapter").eval()), folder / "logits.pt")


def test_an_adapter_acts_the_same_in_another_process(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = adapted(model=NextFlowForConditionalGeneration.from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(tmp_path / "adapter")
    in_processes(1, _save_logits, tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(model))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert Path(tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000


def test_a_merged_adapter_acts_as_the_unmerged_one_and_saves_as_a_whole_model(tmp_path):
    model = adapted()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert isinstance(merged, NextFlowForConditionalGeneration)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(NextFlowForConditionalGeneration.from_pretrained(tmp_path).eval()), logits(merged))


def test_several_adapters_are_switched_and_added_up(tmp_path):
    alone = {seed: logits(adapted(seed)) for seed in (1, 2)}
    for seed in (1, 2):
        adapted(seed).save_pretrained(tmp_path / str(seed))
    model = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "1", adapter_name="one").eval()
    model.load_adapter(tmp_path / "2", adapter_name="two")
    for seed, name in ((1, "one"), (2, "two"), (1, "one")):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[seed])
    model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    torch.testing.assert_close(logits(model), alone[1], atol=1e-5, rtol=1e-5)
    # transformers' own way, for a model that keeps its class
    native = tiny_model()
    native.load_adapter(tmp_path / "1")
    torch.testing.assert_close(logits(native), alone[1], atol=0, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_trained_and_no_others(tied, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<house>"])
    token = tokenizer.convert_tokens_to_ids("<house>")

    def extended():
        # Weights tied by the config are one parameter, as in small Qwen models.
        model = tiny_model(tie_word_embeddings=tied)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(token + 1, mean_resizing=False)
        return model

    model = extended()
    before = [table.weight.clone() for table in (model.get_input_embeddings(), model.lm_head)]
    model = peft.get_peft_model(model, lora_config(model, rank=2, new_token_ids=[token]))
    batch = {name: value.clone() for name, value in BATCH.items()}
    batch["input_ids"][:, 0] = token
    batch["labels"][:, 1] = token
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
    loaded = peft.PeftModel.from_pretrained(extended(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), atol=0, rtol=0)
    merged = loaded.merge_and_unload()
    for old, table in zip(before, (merged.get_input_embeddings(), merged.lm_head)):
        changed = (table.weight != old).any(1).nonzero().flatten().tolist()
        assert changed == [token]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be from 1 to the model's width of 32, got 0"),
        ({"new_token_ids": [100_000]}, r"\[100000\] lie outside .*resize_token_embeddings"),
        ({"new_token_ids": [tiny_tokenizer().image_token_id]}, "stands for slots of images"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_model(), **options)


def test_a_missing_peft_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"transformers-nextflow\[peft\]"):
        lora_config(tiny_model())


def test_four_bits_are_for_the_backbone_alone():
    config = quantization_config(bnb_4bit_use_double_quant=True)
    assert config.load_in_4bit and config.bnb_4bit_use_double_quant
    linear = [name for name, module in tiny_model().named_modules() if isinstance(module, nn.Linear)]
    quantized = [name for name in linear if should_convert_module(name, NOT_QUANTIZED)]
    assert quantized == [name for name in linear if "language_model.layers." in name]
