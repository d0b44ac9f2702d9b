"""Prompts for RL that are taken from rows of conversations."""

import json
from inspect import signature

import pytest
from datasets import Dataset
from PIL import Image
from tiny import tiny_processor

from transformers_nextflow.data import BadRowError
from transformers_nextflow.trainers.rl.prompt_rows import read_prompts
from transformers_nextflow.trainers.rl.rollouts import images_of


IMAGE = {"type": "image"}


def turn(role: str, *parts) -> dict:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def prompts_of(folder, *rows: list[dict]):
    lines = []
    for messages in rows:
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        lines.append({"messages": messages, "image_tokens": [[0]] * count, "image_grids": [[1, 1]] * count})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_prompts(folder / "rows.jsonl")


def test_a_prompt_is_the_first_turn_and_nothing_that_follows_its_image(tmp_path):
    drawing = [turn("user", "a red circle"), turn("assistant", IMAGE)]
    further = [turn("user", "how many things are there?"), turn("assistant", "1")]
    thought = [turn("user", "a plum"), turn("assistant", "a purple circle", IMAGE)]
    found = prompts_of(
        tmp_path,
        [*drawing, *further],
        [*further, *drawing],
        [turn("system", "be brief"), *thought],
        thought,
    )
    assert found["prompt"] == ["a red circle", "a plum"]


def test_images_of_a_prompt_are_not_left_out_where_only_their_codes_are_given(tmp_path):
    edit = [turn("user", IMAGE, "make it green"), turn("assistant", IMAGE)]
    with pytest.raises(BadRowError, match="row 0, image_tokens.*codes of the prompt's 1 images"):
        prompts_of(tmp_path, edit)


def test_rows_that_begin_without_a_drawing_are_no_prompts(tmp_path):
    with pytest.raises(ValueError, match="begins with a text of the user that an image answers"):
        prompts_of(tmp_path, [turn("system", "be brief"), turn("user", "a star"), turn("assistant", IMAGE)])


def test_fields_that_only_some_prompts_have_and_values_of_several_kinds_reach_the_reward(tmp_path):
    placed = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    rows = [{"prompt": "a dog", "include": placed[:1]}, {"prompt": "a cat", "include": placed, "exclude": placed[:1]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if "on_mixed_types" not in signature(Dataset.from_dict).parameters:
        with pytest.raises(ValueError, match="field 'include' .* holds values of different kinds"):
            read_prompts(tmp_path / "prompts.jsonl")
        return
    first, second = read_prompts(tmp_path / "prompts.jsonl")
    assert (first["exclude"], second["exclude"], second["include"]) == (None, placed[:1], placed)
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a", "weight": 1}\n{"prompt": "b", "weight": 1' + "0" * 20 + "}"
    )
    with pytest.raises(ValueError, match="field 'weight' of .*prompts.jsonl holds"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_images_of_a_file_of_prompts_lie_beside_it(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = [{"prompt": "blue", "image": "a.png"}, {"prompt": "red", "images": ["a.png", "https://example.org/b.png"]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_prompts(tmp_path / "prompts.jsonl")
    (image,) = tiny_processor().image_processor.to_rgb(images_of(first))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert images_of(second) == [str(tmp_path / "a.png"), "https://example.org/b.png"]
