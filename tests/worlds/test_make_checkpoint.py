"""The script that assembles the bundled checkpoint, on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import tiny_model, tiny_processor
from transformers import AutoProcessor

from transformers_nextflow import ImageSampling, NextFlowForConditionalGeneration
from transformers_nextflow.evaluation.results import write_result


SCRIPT = Path(__file__).parents[2] / "examples" / "shapes" / "make_checkpoint.py"
SCORES = {
    "text_to_image": {"counting": 0.811, "overall": 0.822, "counting_strict": 0.633, "overall_strict": 0.644},
    "held_out_combinations": {"counting": 0.155, "overall": 0.166, "counting_strict": 0.111, "overall_strict": 0.122},
    "understanding": {"color": 0.977, "caption": 0.888, "overall": 0.933, "questions": 0.955},
    "tokenizer": {"psnr": 36.123, "usage": 0.866, "usage_scale_1": 0.001, "perplexity_scale_1": 1.999},
    "oracle": {"first_0_scales_true": 0.701, "first_3_scales_true": 0.902},
    "editing": {"add": 0.753, "overall": 0.764},
}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    model = tiny_model()
    model.config.vq_config._name_or_path = str(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "processor")

    def run(*arguments):
        folders = [f"--{name}={tmp_path / name}" for name in ("model", "processor", "output")]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *folders, *map(str, arguments)])
        script.main()
        return tmp_path / "output"

    return run


def test_the_folder_holds_model_processor_and_settings(run):
    output = run("--guidance_scale", 2, "--temperature", 1, 1, 0.8, 0.8, "--top_k", 5)
    model = NextFlowForConditionalGeneration.from_pretrained(output)
    tokenizer = AutoProcessor.from_pretrained(output).tokenizer
    expected = ImageSampling(guidance_scale=2.0, temperature=[1.0, 1.0, 0.8, 0.8], top_k=5)
    assert model.default_image_sampling == expected
    assert str(output.parent) not in (output / "config.json").read_text()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    torch.testing.assert_close(model.state_dict(), tiny_model().state_dict(), rtol=0, atol=0)


def test_settings_that_do_not_fit_the_scales_are_refused(run):
    with pytest.raises(ValueError, match="temperature gives 2 values, but the image is drawn in 4 scales"):
        run("--temperature", 1, 0.5)


def test_a_further_trained_pixel_decoder_is_taken_over_and_nothing_else(run, tmp_path):
    vq_model = tiny_model().vq_model
    vq_model.pixel_decoder.output_projection.bias.data += 1
    vq_model.save_pretrained(tmp_path / "decoder")
    loaded = NextFlowForConditionalGeneration.from_pretrained(run("--tokenizer", tmp_path / "decoder")).vq_model
    torch.testing.assert_close(loaded.state_dict(), vq_model.state_dict(), rtol=0, atol=0)

    vq_model.quantizer.pixel_codebook.weight.data += 1
    vq_model.save_pretrained(tmp_path / "codes")
    with pytest.raises(ValueError, match="quantizer.pixel_codebook.weight"):
        run("--tokenizer", tmp_path / "codes")


def test_the_model_card_tells_every_score_and_where_it_comes_from(run, tmp_path):
    write_result(tmp_path / "shapes.json", SCORES)
    card = (run("--results", tmp_path / "shapes.json", "--top_p", 0.9) / "README.md").read_text()
    head, text = card.split("---\n")[1:3]
    assert "license: apache-2.0" in head and "pipeline_tag: any-to-any" in head and "url: text_to_image.png" in head
    for table in SCORES.values():
        for score in table.values():
            assert f"{score:.3f}" in text
    results = ModelCard(card).data.eval_results
    told = {one.dataset_config: one.metric_value for one in results}
    assert told == {suite: scores["overall"] for suite, scores in SCORES.items() if "overall" in scores}
    assert all(text in head for text in ("make the red circle green", "what happens?", "video.png", "language: en"))
    assert "top_p=0.9" in text and "train_transformer.py" in text
    assert json.loads((tmp_path / "shapes.json").read_text())["machine"]["cpu"] in text


def test_the_scores_of_both_layouts_stand_beside_each_other(run, tmp_path):
    others = ({"editing": {"overall": 0.234}}, {"editing": {"overall": 0.345}, "understanding": {"questions": 0.567}})
    for name, scores in (("shapes", {}), *zip(("read", "unread"), others)):
        write_result(tmp_path / f"{name}.json", SCORES | scores)
    layouts = (tmp_path / "read.json", tmp_path / "unread.json")
    card = (run("--results", tmp_path / "shapes.json", "--layouts", *layouts) / "README.md").read_text()
    assert "| editing | 0.764 |" in card and "| editing | 0.234 | 0.345 |" in card
    assert "| questions | 0.955 | 0.567 |" in card
    assert f"scored at commit {json.loads(layouts[1].read_text())['commit']}" in card


def test_results_that_lack_a_suite_are_refused(run, tmp_path):
    (tmp_path / "raster.json").write_text('{"speedup": {"16x16": 7.0}}')
    with pytest.raises(ValueError, match="lacks the suites"):
        run("--results", tmp_path / "raster.json")


def test_a_checkpoint_that_is_too_large_is_not_written(run, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        run()
    assert not (tmp_path / "output").exists()
