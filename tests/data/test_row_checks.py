"""What training refuses, validation reports, and the other way round: the same rows, by the same fields and words."""

import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from test_trainer import CODES, codes, conversation, drawing, make_trainer, question, text, training_arguments
from tiny import tiny_model, tiny_processor
from torch.utils.data import DataLoader

from transformers_nextflow.data import BadRowError, read_row, tokenizer_fingerprint, validate_rows
from transformers_nextflow.data.row_errors import BadImageError
from transformers_nextflow.data.rows import NumberedRows
from transformers_nextflow.data.sources import JsonLines
from transformers_nextflow.data.validation import validate_source
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer
from transformers_nextflow.trainers.recipe_data import StageImages, StageRows


MODEL, PROCESSOR = tiny_model(), tiny_processor()
FINGERPRINT = tokenizer_fingerprint(MODEL.vq_model)
DRAWING, QUESTION = drawing("one", 1), question("how many?", "one", 2)
SAMPLED = {"image_labels": [codes(3)], "image_clean_tokens": [codes(4)]}
# With as many codes as the grid of (7, 2) has.
TALL = PROCESSOR.image_processor.schedule_for_grid(7, 2).num_tokens
IMAGE = {"type": "image", "image": "red.png"}


def changed(*parts, **fields) -> dict:
    """A drawing with other fields, or with other parts in its question."""
    row = DRAWING | fields
    return row | {"messages": conversation(list(parts), DRAWING["messages"][1]["content"])} if parts else row


def first_replaced(value, seed: int = 1) -> list:
    return [[value, *codes(seed)[1:]]]


def raw(*parts) -> dict:
    return {"messages": conversation([text("one"), *parts], [text("two")])}


def turn(**fields) -> dict:
    """A conversation whose answer differs."""
    question, answer = DRAWING["messages"]
    return DRAWING | {"messages": [question, answer | fields]}


