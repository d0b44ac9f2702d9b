"""What people have becomes rows: folders of captioned images, tables, tars, streams; what is said of what does not."""

import csv
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from command_line import run_command
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image
from tiny import tiny_processor
from torch.utils.data import DataLoader

from transformers_nextflow.data import BadRowError, Columns, load_image, open_rows, read_row, row_errors, validate_rows
from transformers_nextflow.data.rows import ROW_NUMBER
from transformers_nextflow.trainers import NextFlowCollator
from transformers_nextflow.trainers.recipe_data import StageRows


CAPTIONS = ["a red photo", "a green photo", "a blue photo"]
COLORS = ["red", "lime", "blue"]
PAIRS = {"input_image": COLORS, "edited_image": COLORS[1:] + COLORS[:1]}


def image_of(color: str) -> Image.Image:
    return Image.new("RGB", (16, 16), color)


def png(color: str) -> bytes:
    file = io.BytesIO()
    image_of(color).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path) -> list[str]:
    names = [f"sub/test {color}.png" for color in COLORS]  # no split of a test set
    (folder / "sub").mkdir(parents=True)
    for name, color in zip(names, COLORS):
        (folder / name).write_bytes(png(color))
    return names


def with_lines(folder: Path):
    lines = [{"file_name": name, "text": text} for name, text in zip(write_images(folder), CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def with_csv(folder: Path):
    names = write_images(folder)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *zip(names, CAPTIONS)])


def with_table(folder: Path):
    folder.mkdir()
    table = datasets.Dataset.from_dict({"photo": [{"bytes": png(c), "path": None} for c in COLORS], "prompt": CAPTIONS})
    table.cast_column("photo", datasets.Image()).to_parquet(folder / "part.parquet")


def with_saved_table(folder: Path):
    images = [image_of(color) for color in COLORS]
    table = datasets.Dataset.from_dict({"jpg": images, "txt": CAPTIONS, "other": [1, 2, 3]})
    table.cast_column("jpg", datasets.Image()).save_to_disk(folder)


