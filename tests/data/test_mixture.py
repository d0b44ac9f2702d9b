"""Mixtures of sources: their weights, who reads which rows, and what is read where it lies."""

import itertools
import json
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_trainer import codes, conversation, drawing, text

from transformers_nextflow.data import Columns
from transformers_nextflow.data import code_extraction as extraction
from transformers_nextflow.data.mixture import Mixture, Source, StreamedSource, open_source
from transformers_nextflow.data.parquet_rows import ParquetRows
from transformers_nextflow.data.rows import ROW_NUMBER, read_row


def text_row(words: str) -> dict:
    return {"messages": conversation([text("say")], [text(words)])}


def write_codes(folder, rows, shards: int = 2, group: int = 4, codebook_size: int = 32):
    """Rows as `extract-codes` writes them, in row groups of `group` rows."""
    folder.mkdir(parents=True)
    size = -(-len(rows) // shards)
    for shard in range(shards):
        path = folder / f"codes-{shard:06d}.parquet"
        extraction._write_parquet(rows[shard * size : (shard + 1) * size], path, codebook_size)
        pq.write_table(pq.read_table(path), path, row_group_size=group)
    return folder


def drawn_rows(count: int) -> list[dict]:
    rows = [drawing(f"image {number}", seed=number) for number in range(count)]
    return [row | {"image_labels": row["image_tokens"], "image_clean_tokens": None} for row in rows]


def first(stream, count: int) -> list:
    return list(itertools.islice(iter(stream), count))


def numbers(rows: list[dict]) -> list[str]:
    return [row[ROW_NUMBER] for row in rows]


def two_sources() -> list[tuple[Source, float]]:
    some, others = ([text_row(f"{name} {number}") for number in range(count)] for name, count in (("a", 50), ("b", 30)))
    return [(Source("a", some, "."), 3.0), (Source("b", others, "."), 1.0)]


def test_sources_come_by_their_weights_and_each_row_once_before_any_comes_again():
    rows = first(Mixture(two_sources()), 4000)
    counts = Counter(row[ROW_NUMBER].split(" of ")[1] for row in rows)
    assert abs(counts["a"] / 4000 - 0.75) < 0.03
    of_a = [number for number in numbers(rows) if number.endswith("of a")]
    passes = [of_a[start : start + 50] for start in range(0, len(of_a) - 50, 50)]
    assert all(len(set(one)) == 50 for one in passes) and passes[0] != passes[1]


def test_the_order_follows_from_seed_and_share_only():
    orders = [numbers(first(Mixture(two_sources(), seed), 200)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("group", [4, 100], ids=["groups for all", "groups are divided"])
def test_no_reader_reads_the_rows_of_another_and_all_rows_are_read(group, tmp_path, monkeypatch):
    """Counted where files are read: with groups for all, no group is read by two."""
    write_codes(tmp_path / "codes", drawn_rows(48), group=group)
    source, read, seen = open_source("codes", tmp_path, Columns()), [], []
    read_group = ParquetRows.read_group
    monkeypatch.setattr(ParquetRows, "read_group", lambda self, n: read.append((reader, n)) or read_group(self, n))
    for reader in range(6):
        mixture = Mixture([(source, 1.0)])
        mixture.take_share(reader, 6, 0)
        seen.append(set(numbers(first(mixture, 3 * 48))))
    assert sum(map(len, seen)) == len(set().union(*seen)) == 48
    if group == 4:
        assert len({n for _, n in read}) == len(set(read)) == 12


@pytest.mark.parametrize(("count", "readers", "group"), [(2999, 2, None), (40000, 32, None), (160, 32, 4), (48, 7, 5)])
def test_shares_differ_by_one_row_at_most_and_hold_each_row_once(count, readers, group, tmp_path):
    if group is None:
        source = Source("a", range(count), ".")
    else:
        table = pa.table({"messages": [f"{number}" for number in range(count)]})
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=group)
        source = open_source("rows.parquet", tmp_path, Columns())
    shares = [source.blocks(share, readers) for share in range(readers)]
    rows = [[row for block in blocks for row in range(block.start, block.stop)] for blocks in shares]
    assert sorted(itertools.chain(*rows)) == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    if group is not None:
        own = [source.read(block)[n]["messages"] for block in shares[1] for n in range(block.stop - block.start)]
        assert own == [str(row) for row in rows[1]]


def test_workers_divide_a_share():
    from torch.utils.data import DataLoader

    def read(workers: int, share: int) -> list[str]:
        mixture = Mixture(two_sources())
        mixture.take_share(share, 2, workers)
        loader = DataLoader(mixture, batch_size=None, collate_fn=lambda row: row[ROW_NUMBER], num_workers=workers)
        return first(loader, 300)

    shares = [set(read(2, share)) for share in (0, 1)]
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 80
    assert read(2, 0) == read(2, 0)


def test_more_readers_than_rows_are_refused_with_their_number():
    with pytest.raises(ValueError, match="b has 30 rows for 32 readers"):
        Mixture(two_sources()).take_share(0, 8, 4)
    with pytest.raises(ValueError, match="a has 0 rows for 1 readers"):
        first(Mixture([(Source("a", [], "."), 1.0)]), 1)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan"), "1", True, None])
def test_weights_of_which_no_share_can_be_made_are_refused(weight):
    (some, _), (other, _) = two_sources()
    with pytest.raises(ValueError, match="weights above 0|mixture must be names with values"):
        Mixture([(some, 1.0), (other, weight)])


def test_rows_of_parquet_are_those_that_were_written_with_codes_as_arrays(tmp_path):
    rows = [*drawn_rows(5), text_row("one")]
    rows[1]["image_clean_tokens"] = [codes(9)]
    read = ParquetRows([str(path) for path in sorted(write_codes(tmp_path / "codes", rows, shards=2).iterdir())])
    assert len(read) == 6
    for row, expected in zip(read, rows):
        sample, other = read_row(row), read_row(expected)
        assert [part["type"] for m in sample.messages for part in m["content"]] == [
            part["type"] for m in other.messages for part in m["content"]
        ]
        if other.codes is not None:
            assert all(np.array_equal(*pair) for pair in zip(sample.codes.tokens, other.codes.tokens))
            assert all(np.array_equal(*pair) for pair in zip(sample.codes.read, other.codes.read))
            assert row["image_tokens"][0].dtype == np.int16
    with pytest.raises(IndexError):
        read[6]


@pytest.mark.parametrize(("size", "kind"), [(2**15, "int16"), (2**15 + 1, "int32")])
def test_codes_are_stored_as_int16_where_they_fit(size, kind, tmp_path):
    row = drawn_rows(1)[0] | {"image_tokens": [[0, size - 1]], "image_labels": [[0, size - 1]]}
    folder = write_codes(tmp_path / "codes", [row], shards=1, codebook_size=size)
    (path,) = folder.iterdir()
    assert str(pq.read_schema(path).field("image_tokens").type.value_type.value_type) == kind
    assert ParquetRows([str(path)])[0]["image_tokens"][0].tolist() == [0, size - 1]


def test_files_of_a_store_are_read_where_they_lie(tmp_path):
    folder, store = write_codes(tmp_path / "codes", drawn_rows(8)), MemoryFileSystem()
    for path in folder.iterdir():
        store.pipe_file(f"/bucket/codes/{path.name}", path.read_bytes())
    source = open_source("memory://bucket/codes", tmp_path, Columns())
    assert source.size == 8 and sorted(numbers(first(Mixture([(source, 1.0)]), 8)))[0] == "0 of memory://bucket/codes"
    with pytest.raises(ValueError, match="holds no Parquet files"):
        open_source("memory://bucket/none", tmp_path, Columns())


def test_tables_of_images_and_captions_become_conversations(tmp_path):
    table = datasets.Dataset.from_dict({"image": ["a.png", "b.png"], "caption": ["one", "two"]})
    table.to_parquet(str(tmp_path / "pairs.parquet"))
    source = open_source("pairs.parquet", tmp_path, Columns())
    rows = first(Mixture([(source, 1.0)]), 2)
    assert sorted(row["messages"][0]["content"][0]["text"] for row in rows) == ["one", "two"]
    assert {row["row_root"] for row in rows} == {str(tmp_path)}


def test_paths_of_images_are_relative_to_their_own_source(tmp_path):
    from PIL import Image

    for name in ("some", "other"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "image.png")
        row = {"messages": conversation([text(name)], [{"type": "image", "image": "image.png"}])}
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row) + "\n")
    sources = [(open_source(f"{name}/rows.jsonl", tmp_path, Columns()), 1.0) for name in ("some", "other")]
    for row in first(Mixture(sources), 8):
        (path,) = read_row(row).images
        assert path.parent.name == row["messages"][0]["content"][0]["text"]


