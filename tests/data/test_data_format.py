"""The data format: what a row may hold, what is said of what it may not, which tokens are trained on."""

import json

import datasets
import pytest
import torch
from command_line import run_command
from PIL import Image
from test_trainer import codes, conversation, drawing, make_trainer, text
from tiny import tiny_model, tiny_processor, tiny_vq_config

from transformers_nextflow.data import (
    BadRowError,
    load_image,
    open_rows,
    read_row,
    tokenizer_fingerprint,
    validate_rows,
)
from transformers_nextflow.data.segments import encode_messages
from transformers_nextflow.trainers import NextFlowCollator
from transformers_nextflow.video_processing_nextflow import write_frames
from transformers_nextflow.vision_tokenizer import fingerprint


@pytest.fixture
def folder(tmp_path):
    """A folder with images, one of them animated, and files that are none."""
    for name, color in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{name}.png")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (160, 16)).save(tmp_path / "wide.png")
    return tmp_path


def image(path) -> dict:
    return {"type": "image", "image": path}


def row_of(*parts, answer="one") -> dict:
    return {"messages": conversation(list(parts), [text(answer)])}


def colors(sample) -> list[tuple]:
    return [load_image(image).convert("RGB").getpixel((0, 0)) for image in sample.images]


# What a row may hold --------------------------------------------------------------------------------------------------


def test_images_come_as_paths_bytes_images_and_in_a_list_beside_the_messages(folder):
    red = Image.open(folder / "red.png")
    data = (folder / "red.png").read_bytes()
    for given in ("red.png", str(folder / "red.png"), red, data, {"bytes": data, "path": None}, {"path": "red.png"}):
        sample = read_row(row_of(image(given), text("one")), folder)
        assert colors(sample) == [(255, 0, 0)] and sample.fields == ["messages[0].content[0].image"]
    beside = row_of({"type": "image"}, text("one"), {"type": "image"}) | {"images": ["red.png", "blue.png"]}
    sample = read_row(beside, folder)
    assert colors(sample) == [(255, 0, 0), (0, 0, 255)] and sample.fields == ["images[0]", "images[1]"]


def test_a_video_is_a_image_for_each_frame(folder):
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sample = read_row(row_of({"type": "video", "video": "video.gif"}, text("one")), folder)
    assert colors(sample) == expected and sample.num_images == 3
    assert read_row(row_of({"type": "video", "video": "video.gif"}, text("one")), folder).num_images == 3
    sample = read_row(row_of({"type": "video", "video": ["red.png", "blue.png"]}, text("one")), folder)
    assert sample.fields[1] == "messages[0].content[0].video[1]"
    sample = read_row(row_of({"type": "video", "video": ["red.png", "blue.png"]}, text("one")), folder)
    assert colors(sample) == [expected[0], expected[2]]
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "image", "text"]