def with_tar(folder: Path):
    folder.mkdir()
    with tarfile.open(folder / "0000.tar", "w") as tar:
        for number, (color, caption) in enumerate(zip(COLORS, CAPTIONS)):
            for suffix, content in (("png", png(color)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def with_classes(folder: Path):
    for color, caption in zip(COLORS, CAPTIONS):
        (folder / caption).mkdir(parents=True)
        (folder / caption / "0.png").write_bytes(png(color))


def as_told(rows, root) -> list[tuple[str, tuple]]:
    """Prompt and colour of each row."""
    samples = [read_row(row, root) for row in rows]
    return [
        (s.messages[0]["content"][0]["text"], load_image(s.images[0]).convert("RGB").getpixel((0, 0))) for s in samples
    ]


EXPECTED = list(zip(CAPTIONS, [(255, 0, 0), (0, 255, 0), (0, 0, 255)]))
KINDS = [with_lines, with_csv, with_table, with_saved_table, with_tar, with_classes]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_captioned_images_become_drawings_in_every_form(make, tmp_path):
    make(tmp_path / "data")
    rows, root = open_rows(tmp_path / "data")
    assert len(rows) == 3 and sorted(as_told(rows, root)) == sorted(EXPECTED)
    assert read_row(rows[0], root).trained_images == [True]
    report = validate_rows(rows, root, processor=tiny_processor())
    assert (report.rows, report.images, report.num_problems) == (3, 3, 0)
    batch = NextFlowCollator(tiny_processor(), root=root)([rows[number] for number in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


@pytest.mark.parametrize("make", [with_lines, with_csv, with_table, with_tar], ids=lambda make: make.__name__)
def test_tables_stream_with_the_same_rows(make, tmp_path):
    make(tmp_path / "data")
    rows, root = open_rows(tmp_path / "data")
    stream, _ = open_rows(tmp_path / "data", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert as_told(stream, root) == as_told(rows, root)


def test_reading_tars_does_not_change_the_reader_of_others(tmp_path):
    before = dict(WebDataset.DECODERS)
    with_tar(tmp_path / "data")
    for streaming in (False, True):
        rows, root = open_rows(tmp_path / "data", streaming=streaming)
        assert as_told(rows, root) == EXPECTED
    assert before == WebDataset.DECODERS


def _three_rows(files):
    for file in files:
        yield from ({"text": f"{file} {number}"} for number in range(3))


def test_rows_of_a_stream_are_named_with_the_worker_that_counts_them():
    stream = datasets.IterableDataset.from_generator(_three_rows, gen_kwargs={"files": [0, 1]})
    rows = StageRows(stream, tiny_processor()).stream()
    assert [row[ROW_NUMBER] for row in rows] == [0, 1, 2, 3, 4, 5]
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    names = {row["text"]: row[ROW_NUMBER] for row in loader}
    assert names == {f"{file} {number}": f"{number} of worker {file}" for file in range(2) for number in range(3)}


def test_a_bad_row_of_a_table_that_is_streamed_is_named_with_its_worker(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"image": [{"bytes": png("red"), "path": None}] * 2, "text": ["a", None]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "part.parquet")
    stream, _ = open_rows(tmp_path / "part.parquet", streaming=True)
    with pytest.raises(BadRowError, match="^row 1, "):
        list(stream)
    monkeypatch.setattr(row_errors, "get_worker_info", lambda: SimpleNamespace(id=3))
    with pytest.raises(BadRowError, match="^row 1 of worker 3, "):
        list(stream)


def test_a_file_of_image_and_text_lines_is_read_beside_its_images(tmp_path):
    with_lines(tmp_path / "data")
    rows, root = open_rows(tmp_path / "data" / "metadata.jsonl")
    assert as_told(rows, root) == EXPECTED and root == tmp_path / "data"


def test_an_instruction_and_two_images_become_an_edit(tmp_path):
    table = {name: [{"bytes": png(c), "path": None} for c in colors] for name, colors in PAIRS.items()}
    table = datasets.Dataset.from_dict(table | {"edit_prompt": CAPTIONS})
    for name in PAIRS:
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(tmp_path / "edits.parquet")
    rows, root = open_rows(tmp_path / "edits.parquet")
    samples = [read_row(row, root) for row in rows]
    assert [[part["type"] for m in s.messages for part in m["content"]] for s in samples] == [
        ["image", "text", "image"]
    ] * 3
    assert [s.trained_images for s in samples] == [[False, True]] * 3
    colors = [[np.asarray(load_image(image))[0, 0].tolist() for image in s.images] for s in samples]
    assert colors[0] == [[255, 0, 0], [0, 255, 0]]
    others, _ = open_rows(tmp_path / "edits.parquet", Columns("edited_image", "edit_prompt", "input_image"))
    assert load_image(read_row(others[0], root).images[1]).getpixel((0, 0)) == (255, 0, 0)


def test_edited_images_that_are_named_as_images_are_drawn_from_their_captions():
    names = ["original_image", "edit_prompt", "edited_image", "edited_prompt"]  # InstructPix2Pix
    assert Columns().found_among(names) == Columns("original_image", "edit_prompt", "edited_image")
    named = Columns("edited_image", "edited_prompt")
    assert named.found_among(names) == named


def test_columns_of_any_name_can_be_named_also_inside_of_others(tmp_path):
    write_images(tmp_path / "data")
    lines = [{"a": f"sub/test {c}.png", "json": {"b": text}} for c, text in zip(COLORS, CAPTIONS)]
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, root = open_rows(tmp_path / "data" / "rows.jsonl", Columns("a", "json.b"))
    assert as_told(rows, root) == EXPECTED
    options = ["--image_column", "a", "--caption-column", "json.b"]
    result = run_command("validate-data", tmp_path / "data" / "rows.jsonl", *options)
    assert result.exit_code == 0 and "3 rows, 3 images, 0 rows skipped, 0 problems" in result.stdout


def test_images_without_captions_are_rows_only_where_no_text_is_needed(tmp_path):
    write_images(tmp_path / "data")
    rows, root = open_rows(tmp_path / "data", needs_texts=False)
    assert [text for text, _ in as_told(rows, root)] == [""] * 3
    with pytest.raises(ValueError, match=r"hold captions; there are image.*--caption-column; .*metadata.jsonl"):
        open_rows(tmp_path / "data")


@pytest.mark.parametrize(
    "columns, message",
    [
        (Columns(image="photos"), r"--image-column 'photos' is not a column; the columns are photo, prompt"),
        (Columns(caption="texts"), r"--caption-column 'texts' is not a column"),
        (Columns(edited_image="after"), r"--edited-image-column 'after' is not a column"),
    ],
)
def test_columns_that_are_not_there_are_refused_with_those_that_are(columns, message, tmp_path):
    with_table(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        open_rows(tmp_path / "data", columns)


def test_a_table_without_images_is_told_by_its_columns(tmp_path):
    datasets.Dataset.from_dict({"one": ["a"], "two": ["b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"No column is known to hold images; there are one, two\. Name it by"):
        open_rows(tmp_path / "a.parquet")


def test_what_lacks_in_a_row_is_told_by_row_and_column(tmp_path):
    lines = [{"file_name": "none.png", "text": "a"}, {"file_name": None, "text": "b"}, {"file_name": "c", "text": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = validate_rows(*open_rows(tmp_path / "rows.jsonl"))
    first, second, third = report.problems
    assert first.startswith("row 0, messages[1].content[0].image: there is no file")
    assert second == "row 1, file_name: the image is missing"
    assert third == "row 2, text: must be a text, got 3"


@pytest.mark.parametrize("name", ["nowhere", "no where/data", "a/b/c"])
def test_what_is_neither_there_nor_a_name_of_the_hub_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="There is no file or folder .* it is not the name of a data set of the Hub"):
        open_rows(name)


def test_an_empty_folder_is_told_what_may_stand_there(tmp_path):
    with pytest.raises(ValueError, match=r"is not a \.jsonl, \.parquet or \.tar file, a folder of those, of images"):
        open_rows(tmp_path)


def test_a_folder_with_a_file_of_rows_is_told_to_be_named_by_that_file(tmp_path):
    with_lines(tmp_path / "data")
    (tmp_path / "data" / "metadata.jsonl").rename(tmp_path / "data" / "rows.jsonl")
    with pytest.raises(ValueError, match=r"holds rows\.jsonl; name that file, or call it metadata\.jsonl beside"):
        open_rows(tmp_path / "data")


def test_a_data_set_of_the_hub_is_asked_for_by_its_name(monkeypatch):
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(c), "path": None} for c in COLORS], "text": CAPTIONS})
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return table.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert as_told(*open_rows("someone/photos")) == EXPECTED and asked == [("someone/photos", "train", False)]


def test_an_image_without_a_class_is_refused_and_not_given_the_last_one(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    image = {"bytes": png(COLORS[0]), "path": None}
    datasets.Dataset.from_dict({"image": [image, image], "label": [1, -1]}, features).save_to_disk(tmp_path / "data")
    rows, root = open_rows(tmp_path / "data")
    assert read_row(rows[0], root).messages[0]["content"][0]["text"] == "dog"
    with pytest.raises(BadRowError, match="label: must be a class from 0 to 1, got -1"):
        rows[1]
