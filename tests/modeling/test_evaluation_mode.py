"""What samples or scores gives the same in training mode, with dropout and gradient checkpointing, as in evaluation."""

import threading

import pytest
import torch
from PIL import Image
from reference_nextflow import as_batch
from test_generation import mixed_prompts, negative, prompts, text_rows
from test_modeling import special_tokens
from tiny import tiny_model, tiny_processor
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

from transformers_nextflow import ImageSampling, NextFlowPipeline
from transformers_nextflow.trainers.rl.rollouts import generate_rollouts
from transformers_nextflow.utils.evaluation_mode import evaluation_mode


SEED = torch.Generator().manual_seed
COLORS = ("red", "blue")


def drawn(model):
    inputs = prompts(model.config, mixed_prompts(model.config)) | negative(prompts(model.config, [[], [30, 31], [32]]))
    sampling = ImageSampling(guidance_scale=2.0)
    sizes = [(16, 16)] * 3
    return model.generate_images(**inputs, image_sizes=sizes, sampling=sampling, generator=SEED(0)).image_tokens


def interleaved(model):
    inputs = as_batch(text_rows(model.config), *special_tokens(model.config))[1]
    greedy = {"sampling": ImageSampling(temperature=0), "do_sample": False}
    return model.generate_interleaved(**inputs, min_images=1, max_new_tokens=4, **greedy).input_ids


def written(model):
    inputs = as_batch(text_rows(model.config), *special_tokens(model.config))[1]
    return model.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=None)


def scored(model):
    images = [Image.new("RGB", (16, 16), color) for color in COLORS]
    scores = NextFlowPipeline(model, tiny_processor()).score(images, ["a red circle", "one"])
    return torch.stack([scores.image_given_text, scores.text_given_image])


def videoed(model):
    pipe = NextFlowPipeline(model, tiny_processor())
    video = pipe.video([["a red circle", "two blue squares"]], generator=SEED(0), guidance_scale=1.0)
    return torch.tensor([list(frame.tobytes()) for frame in video.frames[0]])


def rolled(model):
    rows = [{"prompt": "a red circle"}, {"prompt": "one"}]
    rollouts, _ = generate_rollouts(model, tiny_processor(), rows, ImageSampling(), generator=SEED(0))
    return torch.stack([rollout.image_tokens for rollout in rollouts])


def drawn_by_tokenflow(model):
    inputs = tiny_t2i_processor().apply_image_prompt(["one", "a red circle"])
    sampling = type(model.default_image_sampling)(top_k=20)
    return model.generate_images(**inputs, sampling=sampling, generator=SEED(0)).image_tokens


@pytest.mark.parametrize("ability", [drawn, interleaved, written, scored, videoed, rolled, drawn_by_tokenflow])
def test_training_mode_gives_what_evaluation_mode_gives(ability):
    build = tiny_t2i_model if ability is drawn_by_tokenflow else tiny_model
    model = build(text_config={"attention_dropout": 0.5})
    expected = ability(model)
    model.train()
    assert torch.equal(ability(model), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # A part of its own mode keeps it.
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(ability(model), expected)
    assert [module.training for module in model.modules()] == modes


def test_the_mode_comes_back_after_an_error_and_evaluation_is_left_alone():
    model = tiny_model()
    model.train()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate_interleaved(torch.tensor([[20]]), max_new_tokens=-1)
    assert model.training and model.model.language_model.layers[0].training
    model.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert not model.training


def test_training_mode_comes_back_when_the_last_of_several_calls_in_threads_ends():
    model, other = tiny_model().train(), tiny_model().train()
    begun, ends = threading.Event(), threading.Event()

    def call():
        with evaluation_mode(model.model):
            begun.set()
            ends.wait()

    thread = threading.Thread(target=call)
    with evaluation_mode(model):
        thread.start()
        begun.wait()
    # The call on a part goes on, and another model has nothing to do with it.
    assert not any(module.training for module in model.model.modules()) and model.training and other.training
    ends.set()
    thread.join()
    assert [module.training for module in model.modules()] == [module.training for module in other.modules()]
