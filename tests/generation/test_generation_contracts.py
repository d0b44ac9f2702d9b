"""What transformers asks of every model that generates, asked of ours in text; `test_library_contracts.py` says where
each check stands.
"""

import pytest
import torch
from reference_nextflow import as_batch
from test_generation import text_rows
from test_modeling import special_tokens
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer


GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
TEXT = {"input_ids": torch.arange(20, 26).view(2, 3)}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def with_images(model, rows=slice(None)) -> dict[str, torch.Tensor]:
    return as_batch(text_rows(model.config)[rows], *special_tokens(model.config))[1]


def works_or_is_refused(call, expected: torch.Tensor, *words: str):
    """What is not supported is told in one line that names it, and never given as something else."""
    try:
        found = call()
    except ValueError as error:
        assert "\n" not in str(error) and all(word in str(error) for word in words), error
    else:
        assert torch.equal(found, expected)


# Greedy, sampled, beams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_all_that_is_asked_for_comes_with_its_shape(use_cache):
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = with_images(model)
    wanted = ("scores", "logits", "attentions", "hidden_states")
    options = GREEDY | {f"output_{name}": True for name in wanted}
    output = model.generate(**inputs, **options, use_cache=use_cache, return_dict_in_generate=True)
    rows, length = inputs["input_ids"].shape
    assert torch.equal(output.sequences, model.generate(**inputs, **GREEDY, use_cache=use_cache))
    assert output.sequences.shape == (rows, length + 5)
    for step in range(5):
        read = length + step if step == 0 or not use_cache else 1
        assert output.scores[step].shape[0] == output.logits[step].shape[0] == rows
        assert output.scores[step].argmax(-1).tolist() == output.sequences[:, length + step].tolist()
        assert [tuple(part.shape) for part in output.hidden_states[step]] == [(rows, read, 32)] * 3
        assert [tuple(part.shape) for part in output.attentions[step]] == [(rows, 4, read, length + step)] * 2
    if use_cache:
        layers = output.past_key_values.layers
        assert [tuple(layer.keys.shape) for layer in layers] == [(rows, 2, length + 4, 8)] * 2
    else:
        assert output.past_key_values is None


def test_a_seed_gives_its_sample_and_another_another(model):
    inputs = with_images(model)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, **GREEDY | {"do_sample": True, "max_new_tokens": 12, "top_k": 0})

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_beams_can_be_sampled_and_keep_their_prompts(model):
    inputs = with_images(model)
    torch.manual_seed(0)
    written = model.generate(**inputs, **GREEDY | {"do_sample": True}, num_beams=3, num_return_sequences=2)
    prompts = inputs["input_ids"].repeat_interleave(2, 0)
    assert torch.equal(written[:, : prompts.shape[1]], prompts) and written.shape[1] == prompts.shape[1] + 5


# Lengths and ends -----------------------------------------------------------------------------------------------------


def test_lengths_are_kept(model):
    inputs = with_images(model)
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False}
    assert model.generate(**inputs, **options, max_length=length + 2, eos_token_id=None).shape[1] == length + 2
    first = int(model.generate(**inputs, **GREEDY)[0, length])
    ended = model.generate(**inputs, **options, max_new_tokens=4, min_new_tokens=3, eos_token_id=first)
    assert first not in ended[0, length : length + 3].tolist() and ended.shape[1] >= length + 3


def test_a_row_that_has_ended_is_padded_and_the_others_go_on(model):
    inputs = with_images(model)
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, **GREEDY)[:, length:]
    end = int(free[0, 1])
    ended = model.generate(**inputs, **GREEDY | {"eos_token_id": end}, pad_token_id=0)[:, length:]
    for row, whole in zip(ended.tolist(), free.tolist()):
        stop = whole.index(end) + 1 if end in whole else len(whole)
        assert row[:stop] == whole[:stop][: len(row)] and not any(row[stop:])


def test_a_criterion_and_a_streamer_are_heard(model, capsys):
    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 5)

    tokenizer, one = tiny_tokenizer(), {"input_ids": TEXT["input_ids"][:1]}
    criteria = StoppingCriteriaList([AfterTwo()])
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    written = model.generate(**one, **GREEDY, stopping_criteria=criteria, streamer=streamer)
    assert written.shape == (1, 5)
    assert capsys.readouterr().out.strip() == tokenizer.decode(written[0, 3:]).strip()


def test_settings_of_a_config_object_are_those_of_arguments(model):
    inputs = with_images(model)
    by_object = model.generate(**inputs, generation_config=GenerationConfig(**GREEDY))
    assert torch.equal(by_object, model.generate(**inputs, **GREEDY))


# What a prompt may be -------------------------------------------------------------------------------------------------


def test_padding_on_the_left_changes_no_row(model):
    inputs = with_images(model)
    together = model.generate(**inputs, **GREEDY)[:, -5:]
    for row in range(3):
        alone = model.generate(**with_images(model, slice(row, row + 1)), **GREEDY)
        assert torch.equal(alone[0, -5:], together[row])


def test_positions_that_are_given_are_those_that_would_be_found(model):
    expected = model.generate(**TEXT, **GREEDY)
    assert torch.equal(model.generate(**TEXT, **GREEDY, position_ids=torch.arange(3).expand(3, 2, -1)), expected)
    assert torch.equal(model.generate(**TEXT, **GREEDY, logits_to_keep=1), expected)


def test_text_can_begin_from_nothing_but_a_first_token(model):
    expected = model.generate(torch.tensor([[20]]), **GREEDY)
    assert torch.equal(model.generate(**GREEDY, bos_token_id=20), expected)
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(**GREEDY)


def test_embeddings_as_a_prompt_are_read_or_refused_by_name(model):
    embeds = model.get_input_embeddings()(TEXT["input_ids"])
    expected = model.generate(**TEXT, **GREEDY)[:, 3:]
    works_or_is_refused(lambda: model.generate(inputs_embeds=embeds, **GREEDY), expected, "inputs_embeds")


# Caches and speculation -----------------------------------------------------------------------------------------------


def test_text_is_the_same_on_every_cache(model):
    expected = model.generate(**TEXT, **GREEDY)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(**TEXT, **GREEDY, cache_implementation=cache), expected)


def test_text_after_images_on_a_static_cache_is_the_same_or_refused(model):
    # One prompt may come out equal by luck.
    for seed in range(6):
        other = tiny_model(seed=seed)
        inputs = with_images(other)
        expected = other.generate(**inputs, **GREEDY)
        static = GREEDY | {"cache_implementation": "static"}
        works_or_is_refused(lambda m=other, i=inputs, o=static: m.generate(**i, **o), expected, "cache")


def test_what_a_prompt_repeats_can_be_guessed_ahead(model):
    one = {"input_ids": torch.tensor([[20, 21, 22, 20, 21]])}
    expected = model.generate(**one, **GREEDY)
    assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(**one, **GREEDY, assistant_model=tiny_model(seed=1)), expected)
