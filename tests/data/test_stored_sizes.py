"""Lengths of rows that are stored beside their codes: what is packed by them is packed as if the rows were read."""

import itertools
import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from test_data_format import image, write_lines
from test_trainer import conversation, text, training_arguments
from tiny import tiny_model, tiny_processor
from transformers import AutoProcessor

from transformers_nextflow.data import Columns, extract_codes, open_rows
from transformers_nextflow.data.mixture import Mixture, open_source
from transformers_nextflow.data.parquet_rows import ParquetRows
from transformers_nextflow.data.stored_sizes import (
    COLUMNS,
    PROCESSOR,
    SIZES,
    processor_fingerprint,
    rows_of_sizes,
    stored_size,
)  # fmt: skip
from transformers_nextflow.data.views import VIEWS, apply_view
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, PackedStream, collator
from transformers_nextflow.trainers.recipe_data import StageRows


SHARES = {"caption_share": 0.3, "empty_share": 0.3}
BUDGET = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and its codes of drawings, edits, stories of two images, and text."""
    folder = tmp_path_factory.mktemp("sizes")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    generator, rows = np.random.default_rng(0), []
    for number in range(12):
        for name in ("a", "b"):
            size = ((16, 16), (8, 32))[(number + (name == "b")) % 2]
            Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{name}{number}.png")
        some, other = image(f"a{number}.png"), image(f"b{number}.png")
        words = text(" ".join(["a red circle"] * (1 + number % 3)))
        kinds = (([words], [some]), ([some, words], [other]), ([words], [some, words, other]), ([words], [words]))
        rows.append({"messages": conversation(*kinds[number % 4])})
    write_lines(folder / "rows.jsonl", rows)
    extract_codes(folder / "rows.jsonl", folder / "model", folder / "codes", shard_size=5, top_k=4)
    return folder


def without_sizes(folder, target):
    """The same shards as they were before sizes were stored."""
    target.mkdir()
    for path in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns([*SIZES, PROCESSOR]), target / path.name)
    return target


@pytest.fixture
def encoded(monkeypatch) -> list:
    """The samples that collators tokenize."""
    seen, encode = [], collator.encode_sample
    monkeypatch.setattr(collator, "encode_sample", lambda sample, *args: seen.append(sample) or encode(sample, *args))
    return seen


def trainer_of(rows, output, processor=None, **options):
    args = training_arguments(output, [1], packing="compute", packing_budget=BUDGET, **options)
    return NextFlowTrainer(tiny_model(), args, train_dataset=rows, processing_class=processor or tiny_processor())


def test_sizes_are_those_of_the_row_that_is_read_in_every_view(folder):
    processor = tiny_processor()
    measured = NextFlowCollator(processor)
    for row in open_rows(folder / "codes")[0]:
        for view in VIEWS:
            own = apply_view(row, view, processor.caption_request)
            plain = {name: value for name, value in own.items() if name not in SIZES}
            assert measured.knows_size(own) and not measured.knows_size(plain)
            assert measured.size(own) == measured.size(plain)
    lengths = {tuple(row["lengths"]) for row in open_rows(folder / "codes")[0]}
    assert any(len(set(own)) == 3 for own in lengths)  # else views would not be told apart


@pytest.mark.parametrize("place", ["folder", "store"])
def test_packs_by_stored_sizes_are_those_of_rows_that_are_read(place, folder, tmp_path, encoded, monkeypatch):
    source = folder / "codes"
    if place == "store":
        source, store = "memory://sizes/codes", MemoryFileSystem()
        for path in (folder / "codes").glob("*.parquet"):
            store.pipe_file(f"/sizes/codes/{path.name}", path.read_bytes())
    plain = without_sizes(folder / "codes", tmp_path / "plain")
    read = trainer_of(StageRows(open_rows(plain)[0], tiny_processor(), **SHARES), tmp_path / "read").train_dataset
    encoded.clear()
    monkeypatch.setattr("transformers_nextflow.trainers.nextflow_trainer.NUM_EXAMINED_ROWS", 0)
    rows = StageRows(open_rows(source)[0], tiny_processor(), **SHARES)
    monkeypatch.setattr(StageRows, "__getitem__", lambda self, index: pytest.fail("a row is read"))
    stored = trainer_of(rows, tmp_path / "stored").train_dataset
    assert not encoded
    assert stored.packs == read.packs and stored.costs == read.costs and len(stored) > 1


def test_a_mixture_packs_by_stored_sizes_as_by_rows_that_are_read(folder, tmp_path, encoded):
    without_sizes(folder / "codes", tmp_path / "codes")
    processor, packs = tiny_processor(), []
    for root in (folder, tmp_path):
        stage, own = StageRows((), processor, **SHARES), NextFlowCollator(processor)
        mixture = Mixture([(open_source("codes", root, Columns()), 1.0)], prepare=stage.stage_row)
        encoded.clear()
        stream = PackedStream(mixture, lambda row, own=own: own.size(row).length, BUDGET)
        packs.append([[row["row_number"] for row in pack] for pack in itertools.islice(stream, 30)])
        assert bool(encoded) == (root == tmp_path)
    assert packs[0] == packs[1] and len(packs[0]) == 30


def test_sizes_of_another_processor_or_tokenizer_are_not_used_and_it_is_said_once(folder, tmp_path, encoded, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    other = tiny_processor()
    other.chat_template = other.chat_template.replace("<|im_end|>", " <|im_end|>")
    logging.Logger.warning_once.cache_clear()  # what other tests were told
    rows = open_rows(folder / "codes")[0]
    by_own, by_other = NextFlowCollator(tiny_processor()), NextFlowCollator(other)
    assert by_own.size(rows[0]) != by_other.size(rows[0])
    by_other.size(rows[1])
    assert len(encoded) == 2
    assert sum("tokenized to know their lengths" in record.message for record in caplog.records) == 1
    strange = NextFlowCollator(tiny_processor(), tokenizer_fingerprint="0" * 16)
    with pytest.raises(ValueError, match="the codes come from the tokenizer"):
        strange.size(rows[0])
    assert by_own.knows_size(rows[0])
    for refused in (NextFlowCollator(tiny_processor(), max_positions=3), strange):
        assert not refused.knows_size(rows[0])


def test_a_row_that_is_not_used_is_told_as_where_it_is_read(folder, tmp_path):
    asked, answered = conversation([text("one")], [text("two")])
    rows = [{"messages": [asked, answered]}, {"messages": [asked, answered | {"train": False}]}]
    write_lines(tmp_path / "rows.jsonl", rows)
    extract_codes(tmp_path / "rows.jsonl", folder / "model", tmp_path / "codes")
    rows = StageRows(open_rows(tmp_path / "codes")[0], tiny_processor())
    with pytest.raises(ValueError, match="[Rr]ow 1, messages: none of them is trained on"):
        trainer_of(rows, tmp_path / "out")


def test_images_of_another_level_are_refused_by_what_is_stored(folder):
    processor = tiny_processor(levels=[[12, 3], [16, 4]])
    stored = StageRows(open_rows(folder / "codes")[0], processor, level=12).rows_of_sizes()
    with pytest.raises(ValueError, match="Row 0 has an image of 4x4 cells, which is none of level 12"):
        list(stored)


def test_a_vision_tokenizer_alone_stores_no_sizes(folder, tmp_path):
    tiny_model().vq_model.save_pretrained(tmp_path / "tokenizer")
    extract_codes(folder / "rows.jsonl", tmp_path / "tokenizer", tmp_path / "codes")
    rows = open_rows(tmp_path / "codes")[0]
    assert {name: rows[0][name] for name in (*SIZES, PROCESSOR)} == dict.fromkeys((*SIZES, PROCESSOR))
    assert stored_size(rows[0], processor_fingerprint(tiny_processor())) is None


def test_the_fingerprint_is_of_what_decides_about_sizes(folder, tmp_path):
    processor = tiny_processor()
    own = processor_fingerprint(processor)
    assert processor_fingerprint(AutoProcessor.from_pretrained(folder / "model")) == own
    processor(text=["one", "one two"], padding=True, truncation=True, max_length=3)
    processor.image_processor.level = 16
    assert processor_fingerprint(processor) == own
    others = [tiny_processor(read_last_scale=True), tiny_processor(scales=(1, 2, 4))]
    others += [tiny_processor() for _ in range(3)]
    others[2].caption_request = "what is it?"
    others[3].chat_template += " "
    others[4].tokenizer.add_tokens(["<more>"])
    assert len({own, *map(processor_fingerprint, others)}) == 6


def test_all_that_is_read_at_the_start_are_the_columns_of_sizes(folder):
    stored = list(StageRows(open_rows(folder / "codes")[0], tiny_processor()).rows_of_sizes())
    assert len(stored) == 12 and set(stored[0]) == set(COLUMNS)
    assert isinstance(open_rows(folder / "codes")[0], datasets.Dataset)
    schema = pq.read_schema(folder / "codes" / "codes-000000.parquet")
    assert all(schema.field(name).type == pa.list_(pa.int32()) for name in SIZES)
    assert json.loads((folder / "codes" / "extraction.json").read_text())["processor"] == stored[0][PROCESSOR]


def test_a_source_of_files_with_sizes_and_without_is_read(tmp_path):
    row = {"messages": ["a"]} | {name: [None] for name in COLUMNS}
    older = {name: value for name, value in row.items() if name not in (*SIZES, PROCESSOR)}
    for name, columns in (("a", row), ("b", older)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    rows = ParquetRows(sorted(map(str, tmp_path.glob("*.parquet"))))
    assert list(rows_of_sizes(rows)) == [dict.fromkeys(COLUMNS)] * 2
