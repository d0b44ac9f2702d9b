"""Rewards of images: the checker, the model's own reading, and functions around small random models."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import (
    BatchFeature,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from transformers_nextflow.generation.cached_sequences import CachedSequences
from transformers_nextflow.generation.likelihood import log_likelihoods, score_answers
from transformers_nextflow.trainers.rl.checked_reward import validated_reward
from transformers_nextflow.trainers.rl.rewards import (
    ask_for_caption,
    color_classifier,
    geneval_reward,
    judge_reward,
    named,
    reading_reward,
    rendered_text_reward,
    similarity_reward,
)
from transformers_nextflow.trainers.rl.rewards.detected_objects import COLORS, relations
from transformers_nextflow.trainers.rl.rewards.rendered_text import edit_distance, quoted_text
from transformers_nextflow.worlds.shapes import (
    Requirement,
    check,
    drawing_example,
    parse_caption,
    render,
    text_to_image_suite,
)
from transformers_nextflow.worlds.shapes.language import draw_category
from transformers_nextflow.worlds.shapes.rewards import WORLD, ask_about_shapes, shapes_reward


def make_image(color: str = "red", size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), color)


# The shapes world -----------------------------------------------------------------------------------------------------


def test_the_checker_rewards_what_was_asked_for_and_halves_it_for_more():
    rng = np.random.default_rng(0)
    text, scene, _ = draw_category(rng, WORLD, "single_object", places=False)
    _, fuller, _ = draw_category(rng, WORLD, "two_objects", places=False)
    wanted = parse_caption(text, WORLD)
    while not check(fuller, Requirement(wanted.items)).lenient:
        _, fuller, _ = draw_category(rng, WORLD, "two_objects", places=False)
    other = make_image("black", WORLD.canvas)
    images = [Image.fromarray(render(scene, WORLD)), Image.fromarray(render(fuller, WORLD)), other]
    rewards = shapes_reward([text] * 3, images)
    assert rewards[0] == 1 and rewards[2] == 0
    assert rewards[1] == (0.5 if wanted.background in (None, fuller.background) else 0)
    assert shapes_reward(["an elephant"], images[:1]) == [None]


def test_true_images_get_the_full_reward():
    rng = np.random.default_rng(1)
    examples = [drawing_example(rng, WORLD) for _ in range(30)]
    images = [Image.fromarray(render(scene, WORLD)) for _, scene in examples]
    assert shapes_reward([text for text, _ in examples], images) == [1.0] * 30


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


def test_the_models_reading_by_name_is_a_copy_on_the_device_of_the_process(monkeypatch):
    model, read = tiny_model(), []
    monkeypatch.setattr(named, "reading_reward", lambda *args: read.append(args) or args)
    monkeypatch.setattr(named, "PartialState", lambda: Mock(device=torch.device("meta")))
    named.find_reward("reading", model, tiny_processor())
    ((copied, *_),) = read
    assert copied.device.type == "meta" and not any(weight.requires_grad for weight in copied.parameters())
    assert model.device.type == "cpu" and any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("has_end", [True, False], ids=["with an end token", "without"])
def test_questions_on_one_image_are_scored_as_in_passes_of_their_own(has_end, monkeypatch):
    model, processor = tiny_model(), tiny_processor()
    end_of_answer = [processor.tokenizer.eos_token_id] if has_end else []
    if not has_end:
        processor.tokenizer.eos_token = None
    codes = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(0))[[0, 1, 0]]
    grids = torch.tensor([[4, 4]] * 3)
    questions, answers = ["how many circles are there?", "one", "two blue squares"], ["one", "a green star", "two"]
    images_read, read = [], CachedSequences.read
    monkeypatch.setattr(
        CachedSequences, "read", lambda self, rows: images_read.append(len(rows.input_ids)) or read(self, rows)
    )
    found = score_answers(model, processor, codes, grids, questions, answers)
    assert images_read == [2]
    for row, (question, answer) in enumerate(zip(questions, answers)):
        start = processor.prompt_ids([question], [[(4, 4)]])[0]
        end = processor.tokenizer(answer, add_special_tokens=False)["input_ids"] + end_of_answer
        input_ids = torch.tensor([start + end])
        labels = torch.tensor([[-100] * len(start) + end])
        with torch.no_grad():
            expected = log_likelihoods(model, input_ids, labels, None, codes[[row]], grids[[row]])
        assert found.text[row].item() == pytest.approx(expected.text.item(), rel=1e-4)
        assert found.num_text_tokens[row] == expected.num_text_tokens == len(end)


def test_a_caption_is_asked_for_as_the_model_was_trained_on_it():
    assert ask_for_caption(tiny_processor())("a red circle") == [("describe the picture.", "a red circle")]


# Functions around other models ----------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    own = tiny_processor().tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer, pad_token=own.pad_token, eos_token=own.eos_token, model_max_length=32
    )


def tiny_clip() -> tuple[CLIPModel, CLIPProcessor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = tokenizer()
    text_config = sizes | {"vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config=text_config, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPModel(config), CLIPProcessor(images, words)


def test_similarity_is_the_cosine_of_both_embeddings():
    model, processor = tiny_clip()
    prompts, images = ["a red circle", "one"], [make_image("red"), make_image("blue", 32)]
    found = similarity_reward(model, processor)(prompts=prompts, completions=images)
    for prompt, image, value in zip(prompts, images, found):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        assert value == pytest.approx(float(torch.cosine_similarity(output.text_embeds, output.image_embeds)), abs=1e-5)
    scaled = similarity_reward(model, processor, scaled=True)(prompts=prompts, completions=images)
    assert scaled == pytest.approx([value * float(model.logit_scale.exp()) for value in found], rel=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_similarity_does_not_depend_on_the_prompts_beside(kind):
    model, processor = tiny_clip()
    if kind == "siglip":  # which looks at the last place, padding or not
        config = SiglipConfig(
            text_config=model.config.text_config.to_dict(), vision_config=model.config.vision_config.to_dict()
        )
        model = SiglipModel(config)
    reward = similarity_reward(model, processor)
    prompts = ["one", "a red circle and two blue squares and a star"]
    together = reward(prompts=prompts, completions=[make_image()] * 2)
    alone = [reward(prompts=[prompt], completions=[make_image()])[0] for prompt in prompts]
    assert together == pytest.approx(alone, abs=1e-5)


def test_similarity_says_that_a_prompt_is_longer_than_the_model_reads():
    model, processor = tiny_clip()
    length = model.config.text_config.max_position_embeddings
    with pytest.warns(UserWarning, match=f"reads {length} tokens of a prompt, and a prompt has"):
        similarity_reward(model, processor)(prompts=["one " * 2 * length], completions=[make_image()])


def test_a_judge_weighs_yes_against_no():
    model, processor = tiny_model(), tiny_processor()
    prompts, images = ["a red circle", "two blue squares"], [make_image("red"), make_image("blue")]
    reward = judge_reward(model, processor, answers=("one", "two"))
    found = reward(prompts=prompts, completions=images)
    for prompt, image, value in zip(prompts, images, found):
        asked = {"type": "text", "text": f"Does this image show {prompt}? Answer yes or no."}
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
    shown = [make_image(), make_image("blue")]
    with torch.no_grad():
        pixels = pixels_of(shown, return_tensors="pt").pixel_values
        read = words.batch_decode(model.generate(pixels, max_new_tokens=4, do_sample=False), skip_special_tokens=True)
    assert reward(prompts=["one", "two"], completions=shown, text=[read[0], None]) == [1.0, None]
    assert reward(prompts=['the word "zzzzzzzzzzzz"', "nothing"], completions=shown)[1] is None


@pytest.mark.parametrize("one, other, distance", [("", "", 0), ("cat", "", 3), ("cat", "cut", 1), ("ab", "ba", 2)])
def test_edit_distance_counts_letters(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_what_is_quoted_is_to_be_written():
    assert quoted_text('a sign with "open" and “late”') == "open late" and quoted_text("a sign") is None


def test_a_checked_reward_keeps_its_name():
    assert validated_reward(shapes_reward).__name__ == "shapes_reward"
    assert validated_reward(shapes_reward)(prompts=["an elephant"], completions=[make_image()]) == [None]


# A detector -----------------------------------------------------------------------------------------------------------


class SeenObjects(torch.nn.Module):
    """A detector and its processor at once: it sees what it is told, as (label, score, box)."""

    device = torch.device("cpu")

    def __init__(self, objects):
        super().__init__()
        self.config = YolosConfig(id2label={0: "cup", 1: "dog", 2: "tv"})
        self.objects = objects

    def forward(self, images=None, return_tensors=None):
        return BatchFeature({})

    def post_process_object_detection(self, outputs, threshold, target_sizes):
        labels, scores, boxes = zip(*self.objects) if self.objects else ((), (), ())
        names = list(self.config.id2label.values())
        numbers = torch.tensor([names.index(label) for label in labels], dtype=torch.long)
        return [{"labels": numbers, "scores": torch.tensor(scores), "boxes": torch.tensor(boxes).view(-1, 4)}]


def geneval_of(objects, include, exclude=None, **settings) -> float:
    """The reward of one red image in which a detector sees these objects."""
    detector = SeenObjects(objects)
    reward = geneval_reward(detector, detector, **settings)
    (value,) = reward(["a prompt"], [make_image(size=100)], include=[include], exclude=exclude and [exclude])
    return value


CUP, DOG = ("cup", 0.95, (0.0, 0.0, 20.0, 20.0)), ("dog", 0.5, (60.0, 2.0, 90.0, 22.0))


def item(label: str, count: int = 1, **more) -> dict:
    # Arrow fills what other rows have with None.
    return {"class": label, "count": count, "color": None, "position": None} | more


def test_geneval_wants_every_class_as_often_as_asked():
    assert geneval_of([CUP, DOG], [item("cup"), item("dog")]) == 1
    assert geneval_of([CUP], [item("cup"), item("dog")]) == 0.5
    assert geneval_of([CUP, DOG], [item("cup", 2)]) == 0
    assert geneval_of([], [item("cup")]) == 0


def test_geneval_counts_exactly_where_it_excludes_and_only_what_is_sure():
    unsure = ("cup", 0.5, (50.0, 0.0, 70.0, 20.0))
    assert geneval_of([CUP, CUP], [item("cup", 2)], [item("cup", 3)]) == 1
    assert geneval_of([CUP, CUP, CUP], [item("cup", 2)], [item("cup", 3)]) == 0.5
    assert geneval_of([CUP, CUP, unsure], [item("cup", 2)], [item("cup", 3)]) == 1
    assert geneval_of([CUP, unsure], [item("cup", 2)]) == 1


def test_geneval_wants_relations_between_the_boxes():
    assert geneval_of([CUP, DOG], [item("cup"), item("dog", position=["right of", 0])]) == 1
    assert geneval_of([CUP, DOG], [item("cup"), item("dog", position=["above", 0])]) == 0.5
    assert geneval_of([DOG], [item("cup"), item("dog", position=["right of", 0])]) == 0


def test_geneval_wants_colors_of_what_is_cut_out():
    def color_of(crops, label):
        return ["red" if crop.getpixel((0, 0)) == (255, 0, 0) and crop.size == (20, 20) else "blue" for crop in crops]

    assert geneval_of([CUP], [item("cup", color="red")], color_of=color_of) == 1
    # Boxes may be empty, or reach beyond the image.
    for box in ((5.0, 5.0, 5.0, 5.0), (100.0, 100.0, 101.0, 101.0), (-9.0, 90.0, 10.0, 120.0)):
        assert geneval_of([("cup", 0.9, box)], [item("cup", color="blue")], color_of=color_of) == 1
    assert geneval_of([CUP, DOG], [item("dog", color="red"), item("cup")], color_of=color_of) == 0.5


def test_relations_need_a_distance_and_may_be_two():
    box = (0, 0, 10, 10)
    assert relations(box, (100, 0, 110, 10)) == {"left of"}
    assert relations((0, 50, 10, 60), box) == {"below"}
    assert relations(box, (40, 40, 50, 50)) == {"left of", "above"}
    assert relations(box, (1, 1, 11, 11)) == set()


def test_geneval_names_what_it_cannot_judge():
    assert geneval_of([("tv", 0.9, (0, 0, 9, 9))], [item("screen")], label_names={"screen": "tv"}) == 1
    with pytest.raises(ValueError, match="knows no class 'screen'; give label_names"):
        geneval_of([], [item("screen")])
    with pytest.raises(ValueError, match="asks for the color 'red'; give color_of"):
        geneval_of([], [item("cup", color="red")])
    with pytest.raises(ValueError, match=r"requires nothing: its include is \[\]"):
        geneval_of([], [])
    with pytest.raises(ValueError, match="refers to none of the 2 items"):
        geneval_of([], [item("cup"), item("dog", position=["above", 2])])
    with pytest.raises(ValueError, match="position 'near' is none of left of"):
        geneval_of([], [item("cup"), item("dog", position=["near", 0])])


def test_geneval_runs_on_a_detector_of_transformers():
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=5, id2label={0: "cup", 1: "dog"},
    )  # fmt: skip
    processor = YolosImageProcessorPil(size={"height": 32, "width": 32})
    reward = geneval_reward(YolosForObjectDetection(config), processor, threshold=0.0)
    values = reward(["a cup"] * 2, [make_image(), make_image("blue", 24)], include=[[item("cup")]] * 2)
    assert len(values) == 2 and all(value in (0.0, 1.0) for value in values)


def test_colors_are_told_by_a_model_of_images_and_texts():
    model, processor = tiny_clip()
    colors = color_classifier(model, processor)([make_image(), make_image("blue")], "cup")
    assert len(colors) == 2 and set(colors) <= set(COLORS)
