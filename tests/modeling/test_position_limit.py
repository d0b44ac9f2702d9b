"""Sequences of more positions than the backbone has are refused, before anything is read or encoded."""

import pytest
import torch
from PIL import Image
from reference_nextflow import as_batch
from test_generation import negative, prompts
from test_modeling import random_image, special_tokens
from test_packing import chat, mixed_rows, packed_and_padded
from tiny import tiny_model, tiny_processor
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

from transformers_nextflow import ImageSampling, NextFlowPipeline
from transformers_nextflow.generation.likelihood import score_answers, score_images
from transformers_nextflow.trainers import NextFlowCollator
from transformers_nextflow.trainers.rl.rollouts import generate_rollouts
from transformers_nextflow.utils.older_transformers import CACHE_KEYWORD


SAMPLING = ImageSampling(guidance_scale=2.0)
GREEDY = {"do_sample": False, "eos_token_id": None}


def model_of(limit, **kwargs):
    """A model that fails as soon as its backbone or its tokenizer is called."""
    model = tiny_model(text_config={"max_position_embeddings": limit}, **kwargs)

    def fail(*_):
        raise AssertionError("The work has begun.")

    model.model.language_model.register_forward_pre_hook(fail)
    model.vq_model.encode = fail
    return model


def refused(count, limit):
    return pytest.raises(ValueError, match=rf"takes {count} positions, but the model has {limit} \(max_position_embed")


def begins():
    return pytest.raises(AssertionError, match="The work has begun")


def with_room(positions, call, **kwargs):
    """`call` needs so many positions: one less is refused before any work."""
    with refused(positions, positions - 1):
        call(model_of(positions - 1, **kwargs))
    with begins():
        call(model_of(positions, **kwargs))


@pytest.mark.parametrize("read_last_scale", [False, True])
def test_a_pass_counts_positions_and_not_tokens(read_last_scale):
    def call(model):
        row = [20, random_image(model.config, seed=1), 21, random_image(model.config, seed=2)]
        _, inputs = as_batch([row, [22]], *special_tokens(model.config))
        assert inputs["input_ids"].shape[1] > 60
        model(**inputs, labels=inputs["input_ids"])

    # An image of four scales takes five positions, <boi> and <eoi> included; reading the last scale one more.
    with_room(2 + 2 * (5 + read_last_scale), call, read_last_scale=read_last_scale)


@pytest.mark.parametrize(
    "count, ask",
    [
        (16, lambda model, ids, pixels: model(ids, **pixels)),
        (20, lambda model, ids, pixels: model.generate(ids, **pixels, **GREEDY, max_new_tokens=4)),
        (20, lambda model, ids, pixels: model.generate_interleaved(ids, **pixels, max_new_tokens=4, max_images=0)),
    ],
    ids=["forward", "generate", "interleaved"],
)
def test_pixels_are_not_encoded_for_a_sequence_that_is_too_long(count, ask):
    def call(model):
        _, inputs = as_batch([[20, *[random_image(model.config)] * 3]], *special_tokens(model.config))
        pixels = {"pixel_values": torch.zeros(3, 3, 16, 16), "image_grids": inputs["image_grids"]}
        ask(model, inputs["input_ids"], pixels)

    with_room(count, call)


@pytest.mark.parametrize("padded", [False, True])
def test_a_loop_of_ones_own_on_a_cache_ends_at_the_limit(padded):
    model = tiny_model(text_config={"max_position_embeddings": 8})
    ids = torch.tensor([[20, 21, 22, 23, 24, 25]] * 2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2) if padded else None
    cache = model(ids, attention_mask=mask).get(CACHE_KEYWORD)
    for _ in range(4 if padded else 2):
        mask = mask if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    with refused(9, 8):
        mask = mask if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_text_counts_what_it_may_write():
    ids, mask = torch.tensor([[20, 21, 22, 23], [0, 0, 24, 25]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"num_return_sequences": 1}):
        with_room(10, lambda model, more=options: model.generate(ids, **GREEDY, max_new_tokens=6, **more))
    with_room(10, lambda model: model.generate(ids, **GREEDY, max_length=10))
    # Padding takes no positions.
    with_room(8, lambda model: model.generate(ids[1:], attention_mask=mask[1:], **GREEDY, max_new_tokens=6))
    embeds = torch.zeros(2, 4, 32)
    with_room(10, lambda model: model.generate(inputs_embeds=embeds, **GREEDY, max_new_tokens=6))


