"""`generate` with every cache and mode of transformers, with images in the prompt: the same tokens, or one sentence."""

import pytest
import torch
from reference_nextflow import as_batch
from test_generation import greedy_by_full_passes, silence, text_rows
from test_modeling import ATTENTIONS, attention, random_image, special_tokens
from tiny import tiny_model
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    WatermarkingConfig,
)


GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}


def batch_of(model, rows):
    return as_batch(rows, *special_tokens(model.config))[1]


def written(model, rows, **options):
    """What `generate` adds to rows."""
    inputs = batch_of(model, rows)
    output = model.generate(**inputs, **GREEDY | options)
    return output[:, inputs["input_ids"].shape[1] :]


def expected_of(model, rows, count=GREEDY["max_new_tokens"]):
    return greedy_by_full_passes(model, rows, count)


@pytest.mark.parametrize("read_last_scale", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_gives_the_tokens_of_full_passes(implementation, read_last_scale):
    model = tiny_model(read_last_scale=read_last_scale)
    model.set_attn_implementation(implementation)
    rows = text_rows(model.config)
    expected = expected_of(model, rows)
    assert torch.equal(written(model, rows, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config.text_config, max_cache_len=120)
    assert torch.equal(written(model, rows, past_key_values=cache), expected)
    alone = written(model, rows[:1], cache_implementation="static")
    assert torch.equal(alone, expected[:1])


def test_beams_and_several_answers_are_the_same_on_a_static_cache():
    model = tiny_model()
    rows = text_rows(model.config)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 1}):
        assert torch.equal(
            written(model, rows, **options, cache_implementation="static"), written(model, rows, **options)
        )


def test_a_compiled_decoding_step_on_a_static_cache_gives_the_same_tokens():
    model = tiny_model()
    rows = text_rows(model.config)[:1]
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled, "max_new_tokens": 3}
    assert torch.equal(written(model, rows, **options), expected_of(model, rows, 3))


def test_text_goes_on_from_a_static_cache_that_holds_images():
    model = tiny_model()
    rows = text_rows(model.config)
    inputs = batch_of(model, rows)
    cache = StaticCache(config=model.config.text_config, max_cache_len=200)
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)[:, inputs["input_ids"].shape[1] :]
    question = [40, random_image(model.config, seed=9), 41]
    longer = [[*row, *answer, *question] for row, answer in zip(rows, first.tolist())]
    assert torch.equal(written(model, longer, past_key_values=cache), expected_of(model, longer))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache_implementation": "offloaded"}, "'offloaded' moves the cache of a GPU to the CPU"),
        ({"cache_implementation": "offloaded_static"}, "'offloaded_static' moves"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size would split images"),
        ({"assistant_early_exit": 1}, "does not take assistant_early_exit=1"),
        ({"token_healing": True}, "does not take token_healing=True"),
        ({"codes_only": True}, "does not take codes_only"),
        ({"layout": object()}, "does not take layout"),
        ({"inputs_embeds": torch.zeros(3, 4, 32)}, "Images come with input_ids"),
    ],
)
def test_what_generate_cannot_carry_out_is_refused_by_name(options, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        written(model, text_rows(model.config), **options)


def test_a_static_cache_is_refused_with_flex_attention_which_would_misread_it():
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    cache = StaticCache(config=model.config.text_config, max_cache_len=20)
    for options in ({"cache_implementation": "static"}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="flex_attention cannot read a static cache"):
            model.generate(torch.tensor([[20, 21]]), **GREEDY, **options)
    with pytest.raises(ValueError, match="flex_attention cannot read a static cache"):
        model(torch.tensor([[20, 21]]), past_key_values=cache)


@pytest.mark.parametrize("mode", ["dola_layers", "penalty_alpha", "num_beam_groups"])
def test_modes_that_transformers_keeps_elsewhere_are_refused_though_their_code_is_trusted(mode):
    options = {
        "dola_layers": {"dola_layers": "low"},
        "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
        "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    }[mode]
    with pytest.raises(ValueError, match="only supports"):
        tiny_model().generate(torch.tensor([[20, 21]]), **GREEDY, **options, trust_remote_code=True)


def test_placeholders_without_images_are_refused_whoever_gives_the_positions():
    model = tiny_model()
    inputs = batch_of(model, [[20, random_image(model.config), 21]])
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    for options in ({}, {"position_ids": positions}):
        with pytest.raises(ValueError, match="1 whole images"):
            model.generate(ids, **GREEDY, **options)


@pytest.mark.parametrize("padded", [False, True])
def test_text_from_embeddings_is_that_from_their_tokens(padded):
    model = tiny_model()
    ids = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]) if padded else None
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, 4:]
    embeds = model.get_input_embeddings()(ids)
    for options in ({}, {"cache_implementation": "static"}, {"num_return_sequences": 1}):
        assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **options), expected)
    with_both = model.generate(ids, inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(with_both[:, 4:], expected)


@torch.no_grad()
def test_guidance_of_text_leads_away_from_the_negative_prompt():
    model = tiny_model()
    rows, negatives = text_rows(model.config)[:2], [[30, 31, 32], [33, 34, 35]]
    for use_cache in (True, False):
        guided = written(
            model, rows, guidance_scale=2.5, negative_prompt_ids=torch.tensor(negatives), use_cache=use_cache
        )
        ours, theirs = [list(row) for row in rows], [list(row) for row in negatives]
        for step in range(GREEDY["max_new_tokens"]):
            parts = [model(**batch_of(model, part)).logits[:, -1].log_softmax(-1) for part in (ours, theirs)]
            tokens = silence(parts[1] + 2.5 * (parts[0] - parts[1]), model.config).argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                ours[row].append(token)
                theirs[row].append(token)
                assert token == guided[row, step]


@pytest.mark.parametrize("with_image", [False, True])
def test_drafted_tokens_change_no_answer(with_image):
    model = tiny_model()
    image = [random_image(model.config, seed=1)] if with_image else []
    rows = [[20, *image, 21, 22, 23, 21, 22]]
    expected = expected_of(model, rows)
    # Looked up in the prompt, where slots and <eoi> follow too; drafted by another model, and by this one.
    assert torch.equal(written(model, rows, prompt_lookup_num_tokens=3), expected)
    for seed in (0, 1):
        assert torch.equal(written(model, rows, assistant_model=tiny_model(seed=seed)), expected)


def test_prompt_lookup_behind_an_image_drafts_no_slots():
    model = tiny_model()
    rows = [[20, random_image(model.config, seed=1), 20]]
    assert torch.equal(
        written(model, rows, prompt_lookup_num_tokens=5, max_matching_ngram_size=1), expected_of(model, rows)
    )


def test_assistants_that_cannot_follow_are_refused():
    model, rows = tiny_model(), [[20, 21, 22]]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=320, num_key_value_heads=2, **sizes))
    for assistant in (qwen, tiny_model(text_config={"vocab_size": 330})):
        with pytest.raises(ValueError, match="use a NextFlow with a text vocabulary of 320"):
            written(model, rows, assistant_model=assistant)
    with_fewer_codes = tiny_model(seed=1, vq_config={"codebook_size": 16})
    assert torch.equal(written(model, rows, assistant_model=with_fewer_codes), expected_of(model, rows))
    with pytest.raises(ValueError, match="probabilities of 352 classes, text and codes, with an assistant's of 336"):
        written(model, rows, assistant_model=with_fewer_codes, do_sample=True)
    image = [[20, random_image(model.config), 21]]
    sampled = written(model, image, assistant_model=tiny_model(seed=1), do_sample=True)
    assert sampled.shape == (1, 6) and sampled.max() < model.config.text_config.vocab_size


