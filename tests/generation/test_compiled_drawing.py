"""Drawing by recorded scales: the codes of the plain way, few recordings, and a word where it does not serve."""

import threading
from pathlib import Path

import pytest
import torch
from test_generation import draw, mixed_prompts, negative, prompts, schedules_of
from test_golden_codes import prompts as golden_prompts
from tiny import tiny_model

from transformers_nextflow import ImageSampling, NextFlowPipeline
from transformers_nextflow.generation import compiled_drawing
from transformers_nextflow.generation.compiled_drawing import Recording, prompt_columns
from transformers_nextflow.sequence.ragged_keys import RaggedKeys, attend_ragged


SQUARES = [(16, 16)] * 3
SETTINGS = [
    {},
    {"guidance_scale": 3.0},
    {"guidance_scale": 3.0, "guidance_ramp": True, "num_unguided_scales": 2},
]


def inputs_of(config, rows):
    return prompts(config, rows) | negative(prompts(config, [[], [30, 31], [32]]))


def both_ways(model, schedules, inputs, **kwargs):
    expected = draw(model, schedules, inputs, **kwargs)
    model.compile_drawing()
    return expected, draw(model, schedules, inputs, **kwargs)


def assert_same(expected, found):
    assert torch.equal(found[0].image_tokens, expected[0].image_tokens)
    for row, other in zip(found[1], expected[1], strict=True):
        for scale, reference in zip(row, other, strict=True):
            torch.testing.assert_close(scale, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "guided", "ramp, unguided last scales"])
@pytest.mark.parametrize("options", [{}, {"read_last_scale": True, "accumulate_features": True}], ids=["paper", "all"])
def test_codes_and_logits_are_those_of_the_plain_way(options, settings):
    model = tiny_model(**options)
    inputs, schedules = inputs_of(model.config, mixed_prompts(model.config)), schedules_of(model.config, SQUARES)
    sampling = ImageSampling(top_k=20, **settings)
    expected, found = both_ways(model, schedules, inputs, sampling=sampling)
    assert_same(expected, found)
    # Other prompts, seeds and given codes on the same recordings.
    recorded = [*model.compiled_drawing.kinds.values()][0].recordings
    before = dict(recorded)
    inputs = inputs_of(model.config, [[24, 25], [26], [27, 28, 29]])
    model.compile_drawing(False)
    given = expected[0].image_tokens[:, :5]
    plain = draw(model, schedules, inputs, seed=5, sampling=sampling, given_image_tokens=given)
    model.compile_drawing()
    assert_same(plain, draw(model, schedules, inputs, seed=5, sampling=sampling, given_image_tokens=given))
    assert before.keys() == recorded.keys()


def test_prompts_of_any_length_up_to_a_size_share_the_recordings(monkeypatch):
    model, made = tiny_model(), []
    monkeypatch.setattr(compiled_drawing, "Recording", lambda *args: made.append(1) or Recording(*args))
    model.compile_drawing()
    schedules = schedules_of(model.config, [(16, 16)])
    for length in (1, 7, 60, 63):
        draw(model, schedules, prompts(model.config, [[20] * length]))
    assert len(made) == schedules[0].num_scales - 1
    draw(model, schedules, prompts(model.config, [[20] * 64]))
    assert len(made) == 2 * (schedules[0].num_scales - 1)
    assert [prompt_columns(length) for length in (1, 64, 65, 1024, 1025, 5000)] == [64, 64, 128, 1024, 2048, 5120]


def test_weights_that_change_in_place_and_those_that_move_are_seen():
    model = tiny_model()
    inputs, schedules = prompts(model.config, [[20, 21]]), schedules_of(model.config, [(16, 16)])
    model.compile_drawing()
    draw(model, schedules, inputs)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(-1)
    for change in (lambda: None, lambda: model.to(torch.float64).to(torch.float32)):
        change()
        found = draw(model, schedules, inputs)
        compiled, model.compiled_drawing = model.compiled_drawing, None
        assert_same(draw(model, schedules, inputs), found)
        model.compiled_drawing = compiled