@pytest.mark.parametrize("read_last_scale", [False, True])
def test_drawing_counts_the_image_behind_each_prompt(read_last_scale):
    def call(model):
        rows, negatives = (
            prompts(model.config, [[20, random_image(model.config), 21], [22, 23]]),
            negative(prompts(model.config, [[], [30] * 5])),
        )
        sizes = [(16, 16), (8, 32)]
        model.generate_images(**rows, **negatives, image_sizes=sizes, sampling=SAMPLING)

    with_room(2 + 2 * (5 + read_last_scale), call, read_last_scale=read_last_scale)

    def call(model):
        rows, negatives = prompts(model.config, [[20]]), negative(prompts(model.config, [[30] * 20]))
        model.generate_images(**rows, **negatives, image_sizes=[(16, 16)], sampling=SAMPLING)

    with_room(25 + read_last_scale, call, read_last_scale=read_last_scale)


def test_interleaved_generation_counts_text_and_images_to_come():
    def call(model):
        inputs = as_batch([[20, 21], [22] * 4], *special_tokens(model.config))[1]
        contexts = negative(prompts(model.config, [[], [30, 31]]))
        model.generate_interleaved(**inputs, **contexts, max_new_tokens=6, max_images=3, sampling=SAMPLING)

    with_room(4 + 6 + 3 * 5, call)


def videos(model, **kwargs):
    NextFlowPipeline(model, tiny_processor()).video(guidance_scale=1.0, **kwargs)


def length_of(text, answer=None):
    return tiny_processor().apply_image_prompt([text], answer=answer)["input_ids"].shape[1]


def test_videos_count_all_frames_and_texts():
    script = ["a red circle", "two blue squares", "one"]
    words = tiny_processor().tokenizer([script[1:]][0], add_special_tokens=False)["input_ids"]
    # The prompt ends with the first <boi>.
    count = length_of(script[0]) - 1 + sum(map(len, words)) + 3 * 5
    with_room(count, lambda model: videos(model, prompt=[script]))
    given = Image.new("RGB", (16, 16))
    # The prompt begins with the given frame, and its answer with the first text.
    start = length_of(script[0], answer="") + 5
    with_room(start + sum(map(len, words)) + 2 * 5, lambda model: videos(model, prompt=[script], image=given))
    with_room(
        length_of("one") + 4 * 3 + 4 * 5,
        lambda model: videos(model, prompt="one", num_frames=4, max_transition_tokens=3),
    )


def test_chats_and_scores_count_their_images():
    processor, image = tiny_processor(), Image.new("RGB", (16, 16))
    content = [{"type": "image", "image": image}] * 3 + [{"type": "text", "text": "how many circles are there?"}]
    chat_of = [{"role": "user", "content": content}]
    count = len(processor.tokenizer("how many circles are there?")["input_ids"])
    around = length_of("one", answer="") - len(processor.tokenizer("one")["input_ids"])
    with_room(
        around + count + 3 * 5 + 2,
        lambda model: NextFlowPipeline(model, processor).chat(chat_of, max_images=0, max_new_tokens=2),
    )
    codes, grids = torch.zeros(2, 30).long(), torch.tensor([[4, 4]] * 2)
    questions, answers = ["one", "how many circles are there?"], ["one", "two blue squares"]
    count = 5 + length_of(questions[1], answer=answers[1]) + 1
    with_room(count, lambda model: score_answers(model, processor, codes, grids, questions, answers))
    count = length_of("a red circle") + 4
    with_room(count, lambda model: score_images(model, processor, codes[:1], grids[:1], ["a red circle"]))


def test_rollouts_and_training_rows_are_counted():
    rows = [{"prompt": "a red circle"}]
    with_room(
        length_of("a red circle") + 4, lambda model: generate_rollouts(model, tiny_processor(), rows, ImageSampling())
    )
    processor = tiny_processor()
    packed, padded = packed_and_padded(processor, mixed_rows(processor))
    longest = int(tiny_model().model.layout_batch(
        padded["input_ids"], padded["attention_mask"], image_tokens=padded["image_tokens"],
        image_grids=padded["image_grids"],
    ).position_ids[0].max()) + 1  # fmt: skip
    for batch in (packed, padded):
        # The samples of a packed row count each by itself.
        with_room(longest, lambda model, inputs=batch: model(**inputs))
    batch = NextFlowCollator(processor)([chat("one " * 40, "two")])
    with_room(batch["input_ids"].shape[1], lambda model: model(**batch))


def test_tokenflow_t2i_counts_a_position_for_each_code():
    inputs = tiny_t2i_processor().apply_image_prompt(["one"])
    count = inputs["input_ids"].shape[1] + tiny_t2i_model().config.schedule.num_tokens - 1
    model = tiny_t2i_model(text_config={"max_position_embeddings": count - 1})
    with refused(count, count - 1):
        model.generate_images(**inputs, sampling=type(model.default_image_sampling)())
    with refused(count, count - 1):
        model(**inputs, image_tokens=torch.zeros(1, model.config.schedule.num_tokens).long())
    tiny_t2i_model(text_config={"max_position_embeddings": count}).generate_images(
        **inputs, sampling=type(model.default_image_sampling)()
    )
