"""Where the model and the processor of a folder or a repository lie, and what is loaded from there."""

import json
import shutil

import pytest
from library_versions import loads_tokenizers_of_subfolders
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowPipeline, NextFlowVQModel
from transformers_nextflow.data import load_vision_tokenizer, tokenizer_fingerprint
from transformers_nextflow.data.vision_tokenizer import load_processor
from transformers_nextflow.utils.folder_parts import Place, find_part, load_model


COMMIT = "0" * 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline and a model with its processor, as folders and as repositories in a cache of the Hub."""
    folder = tmp_path_factory.mktemp("saved")
    NextFlowPipeline(tiny_model(), tiny_processor()).save_pretrained(folder / "pipeline")
    for part in ("model", "processor"):
        shutil.copytree(folder / "pipeline" / part, folder / "whole", dirs_exist_ok=True)
    for name in ("pipeline", "whole"):
        repository = folder / f"models--someone--{name}"
        shutil.copytree(folder / name, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        absent = repository / ".no_exist" / COMMIT / "processor"  # where transformers looks for a tokenizer's config
        absent.mkdir(parents=True)
        (absent / "config.json").touch()
    return folder


@pytest.mark.parametrize("part", ["model", "processor"])
def test_a_part_is_found_in_folders_and_repositories_of_models_and_pipelines(saved, part):
    hub = {"cache_dir": saved, "local_files_only": True}
    assert find_part(part, saved / "whole") == Place(saved / "whole", {})
    for folder in ("pipeline", "pipeline/model", "pipeline/processor"):  # each part knows the other one
        place = find_part(part, saved / folder)
        assert (saved / "pipeline" / part).samefile(place.folder) and place.options == {}
    assert find_part(part, "someone/whole", **hub) == Place("someone/whole", hub)
    assert find_part(part, "someone/pipeline", **hub) == Place("someone/pipeline", hub | {"subfolder": part})
    assert find_part(part, saved) is None


IN_SUBFOLDERS = pytest.param("someone/pipeline", marks=loads_tokenizers_of_subfolders)


@pytest.mark.parametrize("base", ["whole", "pipeline", "someone/whole", IN_SUBFOLDERS])
def test_an_adapters_base_model_is_found_in_all_of_them_and_has_its_processor(saved, base, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(saved))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(saved))
    monkeypatch.chdir(saved)
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    loaded = load_model(NextFlowForConditionalGeneration, tmp_path)
    expected = dict(model.get_base_model().named_parameters())
    assert all((weight == expected[name]).all() for name, weight in loaded.named_parameters())
    assert loaded.active_adapters() == ["default"]
    assert load_processor(tmp_path).to_dict() == tiny_processor().to_dict()
    assert find_part("model", tmp_path) is None  # which alone would be the base model without the adapter


def test_tokenizer_and_processor_are_taken_out_of_a_pipeline(saved):
    fingerprint = tokenizer_fingerprint(tiny_model().vq_model)
    assert tokenizer_fingerprint(load_vision_tokenizer(saved / "pipeline")) == fingerprint
    assert load_processor(saved / "pipeline").to_dict() == tiny_processor().to_dict()


@pytest.mark.parametrize("kind", [NextFlowForConditionalGeneration, NextFlowVQModel])
def test_a_models_own_from_pretrained_says_how_a_pipelines_folder_is_loaded(saved, kind):
    with pytest.raises(ValueError, match="pipeline holds a pipeline; load its model with subfolder='model'"):
        kind.from_pretrained(saved / "pipeline")
    with pytest.raises(OSError, match="no file"):
        kind.from_pretrained(saved)