def test_settings_that_forbid_tokens_hold_beside_our_own():
    model = tiny_model()
    rows = text_rows(model.config)
    forbidden = expected_of(model, rows)[:, 0].tolist()
    tokens = written(model, rows, suppress_tokens=forbidden)
    assert not torch.isin(tokens, torch.tensor(forbidden)).any()
    marked = written(model, rows, watermarking_config=WatermarkingConfig(bias=5.0))
    assert marked.max() < model.config.text_config.vocab_size
    assert not torch.isin(marked, torch.tensor(special_tokens(model.config)[:3])).any()


@torch.no_grad()
def test_text_in_a_cache_needs_no_positions_and_prefixes_may_come_before_images():
    model = tiny_model()
    ids, mask = torch.tensor([[20, 21, 22, 23], [9, 9, 24, 25]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    rows = [[26, random_image(model.config, seed=2), 27], [28, random_image(model.config, seed=3), 29]]
    images = batch_of(model, rows)
    whole = dict(images, input_ids=torch.cat([ids, images["input_ids"]], 1))
    whole["attention_mask"] = torch.cat([mask, torch.ones_like(images["input_ids"])], 1)
    expected = model(**whole).logits[:, 4:]
    for cache in (DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, 80)):
        model(ids, attention_mask=mask, past_key_values=cache)
        logits = model(**images | {"attention_mask": whole["attention_mask"]}, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        # Images take fewer positions than columns.
        with pytest.raises(ValueError, match="holds images needs position_ids"):
            model(ids, past_key_values=cache)
    cache = DynamicCache(config=model.config.text_config)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has 1 columns, but covers 4 tokens in the cache and 1 behind"):
        model(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)


SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_writes_the_same_text_and_no_codes(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    # Behind <boi> codes are likely.
    model.visual_head.weight.data *= 4
    requests = [[20, 21, 22, 23], [24, 25, model.config.boi_token_id]]
    expected = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in requests]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(requests, generation_config=config, continuous_batching_config=SMALL)
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert max(map(max, expected)) < model.config.text_config.vocab_size


def test_continuous_batching_refuses_images_padding_and_what_is_too_long():
    model = tiny_model()
    inputs = batch_of(model, [[20, random_image(model.config), 21]])
    with pytest.raises(ValueError, match="Continuous batching reads no images, and a prompt holds some"):
        model.generate_batch(inputs["input_ids"].tolist(), max_new_tokens=3)
    with pytest.raises(ValueError, match="Continuous batching reads no images, got image_tokens, image_grids"):
        model.generate(**inputs, **GREEDY, cache_implementation="paged")
    padded = {"input_ids": torch.tensor([[0, 20], [21, 22]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    with pytest.raises(ValueError, match="without padding"):
        model.generate(**padded, **GREEDY, cache_implementation="paged")
    with pytest.raises(ValueError, match="takes 515 positions, but the model has 512"):
        model.generate_batch([[20] * 505], max_new_tokens=10)
    manager = model.init_continuous_batching(GenerationConfig(eos_token_id=-1), SMALL)
    with pytest.raises(ValueError, match="Continuous batching reads no images"):
        manager.add_request(inputs["input_ids"][0].tolist())


@pytest.mark.parametrize("implementation", ATTENTIONS)
def test_the_first_pass_masks_blocks_though_the_cache_is_empty_and_given(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    rows = text_rows(model.config)
    with attention(implementation):
        expected = expected_of(model, rows, 3)
        cache = DynamicCache(config=model.config.text_config)
        assert torch.equal(written(model, rows, past_key_values=cache, max_new_tokens=3), expected)
        assert torch.equal(written(model, rows, use_cache=False, max_new_tokens=3), expected)
