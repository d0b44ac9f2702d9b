"""Rewards of pictures: the checker, the model's own reading, and functions around small random models."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from transformers_nextflow.evaluation.shapes import (
    Requirement,
    check,
    drawing_example,
    parse_caption,
    render,
    text_to_image_suite,
)
from transformers_nextflow.evaluation.shapes.language import draw_category
from transformers_nextflow.likelihood import score_answers
from transformers_nextflow.trainers.checked_reward import checked
from transformers_nextflow.trainers.rewards import (
    ask_about_shapes,
    ask_for_caption,
    judge_reward,
    reading_reward,
    rendered_text_reward,
    shapes_reward,
    similarity_reward,
)
from transformers_nextflow.trainers.rewards.rendered_text import edit_distance, quoted_text
from transformers_nextflow.trainers.rewards.shapes import WORLD


def picture(color: str = "red", size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), color)


# The shapes world -----------------------------------------------------------------------------------------------------


def test_the_checker_rewards_what_was_asked_for_and_halves_it_for_more():
    rng = np.random.default_rng(0)
    text, scene, _ = draw_category(rng, WORLD, "single_object", places=False)
    _, fuller, _ = draw_category(rng, WORLD, "two_objects", places=False)
    wanted = parse_caption(text, WORLD)
    while not check(fuller, Requirement(wanted.items)).lenient:
        _, fuller, _ = draw_category(rng, WORLD, "two_objects", places=False)
    other = picture("black", WORLD.canvas)
    pictures = [Image.fromarray(render(scene, WORLD)), Image.fromarray(render(fuller, WORLD)), other]
    rewards = shapes_reward([text] * 3, pictures)
    assert rewards[0] == 1 and rewards[2] == 0
    assert rewards[1] == (0.5 if wanted.background in (None, fuller.background) else 0)
    assert shapes_reward(["an elephant"], pictures[:1]) == [None]


def test_true_pictures_get_the_full_reward():
    rng = np.random.default_rng(1)
    examples = [drawing_example(rng, WORLD) for _ in range(30)]
    pictures = [Image.fromarray(render(scene, WORLD)) for _, scene in examples]
    assert shapes_reward([text for text, _ in examples], pictures) == [1.0] * 30


def answer(question: str, scene) -> str:
    """What a scene answers to the questions of `ask_about_shapes`, by plain counting."""
    words = question.rstrip("?").split()
    objects = scene.objects
    if question == "how many objects are there?":
        return str(len(objects))
    if question.startswith("how many") and words[3] == "objects":
        return str(sum(o.color == words[2] for o in objects))
    if question.startswith("how many"):
        return str(sum(words[2].startswith(o.shape) for o in objects))
    if question.startswith("is there"):
        return "yes" if any((o.color, o.shape) == (words[3], words[4]) for o in objects) else "no"
    if question.startswith("what shape"):
        cell = int(words[5]) - 1, int(words[7]) - 1
        return next(o.shape for o in objects if o.cell == cell)
    if question.startswith("is the"):
        first, second = (next(o for o in objects if o.shape == word) for word in (words[2], words[-1]))
        return {
            "left": lambda: first.column < second.column,
            "right": lambda: first.column > second.column,
            "above": lambda: first.row < second.row,
            "below": lambda: first.row > second.row,
        }[words[3]]() and "yes"
    assert question == "what color is the background?"
    return scene.background


def test_the_questions_of_a_prompt_are_answered_by_the_scenes_it_describes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text, scene = drawing_example(rng, WORLD)
        for question, expected in ask_about_shapes(text):
            assert answer(question, scene) == expected, (text, question)


def test_every_prompt_of_the_suite_can_be_asked_about():
    assert all(len(ask_about_shapes(prompt.text)) >= 2 for prompt in text_to_image_suite(WORLD, 5))


# The model's own reading ----------------------------------------------------------------------------------------------


def test_own_reading_is_the_mean_probability_of_the_right_answers():
    model, processor = tiny_model(), tiny_processor()
    codes = [torch.randint(32, (30,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)]
    asked = {"a red circle": [("how many circles are there?", "one")], "one": [("one", "two"), ("two", "one blue")]}
    reward = reading_reward(model.train(), processor, asked.get, batch_size=2)
    found = reward(prompts=list(asked), completions=[None] * 2, completion_ids=codes, image_grids=[(4, 4)] * 2)
    assert model.training
    model.eval()
    for row, (prompt, value) in enumerate(zip(asked, found)):
        probabilities = []
        for question, text in asked[prompt]:
            score = score_answers(
                model, processor, torch.tensor([codes[row]]), torch.tensor([[4, 4]]), [question], [text]
            )
            probabilities.append(float((score.text / score.num_text_tokens).exp()))
        assert value == pytest.approx(sum(probabilities) / len(probabilities), rel=1e-3)


def test_a_caption_is_asked_for_as_the_model_was_trained_on_it():
    assert ask_for_caption(tiny_processor())("a red circle") == [("describe the picture.", "a red circle")]


# Functions around other models ----------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    own = tiny_processor().tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer, pad_token=own.pad_token, eos_token=own.eos_token, model_max_length=32
    )


def test_similarity_is_the_cosine_of_both_embeddings():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = tokenizer()
    text_config = sizes | {"vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config=text_config, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8
    )
    model = CLIPModel(config)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(images, words)
    prompts, pictures = ["a red circle", "one"], [picture("red"), picture("blue", 32)]
    found = similarity_reward(model, processor)(prompts=prompts, completions=pictures)
    for prompt, image, value in zip(prompts, pictures, found):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        assert value == pytest.approx(float(torch.cosine_similarity(output.text_embeds, output.image_embeds)), abs=1e-5)
    scaled = similarity_reward(model, processor, scaled=True)(prompts=prompts, completions=pictures)
    assert scaled == pytest.approx([value * float(model.logit_scale.exp()) for value in found], rel=1e-4)


def test_a_judge_weighs_yes_against_no():
    model, processor = tiny_model(), tiny_processor()
    prompts, pictures = ["a red circle", "two blue squares"], [picture("red"), picture("blue")]
    reward = judge_reward(model, processor, answers=("one", "two"))
    found = reward(prompts=prompts, completions=pictures)
    for prompt, image, value in zip(prompts, pictures, found):
        asked = {"type": "text", "text": f"Does this picture show {prompt}? Answer yes or no."}
        messages = [{"role": "user", "content": [{"type": "image"}, asked]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[text], images=[[image]], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        one, two = (processor.tokenizer(word).input_ids[0] for word in ("one", "two"))
        assert value == pytest.approx(float(logits[[one, two]].softmax(0)[0]), abs=1e-5)
    with pytest.raises(ValueError, match="begin with the same token"):
        judge_reward(model, processor, answers=("one", "one two"))


def test_rendered_text_is_compared_with_what_was_asked_for():
    torch.manual_seed(0)
    words = tokenizer()
    vision = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    decoder = TrOCRConfig(
        vocab_size=len(words), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        cross_attention_hidden_size=16, max_position_embeddings=64, decoder_start_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    encoder = ViTModel(vision, add_pooling_layer=False)
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=TrOCRForCausalLM(decoder))
    model.generation_config.decoder_start_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    pixels_of = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})

    class Reader:
        batch_decode = staticmethod(words.batch_decode)

        def __call__(self, images, return_tensors):
            return pixels_of(images, return_tensors=return_tensors)

    reward = rendered_text_reward(model, Reader(), max_new_tokens=4)
    pictures = [picture(), picture("blue")]
    with torch.no_grad():
        pixels = pixels_of(pictures, return_tensors="pt").pixel_values
        read = words.batch_decode(model.generate(pixels, max_new_tokens=4, do_sample=False), skip_special_tokens=True)
    assert reward(prompts=["one", "two"], completions=pictures, text=[read[0], None]) == [1.0, None]
    assert reward(prompts=['the word "zzzzzzzzzzzz"', "nothing"], completions=pictures)[1] is None


@pytest.mark.parametrize("one, other, distance", [("", "", 0), ("cat", "", 3), ("cat", "cut", 1), ("ab", "ba", 2)])
def test_edit_distance_counts_letters(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_what_is_quoted_is_to_be_written():
    assert quoted_text('a sign with "open" and “late”') == "open late" and quoted_text("a sign") is None


def test_a_checked_reward_keeps_its_name():
    assert checked(shapes_reward).__name__ == "shapes_reward"
    assert checked(shapes_reward)(prompts=["an elephant"], completions=[picture()]) == [None]