BAD_CODES = {
    "surplus codes": (changed(image_tokens=[codes(1, 40)]), "image_tokens[0]"),
    "codes of another grid": (changed(image_grids=[[7, 2]]), "image_tokens[0]"),
    "too few codes": (changed(image_tokens=[codes(1, CODES - 1)]), "image_tokens[0]"),
    "no codes": (changed(image_tokens=[[]]), "image_tokens[0]"),
    "surplus labels": (changed(image_labels=[codes(1, 40)]), "image_labels[0]"),
    "too few labels": (changed(image_labels=[codes(1, 3)]), "image_labels[0]"),
    "a code beyond the codebook": (changed(image_tokens=first_replaced(32)), "image_tokens[0]"),
    "a negative code": (changed(image_tokens=first_replaced(-1)), "image_tokens[0]"),
    "a code beyond all numbers": (changed(image_tokens=first_replaced(2**70)), "image_tokens[0]"),
    "a label beyond the codebook": (changed(image_labels=first_replaced(32)), "image_labels[0]"),
    "a negative label": (changed(image_labels=first_replaced(-1)), "image_labels[0]"),
    "a clean code beyond the codebook": (
        changed(**SAMPLED | {"image_clean_tokens": first_replaced(99)}),
        "image_clean_tokens[0]",
    ),
    "a grid that no schedule has": (changed(image_grids=[[4, 40]]), "image_grids[0]"),
    "a grid of no level": (changed(image_grids=[[3, 3]]), "image_grids[0]"),
    "codes of another tokenizer": (changed(tokenizer_fingerprint="0" * 16), "tokenizer_fingerprint"),
}
BAD_ROWS = {
    "a fraction": (changed(image_tokens=first_replaced(1.9)), "image_tokens[0]"),
    "a whole fraction": (changed(image_tokens=first_replaced(1.0)), "image_tokens[0]"),
    "a fraction as label": (changed(image_labels=first_replaced(1.9)), "image_labels[0]"),
    "no number": (changed(image_tokens=first_replaced(float("nan"))), "image_tokens[0]"),
    "a truth value": (changed(image_tokens=first_replaced(True)), "image_tokens[0]"),
    "a string as code": (changed(image_tokens=first_replaced("1")), "image_tokens[0]"),
    "a null as code": (changed(image_tokens=first_replaced(None)), "image_tokens[0]"),
    "a string of codes": (changed(image_tokens=["1" * CODES]), "image_tokens[0]"),
    "a null for an image": (changed(image_tokens=[None]), "image_tokens[0]"),
    "lists too deep": (changed(image_tokens=[[codes(1)]]), "image_tokens[0]"),
    "lists too flat": (changed(image_tokens=codes(1)), "image_tokens"),
    "a number for codes": (changed(image_tokens=3), "image_tokens"),
    "a string for codes": (changed(image_tokens="3"), "image_tokens"),
    "an object for codes": (changed(image_tokens={0: codes(1)}), "image_tokens"),
    "NaN for codes": (changed(image_tokens=float("nan")), "image_tokens"),
    "floats in an array": (changed(image_tokens=[np.array(codes(1), float)]), "image_tokens[0]"),
    "truth values in an array": (changed(image_tokens=[np.ones(CODES, bool)]), "image_tokens[0]"),
    "an array of two axes": (changed(image_tokens=[np.array([codes(1)])]), "image_tokens[0]"),
    "floats in a tensor": (changed(image_tokens=torch.tensor([codes(1)]).bfloat16()), "image_tokens[0]"),
    "floats of Arrow": (changed(image_tokens=pa.array([[1.5] * CODES])), "image_tokens[0]"),
    "codes of two images": (changed(image_tokens=[codes(1), codes(2)]), "image_tokens"),
    "codes without grids": (changed(image_grids=None), "image_grids"),
    "labels without codes": (raw(IMAGE) | {"image_labels": [codes(1)]}, "image_tokens"),
    "a number for codes of no image": (raw() | {"image_tokens": 3}, "image_tokens"),
    "labels of no image": (changed(image_labels=[]), "image_labels"),
    "one side of a grid": (changed(image_grids=[[4]]), "image_grids[0]"),
    "three sides of a grid": (changed(image_grids=[[4, 4, 4]]), "image_grids[0]"),
    "a flat grid": (changed(image_grids=[4]), "image_grids[0]"),
    "a grid of nothing": (changed(image_grids=[[0, 4]]), "image_grids[0]"),
    "a grid of fractions": (changed(image_grids=[[4.0, 4.5]]), "image_grids[0]"),
    "a grid of a string": (changed(image_grids=["44"]), "image_grids[0]"),
    "clean codes without labels": (changed(image_clean_tokens=[codes(4)]), "image_labels[0]"),
    "clean codes of another length": (
        changed(**SAMPLED | {"image_clean_tokens": [codes(4, 3)]}),
        "image_clean_tokens[0]",
    ),
    "sampled codes of an image that is read": (QUESTION | {"image_labels": [codes(3)]}, "image_tokens[0]"),
    "a number as fingerprint": (changed(tokenizer_fingerprint=3), "tokenizer_fingerprint"),
    "no messages": ({"image_tokens": []}, "messages"),
    "a number for messages": ({"messages": 3}, "messages"),
    "a role of another kind": ({"messages": [{"role": "tool", "content": "one"}]}, "messages[0].role"),
    "a list as role": ({"messages": [{"role": ["user"], "content": "one"}]}, "messages[0].role"),
    "a number as content": (turn(content=3), "messages[1].content"),
    "NaN as content": (turn(content=float("nan")), "messages[1].content"),
    "a thought beside the content": (turn(thinking="a circle"), "messages[1].thinking"),
    "a misspelt flag": (turn(trian=False), "messages[1].trian"),
    "a flag of a message that is no truth value": (turn(train="false"), "messages[1].train"),
    "a flag of a part that is no truth value": (changed(text("one") | {"train": 0}), "messages[0].content[0].train"),
    "a part of no type": (changed({"text": "one"}), "messages[0].content[0].type"),
    "a list as type": (changed({"type": ["text"], "text": "one"}), "messages[0].content[0].type"),
    "a string as part": (changed("one"), "messages[0].content[0].type"),
    "a text that is none": (changed({"type": "text", "text": 3}), "messages[0].content[0].text"),
    "half of a surrogate pair": (changed(text("one \ud83d")), "messages[0].content[0].text"),
    "half of a pair as content": (turn(content="\udc00"), "messages[1].content"),
    "a mark of ours": (changed(text("one \ufdd0")), "messages[0].content[0].text"),
    "a text with an image": (changed(text("one") | {"image": "red.png"}), "messages[0].content[0].image"),
    "an image with a text": (raw(IMAGE | {"text": "two"}), "messages[0].content[1].text"),
    "an image twice": (raw(IMAGE) | {"images": ["red.png"]}, "images"),
    "images for no part": (raw() | {"images": ["red.png"]}, "images"),
    "a string for images": (raw({"type": "image"}) | {"images": "red.png"}, "images"),
    "no image": (raw({"type": "image"}), "messages[0].content[1].image"),
    "an image that is not there": (raw({"type": "image", "image": "none.png"}), "messages[0].content[1].image"),
    "an image with half a pair": (raw({"type": "image", "image": "\ud83d.png"}), "messages[0].content[1].image"),
    "an image of a long name": (raw({"type": "image", "image": "x" * 5000}), "messages[0].content[1].image"),
    "a folder for an image": (raw({"type": "image", "image": "."}), "messages[0].content[1].image"),
    "an array for an image": (raw({"type": "image", "image": np.zeros((4, 4, 3))}), "messages[0].content[1].image"),
    "a broken image": (raw({"type": "image", "image": "broken.png"}), "messages[0].content[1].image"),
    "an image of NaN": (
        raw({"type": "image", "image": Image.fromarray(np.full((8, 8), np.nan, np.float32))}),
        "messages[0].content[1].image",
    ),
    "an image that is too wide": (raw({"type": "image", "image": "wide.png"}), "messages[0].content[1].image"),
    "an image of no width": (
        raw({"type": "image", "image": Image.new("RGB", (0, 8))}),
        "messages[0].content[1].image",
    ),
    "nothing to be learned": ({"messages": [{"role": "user", "content": "one"}]}, "messages"),
    "an answer that is not trained on": (
        raw() | {"messages": [{"role": "assistant", "content": "one", "train": False}]},
        "messages",
    ),
}
EDIT = {
    "messages": conversation([{"type": "image"}, text("one")], [{"type": "image"}]),
    "image_tokens": [codes(5), codes(6)],
    "image_labels": [None, codes(7)],
    "image_clean_tokens": [None, codes(8)],
    "image_grids": [[4, 4]] * 2,
}
GOOD_ROWS = {
    "a drawing": DRAWING,
    "a question": QUESTION,
    "of that tokenizer": changed(tokenizer_fingerprint=FINGERPRINT),
    "another grid": changed(image_tokens=[codes(1, TALL)], image_grids=[[7, 2]]),
    "text": raw(),
    "text with the empty fields of Arrow": raw() | {"image_tokens": None, "image_grids": [], "images": []},
    "a text as content": {"messages": [{"role": "system", "content": "😀"}, {"role": "assistant", "content": "one"}]},
    "nulls of Arrow": turn(train=None, name=None) | {"image_labels": None, "image_clean_tokens": [None]},
    "columns of their own": changed(length=3, image_id="red", score=float("nan")),
    "sampled codes": changed(**SAMPLED),
    "sampled codes of one image": EDIT,
    "a question about clean codes": QUESTION | SAMPLED,
    "an image that is not trained on": turn(train=False, content=[{"type": "image"}, text("two") | {"train": True}]),
    "flags of numpy": turn(train=np.True_),
    "codes beside a broken image": changed(text("one"), {"type": "image", "image": "broken.png"})
    | {"image_tokens": [codes(1), codes(2)], "image_grids": [[4, 4]] * 2},
    "an image": raw(IMAGE),
    "an image that was opened": raw({"type": "image", "image": Image.new("L", (8, 8))}),
    "images beside": raw({"type": "image"}) | {"images": ["red.png"]},
    "a video": raw({"type": "video", "video": ["red.png", "red.png"]}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    Image.new("RGB", (160, 16)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    return folder


@pytest.fixture(scope="module")
def collator(folder):
    """As a trainer has it."""
    collator = make_trainer(folder, MODEL, [DRAWING]).data_collator
    assert (collator.codebook_size, collator.tokenizer_fingerprint) == (32, FINGERPRINT)
    collator.root = folder
    return collator


def validated(row, folder, with_processor: bool = True, with_tokenizer: bool = True) -> list[str]:
    config = MODEL.config.vq_config
    tokenizer = (config.scale_schedules, config.codebook_size, FINGERPRINT) if with_tokenizer else ()
    return validate_rows([row], folder, *tokenizer, processor=PROCESSOR if with_processor else None).problems


def by_name(*cases: dict):
    rows = {name: case for group in cases for name, case in group.items()}
    return pytest.mark.parametrize("case", rows.values(), ids=rows)


@by_name(BAD_ROWS, BAD_CODES)
def test_a_row_that_training_refuses_is_reported_in_the_same_words(case, folder, collator):
    row, field = case
    with pytest.raises(BadRowError) as refused:
        collator([NumberedRows([row])[0]])
    said = str(refused.value)
    assert said.startswith(f"row 0, {field}: ") and len(said) < 400
    assert "\n" not in said and said.encode()
    assert validated(row, folder) == validated(row, folder, with_processor=False) == [said]


@by_name(BAD_ROWS)
def test_what_no_model_is_needed_for_is_reported_without_one(case, folder):
    (problem,) = validated(case[0], folder, with_processor=False, with_tokenizer=False)
    assert problem.startswith(f"row 0, {case[1]}: ")


@by_name(GOOD_ROWS)
def test_a_row_that_is_reported_good_is_trained_on(case, folder, collator):
    assert validated(case, folder) == validated(case, folder, with_processor=False) == []
    assert validated(case, folder, with_processor=False, with_tokenizer=False) == []
    with torch.no_grad():
        assert torch.isfinite(MODEL(**collator([NumberedRows([case])[0]])).loss)


@pytest.mark.parametrize("row", ["a row", ["a row"], None])
def test_what_is_no_row_is_named_by_its_number(row, folder):
    with pytest.raises(BadRowError, match="^row 0, row: must be an object with messages") as refused:
        NumberedRows([row])[0]
    assert validated(row, folder) == [str(refused.value)]
    with pytest.raises(BadRowError, match="^row 0, row: must be an object"):
        NumberedRows(StageRows([row], PROCESSOR, caption_share=1.0))[0]


@by_name(BAD_ROWS, BAD_CODES)
def test_a_stage_leaves_bad_rows_to_the_one_check(case, folder, collator):
    for options in ({"level": 16}, {"empty_share": 1.0}, {"caption_share": 1.0}):
        stage = NumberedRows(StageRows([case[0]], PROCESSOR, **options))
        try:
            collator([stage[0]])
        except BadRowError as error:
            assert str(error).startswith("row 0, ")
        else:
            # A drawing that is turned round has no labels.
            assert "caption_share" in options and case[1] == "image_labels[0]"


# Codes as arrays ------------------------------------------------------------------------------------------------------


def arrays() -> dict:
    ragged = pa.array([codes(1)])
    return {
        "int64": [np.array(codes(1))],
        "uint8": [np.array(codes(1), np.uint8)],
        "big-endian": [np.array(codes(1), ">i4")],
        "reversed": [np.array(codes(1)[::-1])[::-1]],
        "objects": [np.array(codes(1), object)],
        "numbers of numpy": [list(np.array(codes(1)))],
        "two axes": np.array([codes(1)]),
        "tuples": (tuple(codes(1)),),
        "tensors": [torch.tensor(codes(1))],
        "a tensor of int16": torch.tensor([codes(1)], dtype=torch.int16),
        "Arrow": ragged,
        "a scalar of Arrow": pa.array([[codes(1)]])[0],
        "scalars of Arrow": [ragged[0]],
        "an array of Arrow": [pa.array(codes(1), pa.int32())],
    }


@pytest.mark.parametrize("kind", arrays())
def test_codes_come_as_lists_and_arrays_of_any_kind(kind, collator, folder):
    expected = collator([DRAWING])
    grids = {"tensors": torch.tensor([[4, 4]]), "Arrow": pa.array([[4, 4]]), "two axes": np.array([[4, 4]])}
    row = changed(image_tokens=arrays()[kind], image_grids=grids.get(kind, [[4, 4]]))
    batch = collator([row])
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    assert validated(row, folder) == []


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_of_a_formatted_dataset_are_read(kind, collator):
    rows = [DRAWING, QUESTION]
    batch, expected = collator(list(datasets.Dataset.from_list(rows).with_format(kind))), collator(rows)
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    emptied = StageRows(datasets.Dataset.from_list(rows[:1]).with_format(kind), PROCESSOR, empty_share=1.0)[0]
    assert read_row(emptied).messages[0]["content"] == [text("")]


# Sets of rows ---------------------------------------------------------------------------------------------------------


def test_rows_with_and_without_codes_are_reported(folder):
    rows = [raw(), DRAWING, QUESTION, raw(IMAGE), raw()]
    report = validate_rows(rows, folder)
    assert report.problems == [
        "row 3, image_tokens: row 1 holds codes, this row none; extract the codes of all rows, or of none"
    ]
    report = validate_rows(rows[::-1], folder)
    expected = "image_tokens: row 1 holds no codes, this row does; extract the codes of all rows, or of none"
    assert report.problems == [f"row {number}, {expected}" for number in (2, 3)]


def test_the_folder_of_a_model_has_texts_checked_by_its_template(folder, tmp_path, collator):
    processor = tiny_processor()
    processor.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    MODEL.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "system", "content": "one"}]}\n')
    with pytest.raises(BadRowError, match="^messages: .* cannot be written by the chat template: no system") as refused:
        NextFlowCollator(processor)([{"messages": [{"role": "system", "content": "one"}]}])
    assert validate_source(tmp_path / "rows.jsonl", str(tmp_path)).problems == [f"row 0, {refused.value}"]


