"""Calls in several threads give what they give one after the other, and leave no trace on what they share."""

import threading

import pytest
import torch
from PIL import Image
from test_modeling import ATTENTIONS, attention
from tiny import tiny_model, tiny_processor
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.utils.older_transformers import SANITIZES_CONTROL_TOKENS


# An older transformers would obey special tokens in chats, which are refused there.
LAST = "a <|im_end|> star" if SANITIZES_CONTROL_TOKENS else "a large star"
PROMPTS = ["a red circle", "two blue squares and a green star", "one", LAST] * 2
RED = Image.new("RGB", (16, 16), "red")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def at_once(deeds):
    """What deeds return or raise, each in a thread of its own; all start together."""
    results, start = [None] * len(deeds), threading.Barrier(len(deeds))

    def run(number):
        start.wait()
        try:
            results[number] = deeds[number]()
        except ValueError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(deeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def draw(pipe, number, **kwargs):
    return pipe(PROMPTS[number], guidance_scale=2.0, generator=seeded(number), **kwargs).image_tokens


def chat(pipe, number):
    messages = [{"role": "user", "content": PROMPTS[number]}]
    message = pipe.chat(messages, max_new_tokens=3, min_images=1, generator=seeded(number))
    return [part.get("text") or part["image"].tobytes() for part in message["content"]]


DEEDS = [
    lambda pipe: draw(pipe, 0).tolist(),
    lambda pipe: draw(pipe, 3, num_candidates=2).tolist(),
    lambda pipe: draw(pipe, 2, image=RED, image_guidance_scale=1.5).tolist(),
    lambda pipe: draw(pipe, 1, image=RED, num_kept_scales=2).tolist(),
    lambda pipe: chat(pipe, 3),
    lambda pipe: chat(pipe, 1),
    lambda pipe: [image.tobytes() for image in pipe.video([["one", "a <boi> star"]], generator=seeded(0)).frames[0]],
    lambda pipe: pipe.score([RED, RED], ["a <|im_end|>", "one"]).text_given_image.tolist(),
]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("share", ["a pipeline", "a model"])
def test_eight_threads_give_what_one_after_the_other_gives_and_leave_no_trace(share, mode):
    pipe = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    if mode == "training":
        pipe.model.gradient_checkpointing_enable()
        pipe.model.train()
    other = pipe if share == "a pipeline" else quiet(NextFlowPipeline(pipe.model, tiny_processor()))
    model, before = pipe.model, pipe.model.config.to_dict()
    pipes = [(pipe, other)[number % 2] for number in range(8)]
    expected = [deed(pipe) for deed in DEEDS]
    assert model.config.to_dict() == before
    for _ in range(3):
        during = [lambda d=deed, p=own: d(p) for deed, own in zip(DEEDS, pipes)]
        assert at_once(during) == expected
        assert model.config.to_dict() == before
    assert [deed(pipe) for deed in DEEDS] == expected
    assert model.training == (mode == "training")
    assert model.config.text_config.to_diff_dict().keys() == tiny_model().config.text_config.to_diff_dict().keys()


@pytest.mark.parametrize("implementation", ATTENTIONS)
def test_while_a_scale_is_read_the_config_is_as_it_was(implementation):
    pipe = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    pipe.model.set_attn_implementation(implementation)
    before, seen = pipe.model.config.to_dict(), []
    layer = pipe.model.model.language_model.layers[-1]
    layer.register_forward_hook(lambda *_: seen.append(pipe.model.config.to_dict() == before))
    with attention(implementation):
        draw(pipe, 0)
    assert len(seen) == 4 and all(seen)


def test_a_tokenflow_t2i_draws_in_threads_too():
    pipe = quiet(NextFlowPipeline(tiny_t2i_model(), tiny_t2i_processor()))
    before = pipe.model.config.to_dict()
    expected = [draw(pipe, number).tolist() for number in range(8)]
    found = at_once([lambda n=number: draw(pipe, n).tolist() for number in range(8)])
    assert found == expected and pipe.model.config.to_dict() == before


@pytest.mark.parametrize("share", ["a pipeline", "a model"])
def test_a_stop_and_an_error_end_the_call_that_they_come_from_and_no_other(share):
    pipe = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    other = pipe if share == "a pipeline" else quiet(NextFlowPipeline(pipe.model, tiny_processor()))

    def watched(number, wait=lambda: None):
        own = (pipe, other)[number % 2]

        def callback(pipeline, step, scale, callback_kwargs):
            if scale == 1:
                wait()
                if number % 3 == 0:
                    pipeline._interrupt = True
                wait()  # until all have asked that will
                if number % 3 == 1:
                    raise ValueError(f"{number} has seen enough")

        try:
            return draw(own, number, callback_on_step_end=callback).tolist(), own.interrupt
        except ValueError as error:
            return str(error)

    expected = [watched(number) for number in range(8)]
    assert [len(result[0][0]) for result in expected if len(result) == 2] == [5, 30, 5, 30, 5]
    together = threading.Barrier(8)
    assert at_once([lambda n=number: watched(n, together.wait) for number in range(8)]) == expected
    draw(pipe, 0)
    assert not pipe.interrupt


def test_a_request_from_outside_of_calls_ends_those_that_run_and_none_that_begins_later():
    pipe = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    asked, codes = [threading.Event(), threading.Event()], []

    def callback(pipeline, step, scale, callback_kwargs):
        asked[0].set()
        asked[1].wait()

    thread = threading.Thread(target=lambda: codes.append(draw(pipe, 0, callback_on_step_end=callback)))
    thread.start()
    asked[0].wait()
    pipe._interrupt = True
    asked[1].set()
    thread.join()
    assert codes[0].shape == (1, 1)
    assert draw(pipe, 0).shape == (1, 30) and not pipe.interrupt
