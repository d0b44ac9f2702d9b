"""Codes extracted ahead of training: what they are, and that nothing is lost by kills, full disks and bad images."""

import errno
import json
import signal
import time

import datasets
import numpy as np
import pytest
import torch
from command_line import run_command
from PIL import Image
from processes import CONTEXT
from test_data_format import image, write_lines
from test_trainer import conversation, text
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowPipeline, SelfCorrection
from transformers_nextflow.data import check_codes, code_extraction, extract_codes, open_rows, tokenizer_fingerprint
from transformers_nextflow.data.validation import validate_source
from transformers_nextflow.trainers import NextFlowCollator
from transformers_nextflow.utils.atomic_files import atomic_write


SIZES = ((16, 16), (8, 32), (32, 8))
SETTINGS = {"shard_size": 3, "top_k": 4}


def make_source(folder, count: int = 8):
    """A tokenizer and rows with two images, one, or none each; of two the second is drawn, of one every second."""
    tiny_model().vq_model.save_pretrained(folder / "tokenizer")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        names = [f"{number}-{index}.png" for index in range(number % 3)]
        for index, name in enumerate(names):
            height, width = SIZES[(number + index) % len(SIZES)]
            Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
        asked = (number % 3 + 1 - number % 2) // 2
        question, answer = [text("one"), *map(image, names[:asked])], [*map(image, names[asked:]), text("one")]
        rows.append({"messages": conversation(question, answer)})
    return write_lines(folder / "rows.jsonl", rows)


def extract(folder, output="codes", **settings):
    return extract_codes(folder / "rows.jsonl", folder / "tokenizer", folder / output, **(SETTINGS | settings))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("codes-*"))}


def rows_of(folder) -> list[dict]:
    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    return list(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True))


def test_what_is_read_has_the_tokenizers_codes_and_what_is_drawn_has_them_beside(tmp_path):
    make_source(tmp_path)
    assert extract(tmp_path) == {"rows": 8, "skipped": 0, "shards": 3, "found": 0}
    model, processor = tiny_model().vq_model, tiny_processor()
    rows = rows_of(tmp_path / "codes")
    assert [row["source_row"] for row in rows] == list(range(8))
    sampled, seen = [], set()
    for number, row in enumerate(rows):
        assert row["tokenizer_fingerprint"] == tokenizer_fingerprint(model)
        assert len(row["image_tokens"]) == len(row["image_labels"]) == len(row["image_grids"]) == number % 3
        roles = [turn["role"] for turn in row["messages"] for part in turn["content"] if part["type"] == "image"]
        for index, (role, tokens, labels, grid) in enumerate(
            zip(roles, row["image_tokens"], row["image_labels"], row["image_grids"])
        ):
            pixels = processor.image_processor(Image.open(tmp_path / f"{number}-{index}.png"), return_tensors="pt")
            own = model.encode(pixels["pixel_values"]).image_tokens[0].tolist()
            assert grid == pixels["image_grids"][0].tolist()
            if role == "user":
                assert tokens == labels == own and not (row["image_clean_tokens"] and row["image_clean_tokens"][index])
            else:
                assert tokens != own and labels != own and row["image_clean_tokens"][index] == own
                assert labels[0] == own[0]
                sampled += [a != b for a, b in zip(tokens, labels)]
            seen.add((role, number % 3))
    assert seen == {("user", 1), ("assistant", 1), ("user", 2), ("assistant", 2)}
    # 60% are sampled, and some of the samples hit the nearest code.
    assert 0.2 < sum(sampled) / len(sampled) < 0.6
    batch = NextFlowCollator(processor, tokenizer_fingerprint=tokenizer_fingerprint(model))(rows)
    with torch.no_grad():
        assert torch.isfinite(tiny_model()(**batch).loss)
    assert validate_source(tmp_path / "codes", str(tmp_path / "tokenizer")).num_problems == 0


def test_images_of_a_question_are_read_in_training_as_they_are_in_use(tmp_path):
    source = make_source(tmp_path)
    extract(tmp_path)
    collator = NextFlowCollator(tiny_processor(), root=tmp_path)
    for given, extracted in zip(open_rows(source)[0], rows_of(tmp_path / "codes")):
        question, answer = (turn["content"] for turn in given["messages"])
        if len(question) == 2 and len(answer) == 1:
            batch = collator([given])
            codes = tiny_model().get_image_tokens(batch["pixel_values"], batch["image_grids"])
            assert torch.equal(collator([extracted])["image_tokens"], codes)