@pytest.mark.parametrize("packing", [{}, {"packing": "length", "packing_budget": 200}])
@pytest.mark.parametrize("read_last_scale", [False, True])
def test_a_row_of_more_positions_than_the_model_has_is_named(read_last_scale, packing, tmp_path):
    # Text and two images of five positions, one more each where the last scale is read.
    long = QUESTION | {
        "messages": conversation([{"type": "image"}, text("one"), {"type": "image"}], [text("two")]),
        "image_tokens": [codes(1), codes(2)],
        "image_grids": [[4, 4], [4, 4]],
    }
    processor, rows = tiny_processor(read_last_scale=read_last_scale), [QUESTION, long]
    ids = NextFlowCollator(processor).encode(long)[0]
    positions = len(ids) - ids.count(processor.image_token_id) + 2 * (3 + read_last_scale)
    expected = rf"row 1, messages: they take {positions} positions, but the model has {positions - 1} \(max_position"
    for limit in (positions, positions - 1):
        model = tiny_model(text_config={"max_position_embeddings": limit}, read_last_scale=read_last_scale)
        options = packing | {"per_device_train_batch_size": 1 if packing else 2, "learning_rate": 0.0}
        args = training_arguments(tmp_path / "run", rows, **options)
        folder = tmp_path / str(limit)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        datasets.Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
        problems = validate_source(tmp_path / "rows.jsonl", str(folder)).problems
        if limit == positions:
            NextFlowTrainer(model, args, train_dataset=rows, processing_class=processor).train()
            assert problems == []
        else:
            with pytest.raises(BadRowError, match="^" + expected) as refused:
                NextFlowTrainer(model, args, train_dataset=rows, processing_class=processor).train()
            assert problems == [str(refused.value)]


