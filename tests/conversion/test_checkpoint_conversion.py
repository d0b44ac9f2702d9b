"""Key tables, checks, files in and out, and the report of keys."""

import pickle
import re

import pytest
import torch
from command_line import run_command
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model, tiny_processor, tiny_vq_config

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.conversion import checkpoints as checkpoint_conversion
from transformers_nextflow.conversion.checkpoints import (
    INDEX,
    KeyMap,
    PickledCheckpoint,
    ShardedCheckpoint,
    check_state,
    new_folder,
    read_layout,
    read_state_dict,
    write_model_card,
    write_shards,
)
from transformers_nextflow.conversion.report import report


KEYS = KeyMap({"model.layers.*.mlp.*": "layers.*.*", "model.norm": "norm"}, dropped=["visual.*"])


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_a_key_table_is_read_in_both_directions():
    state = {"model.layers.3.mlp.up.weight": torch.zeros(1), "model.norm": torch.ones(1)}
    renamed = KEYS.forward(state | {"visual.x": torch.zeros(2)})
    assert list(renamed) == ["layers.3.up.weight", "norm"]
    assert KEYS.inverse(renamed) == state


def test_a_key_table_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="no rows for model.other, model.norm.x"):
        KEYS.forward({"model.other": 0, "model.norm": 1, "model.norm.x": 2})
    with pytest.raises(ValueError, match="Two keys of the file map to 'norm'"):
        KeyMap({"a": "norm", "b": "norm"}).forward({"a": 0, "b": 1})
    with pytest.raises(ValueError, match="as many"):
        KeyMap({"a.*": "b"})


def test_all_faults_of_a_state_are_told_at_once():
    expected = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.zeros(1, device="meta")}
    check_state({"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1)}, expected)
    with pytest.raises(ValueError, match="integers: a"):
        check_state({"a": torch.ones(2, dtype=torch.long)}, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"missing: b; not expected: d; of another shape: a \(3,\) instead of \(2,\)"):
        check_state({"a": torch.ones(3), "c": torch.ones(1), "d": torch.ones(1)}, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    tensor = torch.zeros(5, 7, dtype=dtype)
    check_state({"a": tensor}, {"a": tensor})
    tensor[3, 2] = value
    with pytest.raises(ValueError, match="'a' holds NaN or infinite"):
        check_state({"a": tensor}, {"a": tensor})


def test_a_pickle_is_read_if_it_holds_tensors_alone(tmp_path):
    torch.save({"a": torch.arange(3), "step": 7}, tmp_path / "good.pt")
    assert torch.equal(read_state_dict(tmp_path / "good.pt")["a"], torch.arange(3))
    torch.save({"a": Code()}, tmp_path / "code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code()))
    for name in ("code.pt", "plain.pt"):
        with pytest.raises(ValueError, match="not a pickle of only tensors"):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1", "<!DOCTYPE html>", "hello", "x", ""])
def test_what_came_in_place_of_a_file_is_not_called_unsafe(tmp_path, content):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read; is it complete"):
            read_state_dict(tmp_path / name)


def test_a_file_that_is_not_whole_is_refused(tmp_path):
    torch.save({"a": torch.arange(300)}, tmp_path / "a.pt")
    save_file({"a": torch.arange(300)}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for length in (10, 1000, len(whole) - 100, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"{name} cannot be read; is it complete"):
                read_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match="There is no file"):
        read_state_dict(tmp_path / "none.pt")


@pytest.mark.parametrize("content", ["{oops", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
@pytest.mark.parametrize("kind", [ShardedCheckpoint, PickledCheckpoint])
def test_an_index_that_is_none_is_refused(tmp_path, content, kind):
    (tmp_path / kind.index).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / kind.index))):
        kind(tmp_path)


def test_what_is_written_in_shards_is_read_back(tmp_path):
    state = {"a": torch.rand(40, 10), "b": torch.rand(3).bfloat16(), "c": torch.tensor(2.5), "d": torch.rand(300)}
    layout = {key: tensor.to("meta") for key, tensor in state.items()}
    for size, sharded in (("1KB", True), ("1GB", False)):
        with new_folder(tmp_path / size) as folder:
            write_shards(folder, layout, state.__getitem__, size)
        assert (tmp_path / size / INDEX).exists() == sharded
        checkpoint = ShardedCheckpoint(tmp_path / size)
        assert list(checkpoint) and checkpoint.keys() == state.keys()
        for key, tensor in state.items():
            assert torch.equal(checkpoint[key], tensor) and checkpoint.layout[key].dtype == tensor.dtype
            assert checkpoint.layout[key].is_meta and checkpoint.layout[key].shape == tensor.shape


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(ValueError, match="bad input"), new_folder(tmp_path / "other"):
        raise ValueError("bad input")
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "full", {"seed": 0}) as folder:
        (folder / "file").write_text("a")
        raise OSError("disk full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.partial", "out"]
    with new_folder(tmp_path / "full", {"seed": 0}) as folder:
        assert (folder / "file").read_text() == "a"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


@pytest.mark.parametrize("plan", [None, {"seed": 0}])
def test_a_partial_folder_of_another_origin_is_left_alone(tmp_path, plan):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not from a conversion; move it away"), new_folder(tmp_path / "out", plan):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_a_file_that_cannot_be_written_names_itself_and_the_remedy(tmp_path, monkeypatch):
    def full(tensors, path, **options):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_conversion, "save_file", full)
    state = {"a": torch.rand(3)}
    message = "model.safetensors could not be written: No space left.*Make room"
    with pytest.raises(OSError, match=message), new_folder(tmp_path / "out", {"seed": 0}) as folder:
        write_shards(folder, {"a": state["a"].to("meta")}, state.__getitem__)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("models--Qwen--Small/snapshots/0a1b", "Qwen/Small"), ("Small", None)],
)
def test_the_card_names_the_source_and_its_licence(tmp_path, folder, name):
    source = tmp_path / folder
    source.mkdir(parents=True)
    write_model_card(tmp_path, source, "Title", "Text.", prompts=["a dog"])
    assert "license: unknown" in (tmp_path / "README.md").read_text()
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    write_model_card(tmp_path, source, "Title", "Text.", prompts=["a dog"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.base_model, card.data.widget) == ("mit", name, [{"text": "a dog"}])
    assert card.content.endswith("# Title\n\nText.\n")
    write_model_card(tmp_path, source, "Title", "Text.")
    assert "widget" not in ModelCard.load(tmp_path / "README.md").data.to_dict()


def test_the_licence_of_a_file_in_the_hubs_cache_is_found(tmp_path):
    # Files of a snapshot are links to blobs, which lie in a folder without a card.
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, text in (("README.md", "---\nlicense: mit\n---\n"), ("x.pt", "weights")):
        (blobs / name[0]).write_text(text)
        (snapshot / name).symlink_to(blobs / name[0])
    write_model_card(tmp_path, snapshot / "x.pt", "Title", "Text.")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "a/b")


