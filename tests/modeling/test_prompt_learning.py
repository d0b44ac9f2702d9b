"""PEFT's learned prompts: prompt tuning and p-tuning for text, prefix tuning for images too."""

import pytest
import torch
from library_versions import matching_peft
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from reference_nextflow import as_batch
from test_generation import silence
from test_modeling import random_image, special_tokens
from tiny import tiny_model


GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}


def prompt_learning(kind):
    config = {
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix": PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=16, num_attention_heads=2
        ),
    }[kind]
    torch.manual_seed(0)
    return get_peft_model(tiny_model(), config).eval()


@torch.no_grad()
def greedy_by_passes(model, rows, count):
    """Token by token, each from a pass of the adapted model over everything so far."""
    config = model.get_base_model().config
    rows = [list(row) for row in rows]
    for _ in range(count):
        inputs = as_batch(rows, *special_tokens(config))[1]
        for row, logits in zip(rows, silence(model(**inputs).logits[:, -1], config)):
            row.append(int(logits.argmax()))
    return torch.tensor([row[-count:] for row in rows])


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_learned_prompts_train_on_text(kind):
    model = prompt_learning(kind)
    ids = torch.tensor([[20, 21, 22, 23], [24, 25, 26, 27]])
    mask = torch.ones_like(ids)
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids)
    outputs.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    # A learned embedding predicts the first token; behind a prefix of keys and values nothing does.
    count = 3 if kind == "prefix" else 4
    with torch.no_grad():
        log_probabilities = model(input_ids=ids, attention_mask=mask).logits[:, -count - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(outputs.loss, -log_probabilities.gather(-1, ids[:, -count:, None]).mean())


@matching_peft
@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_text_behind_learned_prompts_is_that_of_full_passes(kind):
    model = prompt_learning(kind)
    rows = [[20, 21, 22, 23], [24, 25]]
    expected = greedy_by_passes(model, rows, 4)
    for chosen in (rows, rows[:1]):
        inputs = as_batch(chosen, *special_tokens(model.get_base_model().config))[1]
        assert torch.equal(model.generate(**inputs, **GREEDY)[:, 4:], expected[: len(chosen)])


@matching_peft
def test_a_learned_prefix_may_stand_before_images():
    model = prompt_learning("prefix")
    config = model.get_base_model().config
    rows = [[20, random_image(config, seed=1), 21], [22]]
    inputs = as_batch(rows, *special_tokens(config))[1]
    assert torch.equal(model.generate(**inputs, **GREEDY)[:, -4:], greedy_by_passes(model, rows, 4))


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_learned_embeddings_before_images_are_refused(kind):
    model = prompt_learning(kind)
    config = model.get_base_model().config
    inputs = as_batch([[20, random_image(config), 21]], *special_tokens(config))[1]
    for call in (model, lambda **inputs: model.generate(**inputs, **GREEDY)):
        with pytest.raises(ValueError, match="Images come with input_ids"):
            call(**inputs)