def test_a_flag_says_which_images_have_sampled_codes(tmp_path):
    make_source(tmp_path, 2)
    (row,) = list(open_rows(tmp_path / "rows.jsonl")[0])[1:]
    row["messages"][1]["content"][0]["train"] = False
    shown = row["messages"][1]["content"][0] | {"train": True}
    row["messages"][0]["content"].append(shown)
    write_lines(tmp_path / "rows.jsonl", [row])
    extract(tmp_path)
    (row,) = rows_of(tmp_path / "codes")
    (sampled, own), (clean, none) = row["image_tokens"], row["image_clean_tokens"]
    assert sampled != own == clean and none is None and row["image_labels"][1] == own


def test_without_self_correction_codes_are_the_nearest(tmp_path):
    make_source(tmp_path, 3)
    extract(tmp_path, token_share=0.0)
    model, processor = tiny_model().vq_model, tiny_processor()
    for row in rows_of(tmp_path / "codes"):
        assert row["image_tokens"] == row["image_labels"] and row["image_clean_tokens"] is None
        for index, tokens in enumerate(row["image_tokens"]):
            image = Image.open(tmp_path / f"{row['source_row']}-{index}.png")
            pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            assert model.encode(pixels).image_tokens[0].tolist() == tokens


def test_a_shard_is_the_encoding_of_its_images_under_its_own_seed(tmp_path):
    source = make_source(tmp_path, 2)
    extract(tmp_path, seed=5)
    pixels = tiny_processor().image_processor(Image.open(tmp_path / "1-0.png"), return_tensors="pt")["pixel_values"]
    generator = torch.Generator().manual_seed(5 * 1_000_003)
    expected = tiny_model().vq_model.encode(pixels, SelfCorrection(top_k=4, token_share=0.6), generator)
    row = rows_of(tmp_path / "codes")[1]
    assert row["image_tokens"] == expected.image_tokens.tolist()
    assert row["image_labels"] == expected.image_labels.tolist()
    assert row["image_clean_tokens"] == tiny_model().vq_model.encode(pixels).image_tokens.tolist()
    assert source.exists()


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_nearest_codes_do_not_depend_on_the_batches(batch_size, tmp_path, monkeypatch):
    make_source(tmp_path)
    extract(tmp_path, "expected", token_share=0.0, shard_size=100)
    monkeypatch.setattr(code_extraction, "MAX_WAITING", 1)
    extract(tmp_path, token_share=0.0, shard_size=100, batch_size=batch_size)
    assert rows_of(tmp_path / "codes") == rows_of(tmp_path / "expected")


def test_a_whole_model_and_a_pipeline_serve_as_tokenizer(tmp_path):
    make_source(tmp_path, 3)
    tiny_model().save_pretrained(tmp_path / "model")
    NextFlowPipeline(tiny_model(), tiny_processor()).save_pretrained(tmp_path / "pipeline")
    extract(tmp_path)
    # It is the same tokenizer, so this finds all shards; and in a new folder it makes the same.
    assert extract_codes(tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "codes", **SETTINGS)["found"] == 1
    extract_codes(tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "other", **SETTINGS)
    assert contents(tmp_path / "codes") == contents(tmp_path / "other")
    extract_codes(tmp_path / "rows.jsonl", tmp_path / "pipeline", tmp_path / "packable", **SETTINGS)
    codes = [[row["image_tokens"] for row in rows_of(tmp_path / name)] for name in ("codes", "packable")]
    assert codes[0] == codes[1] and any(codes[0]) and rows_of(tmp_path / "packable")[0]["lengths"]
    assert validate_source(tmp_path / "packable", str(tmp_path / "pipeline")).num_problems == 0