def test_a_template_that_leaves_images_out_is_told():
    processor = tiny_processor()
    processor.chat_template = "{% generation %}one{% endgeneration %}"
    with pytest.raises(BadRowError, match="^messages: The chat template writes .* 0 times for 1 images"):
        NextFlowCollator(processor)([DRAWING])


def test_a_line_that_nests_without_end_is_no_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": ' + "[" * 100_000 + "\n")
    with pytest.raises(BadRowError, match="row: is not valid JSON"):
        JsonLines(tmp_path / "rows.jsonl")[0]


def test_a_worker_hands_the_error_on_as_it_is():
    rows = NumberedRows([changed(image_tokens=[codes(1, 3)])])
    loader = DataLoader(rows, collate_fn=NextFlowCollator(PROCESSOR), num_workers=1)
    with pytest.raises(BadRowError, match=r"row 0, image_tokens\[0\]: the grid \[4, 4\] takes 30 codes, got 3"):
        next(iter(loader))
    error = pickle.loads(pickle.dumps(BadImageError("images[0]", "is none")))
    assert (str(error), error.field, error.problem) == ("images[0]: is none", "images[0]", "is none")


def test_images_of_the_tokenizers_training_are_named_by_their_row(folder):
    image_processor = PROCESSOR.image_processor
    images = StageImages([raw(IMAGE), raw({"type": "image", "image": "broken.png"})], folder, image_processor, 16)
    images[0]
    with pytest.raises(BadImageError, match=r"^row 1, messages\[0\].content\[1\].image: the image cannot be read"):
        images[1]
    with pytest.raises(BadRowError, match=r"^row 1, messages: must be a list"):
        StageImages([raw(IMAGE), {}], folder, image_processor, 16)
