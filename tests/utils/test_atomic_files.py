"""Files and folders are whole or not there, and what stood there stays until then."""

import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_processor
from transformers import AutoProcessor, modeling_utils

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowPipeline, NextFlowProcessor
from transformers_nextflow.utils import atomic_files
from transformers_nextflow.utils.atomic_files import atomic_folder_write, atomic_write, write_with_fallback


@pytest.fixture(params=["in one step", "in two steps"])
def swap(request, monkeypatch):
    if request.param == "in two steps":
        monkeypatch.setattr(atomic_files, "_swap_in_one_step", lambda *_: False)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def fail():
    raise OSError("No space left on device")


def test_a_folder_takes_the_place_of_one_whose_files_go(tmp_path, swap):
    make(tmp_path / "final", {"old": "1", "both": "1"})
    with atomic_write(tmp_path / "final") as partial:
        make(partial, {"both": "2"})
        assert content(tmp_path / "final") == {"old": "1", "both": "1"}
    assert content(tmp_path) == {"final/both": "2"}


def test_a_link_stays_one_and_what_it_names_is_written(tmp_path, swap):
    make(tmp_path / "disk" / "final", {"old": "1"})
    (tmp_path / "final").symlink_to(tmp_path / "disk" / "final")
    with atomic_write(tmp_path / "final") as partial:
        make(partial, {"new": "2"})
    assert (tmp_path / "final").is_symlink() and content(tmp_path / "disk") == {"final/new": "2"}

    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "scores.json")
    with atomic_write(tmp_path / "link.json") as partial:
        partial.write_text("3")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "disk" / "scores.json").read_text() == "3"


def test_a_file_and_a_folder_do_not_take_each_others_place(tmp_path):
    make(tmp_path, {"folder/old": "1", "file": "1"})
    with pytest.raises(OSError, match="folder"), atomic_write(tmp_path / "folder") as partial:
        partial.write_text("2")
    with pytest.raises(OSError, match="is a file"), atomic_write(tmp_path / "file") as partial:
        make(partial, {"new": "2"})
    assert content(tmp_path) == {"folder/old": "1", "file": "1"}


def test_where_the_new_folder_cannot_take_its_place_the_old_one_comes_back(tmp_path, monkeypatch):
    make(tmp_path / "final", {"old": "1"})
    monkeypatch.setattr(atomic_files, "_swap_in_one_step", lambda *_: False)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda own, to: fail() if to.name == "final" == own.name else rename(own, to))
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "final") as partial:
        make(partial, {"new": "2"})
    assert content(tmp_path) == {"final/old": "1"}


@pytest.mark.parametrize("place", ["beside", "the current folder", "with another folder in it"])
def test_what_is_written_into_a_folder_comes_whole_and_the_rest_stays(tmp_path, monkeypatch, place):
    target = make(tmp_path / "model", {"notes": "1", "config.json": "1", "model-00001-of-00002.safetensors": "1"})
    expected = {"notes": "1", "config.json": "2", "model.safetensors": "2"}
    if place == "the current folder":
        monkeypatch.chdir(target)
    elif place == "with another folder in it":
        make(target, {"runs/log": "1"})
        expected["runs/log"] = "1"
    with pytest.raises(OSError, match="No space left"), atomic_folder_write(target) as partial:
        make(partial, {"config.json": "2"})
        fail()
    assert content(target)["config.json"] == "1" and len(list(tmp_path.iterdir())) == 1
    with atomic_folder_write(target) as partial:
        assert partial.name == target.name
        make(partial, {"config.json": "2", "model.safetensors": "2"})
    assert content(target) == expected and len(list(tmp_path.iterdir())) == 1


def test_folders_that_do_not_stay_go(tmp_path):
    target = make(tmp_path / "pipe", {"model/config.json": "1", "model/notes": "1", "model/adapters/a/weights": "1"})
    with atomic_folder_write(target, replaced=["model/adapters"]) as partial:
        make(partial, {"model/config.json": "2"})
    assert content(target) == {"model/config.json": "2", "model/notes": "1"}
    make(target, {"model/adapters/a/weights": "1", "other/file": "1"})
    with atomic_folder_write(target, replaced=["model/adapters"]) as partial:
        make(partial, {"model/config.json": "3"})
    assert content(target) == {"model/config.json": "3", "model/notes": "1", "other/file": "1"}


def test_a_result_that_cannot_be_written_is_kept_beside_and_the_message_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.json").mkdir()
    with pytest.raises(OSError, match=r"scores.json cannot be written .* kept in .*scores.1.json"):
        write_with_fallback(tmp_path / "scores.json", lambda path: path.write_text("1"))
    assert (tmp_path / "scores.1.json").read_text() == "1"
    (tmp_path / "file").write_text("1")
    with pytest.raises(OSError, match=r"kept in .*scores.2.json"):
        write_with_fallback(tmp_path / "file" / "scores.json", lambda path: path.write_text("2"))
    assert (tmp_path / "scores.2.json").read_text() == "2"
    with pytest.raises(OSError, match="^No space left on device$"):
        write_with_fallback(tmp_path / "other.json", lambda path: fail())


@pytest.mark.parametrize("kind", ["model", "processor", "pipeline"])
def test_what_cannot_be_saved_to_its_end_leaves_what_was_saved_before(kind, tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    saved = {"model": tiny_model(), "processor": tiny_processor()}
    saved["pipeline"] = NextFlowPipeline(saved["model"], saved["processor"])
    saved[kind].save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    last = {
        "model": (modeling_utils, "safe_save_file"),
        "processor": (NextFlowProcessor, "to_json_file"),
        "pipeline": (NextFlowPipeline, "save_config"),
    }
    monkeypatch.setattr(*last[kind], lambda *_, **__: fail())
    with pytest.raises(OSError, match="No space left"):
        saved[kind].save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_model_and_processor_are_saved_into_one_folder_again_and_again(tmp_path):
    for seed in (0, 1):
        tiny_model(seed).save_pretrained(tmp_path / "saved")
        names = tiny_processor().save_pretrained(tmp_path / "saved")
        assert all(os.path.exists(name) for name in names)
    model = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(model.lm_head.weight, tiny_model(1).lm_head.weight)
    assert AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        tiny_model().save_pretrained(tmp_path / "file")