def test_lost_and_damaged_shards_are_found_and_made_again_alone(tmp_path):
    make_source(tmp_path)
    extract(tmp_path)
    codes = tmp_path / "codes"
    whole = contents(codes)
    (codes / "codes-000000.parquet").write_bytes(whole["codes-000000.parquet"][:-1])
    (codes / "codes-000002.json").write_text("{")
    with pytest.raises(ValueError, match="codes-000000.parquet, codes-000002.parquet are missing or damaged"):
        check_codes(codes)
    untouched = (codes / "codes-000001.parquet").stat().st_mtime_ns
    assert extract(tmp_path)["found"] == 1
    assert contents(codes) == whole
    assert (codes / "codes-000001.parquet").stat().st_mtime_ns == untouched
    assert check_codes(codes) == {"rows": 8, "skipped": 0, "shards": 3}


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(tmp_path, monkeypatch):
    make_source(tmp_path)
    extract(tmp_path, "expected")
    written, write = [], code_extraction._write_parquet

    def full(rows, path, codebook_size):
        write(rows, path, codebook_size)
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(code_extraction, "_write_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        extract(tmp_path)
    codes = tmp_path / "codes"
    assert sorted(path.name for path in codes.iterdir()) == [
        "codes-000000.json",
        "codes-000000.parquet",
        "extraction.json",
    ]
    assert extract(tmp_path)["found"] == 1
    assert contents(codes) == contents(tmp_path / "expected")


def test_what_is_written_whole_takes_its_place_at_the_end_alone(tmp_path):
    file, folder = tmp_path / "new" / "sheet.png", tmp_path / "final"
    for content in ("old", "new"):
        with atomic_write(file) as partial:
            partial.write_text(content)
            # Writers read the format from the name.
            assert partial.name == file.name and partial != file
        with atomic_write(folder) as partial:
            partial.mkdir()
            (partial / content).touch()
    for path in (file, folder):
        with pytest.raises(OSError, match="No space left"), atomic_write(path) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert file.read_text() == "new" and [path.name for path in folder.iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"new", "final"}


def test_what_a_killed_extraction_left_half_written_goes(tmp_path):
    make_source(tmp_path, 2)
    extract(tmp_path)
    half = tmp_path / "codes" / ".codes-000000.parquet.abc" / "codes-000000.parquet"
    half.parent.mkdir()
    half.touch()
    assert extract(tmp_path)["found"] == 1 and not half.parent.exists()


def _slow_extract(folder):
    encode = code_extraction._Encoder.encode

    def slow(self, shard, skipped):
        time.sleep(0.2 if shard == 0 else 60)
        return encode(self, shard, skipped)

    code_extraction._Encoder.encode = slow
    extract(folder)


def test_a_killed_extraction_is_finished_by_the_next_one(tmp_path):
    make_source(tmp_path)
    extract(tmp_path, "expected")
    process = CONTEXT.Process(target=_slow_extract, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "codes" / "codes-000000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert extract(tmp_path)["found"] == 1
    assert contents(tmp_path / "codes") == contents(tmp_path / "expected")


def test_two_processes_write_what_one_writes(tmp_path):
    make_source(tmp_path)
    extract(tmp_path, "one")
    extract(tmp_path, "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bad_images_stop_it_or_are_skipped_and_counted(tmp_path):
    make_source(tmp_path)
    (tmp_path / "4-0.png").write_text("no image")
    (tmp_path / "7-0.png").unlink()
    with pytest.raises(ValueError, match=r"row 4, messages\[0\].content\[1\].image: the image cannot be read"):
        extract(tmp_path)
    # The first shard was done; other settings would mix two kinds of data.
    with pytest.raises(ValueError, match="was begun with on_bad_image='stop', but now it is 'skip'"):
        extract(tmp_path, on_bad_image="skip")
    totals = extract(tmp_path, "skipped", on_bad_image="skip")
    assert totals == {"rows": 6, "skipped": 2, "shards": 3, "found": 0}
    assert [row["source_row"] for row in rows_of(tmp_path / "skipped")] == [0, 1, 2, 3, 5, 6]
    note = json.loads((tmp_path / "skipped" / "codes-000001.json").read_text())
    assert note["skipped"] == 1 and note["skipped_because"][0].startswith("row 4, messages[0].content[1].image")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shard_size": 0}, "shard_size and batch_size must be at least 1, got 0 and 16"),
        ({"token_share": 2.0}, "token_share in"),
        ({"on_bad_image": "ignore"}, "on_bad_image must be one of"),
        ({"level": 17}, "17"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message, tmp_path):
    make_source(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        extract(tmp_path, **settings)


def test_a_folder_of_rows_of_another_format_is_not_continued(tmp_path):
    make_source(tmp_path, 2)
    extract(tmp_path)
    settings = json.loads((tmp_path / "codes" / "extraction.json").read_text())
    del settings["row_format"]
    (tmp_path / "codes" / "extraction.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="was begun with row_format=None, but now it is 3; use .* an empty folder"):
        extract(tmp_path)
    assert check_codes(tmp_path / "codes")["rows"] == 2


def test_codes_that_rows_hold_already_are_made_anew(tmp_path):
    source = make_source(tmp_path, 2)
    extract(tmp_path, "expected", token_share=0.0)
    rows = [row | {"image_tokens": 3} for row in open_rows(source)[0]]
    write_lines(source, rows)
    extract(tmp_path, token_share=0.0)
    assert rows_of(tmp_path / "codes") == rows_of(tmp_path / "expected")
    write_lines(source, rows_of(tmp_path / "codes"))
    with pytest.raises(ValueError, match="row 1, .*image: the image is given neither .* codes that the row holds"):
        extract(tmp_path, "again", token_share=0.0)


def test_a_folder_of_another_tokenizer_is_refused(tmp_path):
    make_source(tmp_path, 2)
    extract(tmp_path)
    tiny_model(seed=1).vq_model.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="was begun with fingerprint"):
        extract(tmp_path)


def test_the_commands_extract_and_check(tmp_path):
    source = make_source(tmp_path)
    folders = ["--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "codes"]
    done = run_command("extract-codes", source, *folders, "--shard-size", 3, "--top-k", 4)
    assert done.exit_code == 0 and "8 rows in 3 shards (0 were there), 0 rows skipped" in done.stdout
    extract(tmp_path, "called")
    assert contents(tmp_path / "codes") == contents(tmp_path / "called")
    checked = run_command("check-codes", tmp_path / "codes")
    assert checked.exit_code == 0 and checked.stdout == "8 rows in 3 shards, 0 rows skipped\n"
    (tmp_path / "codes" / "codes-000001.parquet").unlink()
    checked = run_command("check-codes", tmp_path / "codes")
    assert checked.exit_code == 2 and "codes-000001.parquet are missing or damaged" in checked.stderr


def test_actors_of_ray_write_the_shards_that_processes_do(tmp_path):
    ray = pytest.importorskip("ray")
    make_source(tmp_path)
    whole = extract(tmp_path)
    assert extract(tmp_path, "by_ray", engine="ray", processes=2) == whole
    assert contents(tmp_path / "by_ray") == contents(tmp_path / "codes")
    # What is there is not made again, by whichever engine.
    (tmp_path / "by_ray" / "codes-000001.parquet").unlink()
    assert extract(tmp_path, "by_ray")["found"] == 2
    # A row that cannot be used is told in the words of the local engine.
    (tmp_path / "4-0.png").write_bytes(b"no image")
    with pytest.raises(ValueError) as told:
        extract(tmp_path, "locally")
    with pytest.raises(ValueError) as told_by_ray:
        extract(tmp_path, "by_ray_too", engine="ray")
    assert str(told_by_ray.value) == str(told.value)
    if not ray.cluster_resources().get("GPU"):
        with pytest.raises(ValueError, match="needs a GPU, and the Ray cluster has none"):
            extract(tmp_path, "on_gpus", engine="ray", device="cuda")
    ray.shutdown()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"processes": 0}, "processes must be at least 1, got 0"), ({"device": "nonsense"}, "nonsense")],
    ids=str,
)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_settings_of_engines_that_cannot_be_are_refused_before_anything_starts(engine, settings, message, tmp_path):
    make_source(tmp_path)
    with pytest.raises(ValueError, match=message):
        extract(tmp_path, engine=engine, **settings)
    assert not (tmp_path / "codes").exists()


def test_where_nothing_lacks_no_engine_starts(tmp_path, monkeypatch):
    make_source(tmp_path)
    whole = extract(tmp_path)
    write_lines(tmp_path / "empty.jsonl", [])
    monkeypatch.setitem(code_extraction.ENGINES, "ray", lambda *args: pytest.fail("started"))
    assert extract(tmp_path, engine="ray") == whole | {"found": 3}
    empty = extract_codes(tmp_path / "empty.jsonl", tmp_path / "tokenizer", tmp_path / "none", engine="ray")
    assert empty == {"rows": 0, "skipped": 0, "shards": 0, "found": 0}


def test_an_engine_that_is_not_known_is_refused(tmp_path):
    make_source(tmp_path)
    with pytest.raises(ValueError, match="engine must be one of"):
        extract(tmp_path, engine="spark")
