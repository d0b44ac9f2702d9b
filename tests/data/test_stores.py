"""Data in stores that fsspec knows, here in its memory: the same codes come of it as of files, wherever they go."""

import io
import json
import tarfile

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image
from test_code_extraction import SETTINGS, contents
from tiny import tiny_model

from transformers_nextflow.data import check_codes, extract_codes, open_rows
from transformers_nextflow.data.stores import open_folder
from transformers_nextflow.utils.extras import import_extra


def png(seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One set of captioned images as a folder of them, as Parquet, and as a tar; the folder that holds them."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "images").mkdir()
    (folder / "tables").mkdir()
    rows = [{"image": {"bytes": png(seed), "path": None}, "text": f"image {seed}"} for seed in range(5)]
    with tarfile.open(folder / "images.tar", "w") as tar, open(folder / "images" / "metadata.jsonl", "w") as lines:
        for seed, row in enumerate(rows):
            (folder / "images" / f"{seed}.png").write_bytes(row["image"]["bytes"])
            lines.write(json.dumps({"file_name": f"{seed}.png", "text": row["text"]}) + "\n")
            for suffix, content in (("png", row["image"]["bytes"]), ("txt", row["text"].encode())):
                info = tarfile.TarInfo(f"{seed}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.select(range(3)).to_parquet(folder / "tables" / "0.parquet")
    table.select(range(3, 5)).to_parquet(folder / "tables" / "1.parquet")
    tiny_model().vq_model.save_pretrained(folder / "tokenizer")
    extract_codes(folder / "images", folder / "tokenizer", folder / "codes", **SETTINGS)
    return folder


@pytest.fixture
def store(sources):
    """The address of the same files in a store, empty afterwards."""
    system = fsspec.filesystem("memory")
    for path in sources.rglob("*"):
        if path.is_file() and "tokenizer" not in path.parts:
            system.pipe_file(f"/bucket/{path.relative_to(sources)}", path.read_bytes())
    yield "memory://bucket"
    system.rm("/", recursive=True)


@pytest.mark.parametrize("kind", ["images", "tables", "tables/*.parquet", "images.tar"])
def test_sources_in_a_store_give_the_codes_of_files(sources, store, kind, tmp_path, monkeypatch):
    # What the tests keep from the network: `datasets` takes every store for a part of it.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    totals = extract_codes(f"{store}/{kind}", sources / "tokenizer", tmp_path / "codes", **SETTINGS)
    assert totals == {"rows": 5, "skipped": 0, "shards": 2, "found": 0}
    assert contents(tmp_path / "codes") == contents(sources / "codes")


def test_codes_in_a_store_are_those_of_a_folder_and_are_finished_where_they_lack(sources, store):
    output = f"{store}/made/here"
    arguments = (sources / "images", sources / "tokenizer", output)
    assert extract_codes(*arguments, **SETTINGS)["found"] == 0
    folder, expected = open_folder(output), contents(sources / "codes")
    assert set(folder.names()) == {*expected, "extraction.json"}
    assert {name: folder.read(name) for name in expected} == expected
    folder.system.rm_file(f"{folder.place}/codes-000000.parquet")
    folder.system.pipe_file(f"{folder.place}/codes-000001.json", b"{")
    with pytest.raises(ValueError, match="codes-000000.parquet, codes-000001.parquet are missing or damaged"):
        check_codes(output)
    assert extract_codes(*arguments, **SETTINGS) == {"rows": 5, "skipped": 0, "shards": 2, "found": 0}
    assert {name: folder.read(name) for name in expected} == expected
    assert extract_codes(*arguments, **SETTINGS)["found"] == 2
    with pytest.raises(ValueError, match="was begun with top_k=4, but now it is 2"):
        extract_codes(*arguments, **SETTINGS | {"top_k": 2})
    rows, _ = open_rows(output)
    assert len(rows) == 5 and rows[4]["source_row"] == 4


def test_an_address_of_this_machine_is_its_path(sources, tmp_path):
    arguments = (f"file://{sources}/images", sources / "tokenizer", f"file://{tmp_path}/codes")
    assert extract_codes(*arguments, **SETTINGS)["rows"] == 5
    assert contents(tmp_path / "codes") == contents(sources / "codes")
    # The settings are those of the path.
    assert extract_codes(sources / "images", sources / "tokenizer", tmp_path / "codes", **SETTINGS)["found"] == 2


def test_an_image_that_lacks_in_a_store_is_told_or_skipped(sources, store, tmp_path):
    system, place = fsspec.core.url_to_fs(f"{store}/images")
    system.rm_file(f"{place}/2.png")
    arguments = (f"{store}/images", sources / "tokenizer", tmp_path / "codes")
    with pytest.raises(ValueError, match="row 2, file_name: There is no image memory://.*/images/2.png"):
        extract_codes(*arguments, **SETTINGS)
    totals = extract_codes(*arguments[:2], tmp_path / "others", **SETTINGS, on_bad_image="skip")
    assert (totals["rows"], totals["skipped"]) == (4, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "one"}', "row 0, file_name: must be the name of an image"),
        ('{"file_name": 5, "text": "one"}', "row 0, file_name: must be the name of an image"),
        (
            '{"file_name": "0.png", "text": "one", "text": "two"}',
            "row 0, row: is not valid JSON: The name 'text' occurs twice",
        ),
        ("[", "row 0, row: is not valid JSON"),
    ],
)
def test_a_line_of_a_store_that_names_no_image_is_told(sources, store, tmp_path, line, message):
    system, place = fsspec.core.url_to_fs(f"{store}/images")
    system.pipe_file(f"{place}/metadata.jsonl", line.encode())
    with pytest.raises(ValueError, match=message):
        extract_codes(f"{store}/images", sources / "tokenizer", tmp_path / "codes", **SETTINGS)


@pytest.mark.parametrize(
    ("source", "output", "options", "message"),
    [
        ("memory://nowhere", "codes", {}, "is not a .parquet or .tar file, a folder of those, or a folder of images"),
        ("memory://rows.jsonl", "codes", {}, "nothing else is read from a store"),
        ("nonsense://bucket/x", "codes", {}, "nonsense://bucket/x cannot be opened: Protocol not known"),
        ("images", "nonsense://bucket/x", {}, "nonsense://bucket/x cannot be opened: Protocol not known"),
        ("images", "memory://codes", {"processes": 2}, "output memory://codes is in the memory of this process"),
        ("memory://images", "codes", {"engine": "ray"}, "source memory://images is in the memory of this process"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_anything_is_written(
    sources, source, output, options, message, tmp_path
):
    places = [place if "://" in place else folder / place for place, folder in ((source, sources), (output, tmp_path))]
    with pytest.raises(ValueError, match=message):
        extract_codes(places[0], sources / "tokenizer", places[1], **SETTINGS, **options)
    assert not list(tmp_path.iterdir())


def test_a_store_that_fails_is_named(sources, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.isdir", fail)
    with pytest.raises(ValueError, match="memory://somewhere cannot be reached: no credentials"):
        open_rows("memory://somewhere")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.put_file", fail)
    with pytest.raises(OSError, match="memory://codes/extraction.json cannot be reached: no credentials"):
        extract_codes(sources / "images", sources / "tokenizer", "memory://codes", **SETTINGS)


def test_an_extra_that_lacks_is_named():
    with pytest.raises(ValueError, match=r"This needs nonsense: pip install transformers-nextflow\[train\]"):
        import_extra("nonsense")