def test_inspect_tells_what_matches_what_has_another_shape_and_what_is_missing(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    count = len(read_layout(tmp_path / "model.safetensors"))
    NextFlowPipeline(model, tiny_processor()).save_pretrained(tmp_path / "pipeline")
    result = run_command("inspect", tmp_path / "pipeline")
    assert result.exit_code == 0 and result.stdout.rstrip() == report(tmp_path)
    assert f"{count} matches, 0 other shape, 0 not NextFlow's, 0 missing" in result.stdout

    state = model.state_dict()
    state["model.language_model.norm.weight"] = torch.ones(7)
    state["text.norm.weight"] = state.pop("lm_head.weight")
    save_file(state, tmp_path / "model.safetensors")
    told = report(tmp_path / "model.safetensors")
    assert re.search(r"^other shape +model.language_model.norm.weight +\(7,\) float32$", told, re.M)
    assert re.search(r"^not NextFlow's +text.norm.weight ", told, re.M)
    assert re.search(r"^missing +lm_head.weight ", told, re.M)
    assert f"{count - 2} matches, 1 other shape, 1 not NextFlow's, 1 missing" in told


def test_inspect_reads_the_tensors_of_a_training_checkpoint_and_refuses_code(tmp_path):
    torch.save({"step": 3, "model": {"lm_head.weight": torch.ones(2, 3)}}, tmp_path / "a.pt")
    assert "model.lm_head.weight (2, 3) float32" in report(tmp_path / "a.pt", tiny_config()).replace("  ", "")
    assert "NextFlowVQConfig" in report(tmp_path / "a.pt", tiny_vq_config())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert report(tmp_path / "a.pt").endswith("python conversion/convert_qwen2_5_vl.py")
    torch.save({"step": 3}, tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, message in (("none.pt", "holds no named tensors"), ("text.pt", "cannot be read"),
                          ("config.json", "give the folder")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            report(tmp_path / name)
    torch.save(Code(), tmp_path / "b.pt")
    result = run_command("inspect", tmp_path / "b.pt")
    assert result.exit_code == 2 and "not a pickle of only tensors" in result.stderr