@pytest.mark.parametrize("moved", ["language_model.layers.1.mlp.down_proj", "visual_embedding.scale"])
def test_one_weight_that_moves_is_seen_though_others_stay(moved):
    model = tiny_model()
    inputs, schedules = prompts(model.config, [[20, 21]]), schedules_of(model.config, [(16, 16)])
    model.compile_drawing()
    draw(model, schedules, inputs)
    draw(model, schedules, inputs)
    assert len(model.compiled_drawing.kinds) == 1
    weight = model.model.get_submodule(moved).weight
    weight.data = weight.data.clone()  # as when an adapter is moved away and back
    draw(model, schedules, inputs)
    assert len(model.compiled_drawing.kinds) == 2


@pytest.mark.parametrize("case", ["sizes", "attention", "thread"])
def test_what_cannot_be_compiled_is_drawn_the_plain_way_and_says_so(case, monkeypatch):
    model, said = tiny_model(), []
    monkeypatch.setattr(compiled_drawing.logger, "warning", said.append)
    ratios = [(16, 16), (8, 32), (16, 16)] if case == "sizes" else SQUARES
    if case == "attention":
        model.set_attn_implementation("eager")
    inputs, schedules = inputs_of(model.config, [[20], [21, 22], [23]]), schedules_of(model.config, ratios)
    expected = draw(model, schedules, inputs)
    model.compile_drawing()
    if case == "thread":
        model.compiled_drawing._lock.acquire()
    assert_same(expected, draw(model, schedules, inputs))
    reason = {"sizes": "differ in size", "attention": "'eager'", "thread": "another thread"}[case]
    assert len(said) == 1 and reason in said[0]


def test_only_so_many_kinds_are_kept():
    model = tiny_model()
    model.compile_drawing()
    for count in range(1, 7):
        schedules = schedules_of(model.config, [(16, 16)] * count)
        draw(model, schedules, prompts(model.config, [[20]] * count))
    kept = [len(kind.schedules) for kind in model.compiled_drawing.kinds]
    assert kept == [3, 4, 5, 6]


def test_a_recording_is_played_for_each_scale_and_threads_do_not_meet():
    model = tiny_model()
    inputs, schedules = prompts(model.config, [[20, 21]]), schedules_of(model.config, [(16, 16)])
    expected = draw(model, schedules, inputs)
    model.compile_drawing()
    results = []
    threads = [threading.Thread(target=lambda: results.append(draw(model, schedules, inputs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert_same(expected, found)


def test_the_fused_backbone_draws_the_same(monkeypatch):
    model = tiny_model()
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: plain_compile(module, backend="eager", **kwargs))
    inputs, schedules = inputs_of(model.config, [[20], [21, 22], [23]]), schedules_of(model.config, SQUARES)
    sampling = ImageSampling(guidance_scale=2.0)
    expected = draw(model, schedules, inputs, sampling=sampling)
    model.compile_drawing(fuse=True)
    assert_same(expected, draw(model, schedules, inputs, sampling=sampling))


def test_keys_before_a_start_are_not_read():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = (torch.randn(2, 2, 12, 8, generator=generator) for _ in range(2))
    module = tiny_model().model.language_model.layers[0].self_attn
    output = attend_ragged(module, query, key, value, RaggedKeys(torch.tensor([0, 5], dtype=torch.int32), 9))
    for row, start in enumerate((0, 5)):
        keys, values = (states[row : row + 1, :, start:9].repeat_interleave(2, dim=1) for states in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(query[row : row + 1], keys, values)
        torch.testing.assert_close(output[row : row + 1], expected.transpose(1, 2))


def test_64_prompts_keep_their_codes():
    pipe = NextFlowPipeline.from_pretrained(Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes")
    pipe.set_progress_bar_config(disable=True)
    tokens = []
    for is_compiled in (False, True):
        pipe.model.compile_drawing(is_compiled)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(64)]
        tokens.append(pipe(golden_prompts(), generator=seeds).image_tokens)
    assert torch.equal(*tokens) and pipe.model.compiled_drawing.kinds