def test_plain_strings_and_the_empty_fields_of_arrow_are_read(folder):
    plain = {"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "one"}]}
    assert read_row(plain).messages == conversation([text("how many?")], [text("one")])
    part = {"type": "text", "text": "how many?", "image": None, "video": None, "train": None}
    filled = {"messages": [{"role": "user", "content": [part], "train": None}], "images": None, "image_tokens": None}
    assert read_row(filled).messages == [{"role": "user", "content": [text("how many?")]}]


@pytest.mark.parametrize(
    "row, message",
    [
        ([], "row: must be an object"),
        ({}, "messages: must be a list of at least one message, got None"),
        ({"messages": []}, "messages: must be a list of at least one message"),
        ({"messages": ["red"]}, r"messages\[0\]: must be an object with role and content"),
        ({"messages": [{"role": "human", "content": "a"}]}, r"messages\[0\].role: must be one of .* got 'human'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: must be a text or a list of parts, got None"),
        (row_of({"type": "sound"}), r"messages\[0\].content\[0\].type: must be text, image or video"),
        (row_of({"type": "video", "video": b"GIF"}), r"content\[0\].video: must be .* the path of a video, got bytes"),
        (row_of({"type": "text"}), r"messages\[0\].content\[0\].text: must be a string, got None"),
        (row_of(text("a") | {"train": 1}), r"messages\[0\].content\[0\].train: must be true or false, got 1"),
        (row_of(image("none.png")), r"messages\[0\].content\[0\].image: there is no file .*none.png"),
        (row_of(image(3)), r"messages\[0\].content\[0\].image: must be a path or an image, got int"),
        (row_of({"type": "image"}), r"messages\[0\].content\[0\].image: the image is given neither here"),
        (row_of({"type": "video"}), r"messages\[0\].content\[0\].video: must be a list of images"),
        (row_of({"type": "video", "video": ["red.png", "x.png"]}), r"video\[1\]: there is no file"),
        (row_of({"type": "video", "video": "text.png"}), "video: the video cannot be read"),
        (row_of({"type": "image"}) | {"images": ["red.png"] * 2}, "images: holds 2 images for 1 image parts"),
        ({"messages": conversation([image("red.png")], [image("red.png")])}, "messages: there is no text part"),
        (drawing("a", 1) | {"image_labels": []}, "image_labels: the messages hold 1 images, but there are 0"),
        (drawing("a", 1) | {"image_grids": None}, "image_grids: the messages hold 1 images, but there are none"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_by_its_field(row, message, folder):
    with pytest.raises(BadRowError, match=message):
        read_row(row, folder)


# The validator --------------------------------------------------------------------------------------------------------


def rows_with_bad_images(folder) -> list[dict]:
    return [row_of(image(name), text("one")) for name in ("red.png", "broken.png", "none.png", "wide.png", "blue.png")]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_validator_names_row_and_field_and_goes_on(folder):
    schedules = tiny_model().config.vq_config.scale_schedules
    rows = rows_with_bad_images(folder) + [{"messages": []}]
    report = validate_rows(rows, folder, schedules)
    assert (report.rows, report.images, report.skipped, report.num_problems) == (6, 4, 0, 4)
    starts = ["row 1, messages[0].content[0].image: the image cannot be read"]
    starts += [
        "row 2, messages[0].content[0].image: there is no file",
        "row 3, messages[0].content[0].image: The aspect",
    ]
    for problem, start in zip(report.problems, starts):
        assert problem.startswith(start)
    assert report.problems[3].startswith("row 5, messages: must be a list")
    skipping = validate_rows(rows, folder, schedules, on_bad_image="skip")
    assert (skipping.skipped, skipping.num_problems) == (3, 1) and skipping.problems == report.problems[3:]


def test_the_validator_checks_codes():
    model = tiny_model()
    config, fingerprint = model.config.vq_config, tokenizer_fingerprint(model.vq_model)
    good = drawing("one", 1) | {"tokenizer_fingerprint": fingerprint}
    rows = [
        good,
        drawing("one", 1),
        good | {"image_tokens": [codes(1)[:-1]]},
        good | {"image_labels": [[32] + codes(1)[1:]]},
        good | {"image_grids": [[4, 40]]},
        good | {"tokenizer_fingerprint": "0" * 16},
    ]
    report = validate_rows(rows, ".", config.scale_schedules, config.codebook_size, fingerprint)
    expected = [
        "row 2, image_tokens[0]: the grid [4, 4] takes 30 codes, got 29",
        "row 3, image_labels[0]: codes run from 0 to 31, got",
        "row 4, image_grids[0]: [4, 40] is not a final grid",
        f"row 5, tokenizer_fingerprint: the codes come from the tokenizer {'0' * 16}, the model's is {fingerprint}",
    ]
    assert report.num_problems == 4
    assert all(problem.startswith(start) for problem, start in zip(report.problems, expected))


def test_the_command_validates_files_and_datasets(folder):
    tiny_model().vq_model.save_pretrained(folder / "tokenizer")
    rows = rows_with_bad_images(folder)
    write_lines(folder / "rows.jsonl", rows[:1])
    ok = run_command("validate-data", folder / "rows.jsonl", "--model", folder / "tokenizer")
    assert ok.exit_code == 0 and ok.stdout == "1 rows, 1 images, 0 rows skipped, 0 problems\n"
    (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text() + "\n{'a'}\n" + json.dumps(rows[1]))
    bad = run_command("validate-data", folder / "rows.jsonl", "--on-bad-image", "skip")
    assert bad.exit_code == 1 and bad.stdout == "3 rows, 2 images, 1 rows skipped, 1 problems\n"
    assert "row 1, row: is not valid JSON" in bad.stderr
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("red.png", "broken.png")]
    string = datasets.Value("string")
    messages = [{"role": string, "content": [{"type": string, "text": string}]}]
    features = datasets.Features({"messages": messages, "images": datasets.List(datasets.Image())})
    row = row_of({"type": "image"}, text("one"))
    data = [row | {"images": [image]} for image in images]
    for one in data:
        for message in one["messages"]:
            message["content"] = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
    datasets.Dataset.from_list(data, features).save_to_disk(folder / "saved")
    saved = run_command("validate-data", folder / "saved")
    assert saved.exit_code == 1 and "row 1, images[0]: the image cannot be read" in saved.stderr
    nothing = run_command("validate-data", folder / "none.jsonl")
    assert nothing.exit_code == 2 and "There is no file or folder" in nothing.stderr


# What is trained on ---------------------------------------------------------------------------------------------------


def trained_text(messages, chat_template=None) -> str:
    processor = tiny_processor()
    processor.chat_template = chat_template or processor.chat_template
    ids, trained = encode_messages(processor, messages)
    return processor.tokenizer.decode([token for token, on in zip(ids, trained) if on])


def test_a_flag_on_a_message_or_a_part_says_what_is_trained_on():
    def messages(user=None, assistant=None, first=None, second=None):
        def flag(value):
            return {} if value is None else {"train": value}

        parts = [text("two blue") | flag(first), {"type": "image"}, text("a star") | flag(second)]
        turn = {"role": "user", "content": parts} | flag(user)
        answer = {"role": "assistant", "content": [text("one")]} | flag(assistant)
        return [turn, answer, *conversation([text("how many?")], [text("circles")])]

    end = "<|im_end|>"
    assert trained_text(messages()) == f"one{end}circles{end}"
    assert trained_text(messages(assistant=False)) == f"circles{end}"
    assert trained_text(messages(assistant=False, second=True)) == f"a starcircles{end}"
    assert trained_text(messages(user=True)) == f"two blue<|image_pad|>a starone{end}circles{end}"
    assert trained_text(messages(user=True, first=False)) == f"<|image_pad|>a starone{end}circles{end}"
    # Flags that say what holds anyway change nothing.
    assert trained_text(messages(user=False, assistant=True)) == trained_text(messages())


SAID = "message.content | map(attribute='text') | join"
TURN = "{%- generation -%}{{- (" + SAID + ") ~ '<|im_end|>' -}}{%- endgeneration -%}"


def template_with(condition: str) -> str:
    """A template that marks the answers that meet a condition, and writes no end of the others."""
    template = "{%- for message in messages -%}{%- if message.role == 'assistant' and (" + condition + ") -%}" + TURN
    return template + "{%- else -%}{{- " + SAID + " -}}{%- endif -%}{%- endfor -%}"


@pytest.mark.parametrize("answer", ["one", ""])
def test_a_flag_belongs_to_its_own_turn_whichever_turns_the_template_marks(answer):
    first, second = conversation([text("one")], [text(answer)]), conversation([text("a star")], [text("circles")])
    for flag in (True, False):
        first[1]["train"], second[1]["train"] = not flag, flag
        expected = ["" if flag else answer, "circles<|im_end|>" if flag else ""]
        assert trained_text([*first, *second], template_with("loop.last")) == "".join(expected)


def test_flags_are_refused_where_the_template_treats_an_empty_answer_apart():
    messages = [*conversation([text("one")], [text("")]), *conversation([text("one")], [text("two")])]
    messages[1]["train"] = False
    with pytest.raises(ValueError, match='treats empty ones apart, so "train" cannot say'):
        trained_text(messages, template_with(SAID))


def test_a_image_of_the_user_can_be_trained_on():
    row = drawing("one", 1)
    row["messages"][0]["content"].append({"type": "image", "train": True})
    row |= {"image_tokens": [codes(1), codes(2)], "image_grids": [[4, 4]] * 2}
    ids, labels = NextFlowCollator(tiny_processor()).encode(row)
    ends = [n for n, token in enumerate(ids) if token == tiny_processor().eoi_token_id]
    assert [labels[end] != -100 for end in ends] == [True, True]


def test_text_cannot_pretend_to_be_a_mark_or_an_image():
    with pytest.raises(ValueError, match="U"):
        trained_text(conversation([text("a \ufdd0") | {"train": True}], [text("one")]))
    ids, _ = NextFlowCollator(tiny_processor()).encode(row_of(text("<|image_pad|>")))
    assert tiny_processor().image_token_id not in ids


def test_a_template_that_writes_more_images_than_there_are_is_refused():
    processor = tiny_processor()
    processor.chat_template = processor.chat_template.replace('"<|im_end|>" -', '"<|image_pad|><|im_end|>" -')
    with pytest.raises(BadRowError, match="more images than they hold"):
        NextFlowCollator(processor).encode(row_of(text("one")))


# In training ----------------------------------------------------------------------------------------------------------


def test_rows_without_codes_give_the_loss_of_rows_with_codes(folder):
    model, processor = tiny_model(), tiny_processor()
    rows = [
        row_of(image("red.png"), text("one")),
        row_of(image("wide4.png"), text("one"), {"type": "text", "text": "two"}),
    ]
    Image.new("RGB", (32, 8), "blue").save(folder / "wide4.png")
    rows[0]["messages"][1]["content"] = [image("blue.png")]
    collator = NextFlowCollator(processor, root=folder)
    batch = collator(rows)
    assert "image_tokens" not in batch and batch["pixel_values"].shape == (3, 3, 16, 32)
    coded = []
    for row in rows:
        sample = read_row(row, folder)
        pixels = [processor.image_processor(load_image(p), return_tensors="pt") for p in sample.images]
        tokens = [model.get_image_tokens(p["pixel_values"], p["image_grids"])[0].tolist() for p in pixels]
        grids = [p["image_grids"][0].tolist() for p in pixels]
        coded.append({"messages": sample.messages, "image_tokens": tokens, "image_grids": grids})
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**collator(coded)).loss)
    assert collator.size(rows[0]) == collator.size(coded[0])
    with pytest.raises(ValueError, match="1 of 2 rows with images hold codes"):
        collator([rows[0], coded[1]])


def test_the_trainer_refuses_codes_of_another_tokenizer(tmp_path):
    model, other = tiny_model(), tiny_model(seed=1)
    row = drawing("one", 1) | {"tokenizer_fingerprint": tokenizer_fingerprint(model.vq_model)}
    make_trainer(tmp_path, model, [row], max_steps=1).train()
    with pytest.raises(BadRowError, match="the codes come from the tokenizer .* extract them again"):
        make_trainer(tmp_path, other, [row], max_steps=1).train()


def test_a_fingerprint_outlives_half_precision_and_new_decoders_but_no_other_change(tmp_path):
    model = tiny_model().vq_model
    before = tokenizer_fingerprint(model)
    with torch.no_grad():
        model.pixel_decoder.output_projection.weight.add_(1)
    assert tokenizer_fingerprint(model) == before
    model.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)) == before
    model.config.upsample = "nearest"
    assert tokenizer_fingerprint(model) != before
    model.config.upsample = "bicubic"
    with torch.no_grad():
        model.quantizer.pixel_codebook.weight[0, 0] += 1
    assert tokenizer_fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        {"semantic_layer": -2},
        {"levels": [[12, 3], [16, 4]]},
        {"image_size": 18},
        {"semantic_config": tiny_vq_config().semantic_config.to_dict() | {"num_attention_heads": 4}},
        {"semantic_config": tiny_vq_config().semantic_config.to_dict() | {"hidden_act": "relu"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_fingerprint_tells_settings_that_change_codes(change):
    same, other = tiny_model().vq_model, tiny_model(vq_config=change).vq_model
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(same)


@torch.no_grad()
def test_a_fingerprint_tells_every_weight_that_decides_codes():
    model = tiny_model().vq_model
    before = tokenizer_fingerprint(model)
    for name, weight in model.named_parameters():
        kept = weight.clone()
        weight.view(-1)[-1] += 1
        assert (tokenizer_fingerprint(model) == before) == ("_decoder." in name), name
        weight.copy_(kept)


@pytest.mark.parametrize(
    "change, interpolates",
    [
        ({}, True),
        ({"downsample": "rotary", "upsample": "rotary"}, False),
        ({"downsample": "rotary", "upsample": "rotary", "image_size": 18}, True),
        ({"downsample": "nearest", "upsample": "bilinear"}, True),
    ],
    ids=["area and bicubic", "rotary", "resized pixels", "bilinear"],
)
def test_a_fingerprint_tells_how_a_tokenizer_interpolates_where_it_does(change, interpolates, monkeypatch):
    model = tiny_model(vq_config=change).vq_model
    before = tokenizer_fingerprint(model)
    monkeypatch.setattr(fingerprint, "RESAMPLED_BY", {})
    assert (tokenizer_fingerprint(model) != before) == interpolates


def test_a_fingerprint_does_not_ask_for_decoders_and_training():
    model = tiny_model().vq_model
    before = tokenizer_fingerprint(model)
    model.config.commitment_weight, model.config.semantic_decoder_heads = 1.0, 1
    model.config.semantic_config.attention_dropout = 0.5
    model.config.use_cache = False  # as transformers' `Trainer` leaves it
    assert tokenizer_fingerprint(model) == before


def test_rows_stream_from_json_lines_through_datasets(folder):
    rows = [row_of(image("red.png"), text("one")), row_of(text("how many?"))]
    path = write_lines(folder / "rows.jsonl", rows)
    read, root = open_rows(path)
    assert list(read) == rows and root == folder and len(read) == 2 and read[1] == rows[1]
    stream = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
    collator = NextFlowCollator(tiny_processor(), root=folder)
    for given, streamed in zip(rows, stream):
        assert collator.encode(streamed) == collator.encode(given)
    batch, expected = collator(list(stream)), collator(rows)
    assert all(torch.equal(batch[name], value) for name, value in expected.items())


def test_a_video_may_be_an_mp4(folder):
    pytest.importorskip("imageio_ffmpeg")
    write_frames([Image.new("RGB", (16, 16), color) for color in ("red", "blue")], folder / "video.mp4")
    assert read_row(row_of({"type": "video", "video": "video.mp4"}, text("one")), folder).num_images == 2