def stream_of_files(root, count: int, rows: int = 3) -> StreamedSource:
    stream = datasets.IterableDataset.from_generator(
        lambda files: ({"messages": text_row(f"{file} {n}")["messages"]} for file in files for n in range(rows)),
        gen_kwargs={"files": list(range(count))},
    )
    return StreamedSource("tars", stream, root)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_of_files_is_shared_out_by_files(processes, workers, tmp_path):
    from torch.utils.data import DataLoader

    seen = []
    for share in range(processes):
        mixture = Mixture([(stream_of_files(tmp_path, 8), 1.0)], prepare=lambda row, name: row | {"name": name})
        mixture.take_share(share, processes, workers)
        loader = DataLoader(mixture, batch_size=None, collate_fn=lambda row: row, num_workers=workers)
        for row in first(loader, 2 * 24 // processes):
            if row["name"].endswith("(reading 1)"):
                seen.append(row["messages"][1]["content"][0]["text"])
    assert sorted(seen) == sorted(f"{file} {n}" for file in range(8) for n in range(3))


def test_streams_that_cannot_be_shared_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tars has 4 files for 5 readers"):
        Mixture([(stream_of_files(tmp_path, 4), 1.0)]).take_share(0, 5, 0)
    with pytest.raises(ValueError, match="files of tars that reader 0 has to itself hold no rows"):
        first(Mixture([(stream_of_files(tmp_path, 4, rows=0), 1.0)]), 1)
