"""Model cards: true heads that the Hub reads, nothing of this machine in them, and no words of other libraries."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_own_images import SHORT, changes, run
from tiny import tiny_model, tiny_processor
from tiny_diffusion import save_pipeline_folder

from transformers_nextflow import NextFlowDiffusionDecoder, NextFlowForConditionalGeneration, NextFlowPipeline
from transformers_nextflow.trainers.packing import PackedDataset
from transformers_nextflow.trainers.recipe_data import StageRows
from transformers_nextflow.trainers.runs.training_card import TrainingCardMixin
from transformers_nextflow.utils import model_cards
from transformers_nextflow.utils.model_cards import derived_card_metadata, read_card_metadata


FOREIGN = ("None", "More Information Needed", "time machine", "Trainer has been", "needed")
HEAD = "---\nlicense: apache-2.0\nlanguage: en\nbase_model: someone/base\n---\n# A card of one's own\n"


def card_of(folder, *own_words: str) -> ModelCard:
    """The card, which names nothing of this machine and says nothing that is not so."""
    card = ModelCard.load(Path(folder) / "README.md")
    assert "&id" not in card.content and "/tmp" not in card.content and str(Path(folder).parent) not in card.content
    for word in FOREIGN:
        assert word not in card.content, word
    assert card.data.tags[:2] == ["nextflow", "next-scale-prediction"]
    for word in own_words:
        assert word in card.text, word
    return card


@pytest.fixture
def start(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    lines = []
    for name in ("red", "lime", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / "photos" / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": f"all {name}"}))
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "photos"


def test_a_saved_model_has_a_card_and_one_of_ones_own_stays(start, tmp_path):
    card = card_of(start, "parameters", "images of 16 pixels", "NextFlowPipeline.from_pretrained")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "transformers",
        "any-to-any",
        "unknown",
    )
    assert card.data.base_model is None
    model = NextFlowForConditionalGeneration.from_pretrained(start)
    vq_card = model.vq_model.save_pretrained(tmp_path / "vq") or card_of(tmp_path / "vq", "vq_model.reconstruct")
    assert vq_card.data.pipeline_tag is None
    (start / "README.md").write_text(HEAD)
    model.save_pretrained(start)
    assert (start / "README.md").read_text() == HEAD


@pytest.mark.parametrize("rows", [range(5), PackedDataset(range(5), lambda row: 1, 2), StageRows(range(5), None)])
def test_a_card_counts_rows_and_not_the_packs_of_them(rows):
    trained = TrainingCardMixin()
    trained.train_dataset = rows
    assert trained._card_rows() == "Trained on 5 rows of a local data set."


def test_a_saved_pipeline_has_a_card_and_one_of_ones_own_stays(start, tmp_path):
    pipe = NextFlowPipeline.from_pretrained(start)
    pipe.save_pretrained(tmp_path / "pipe")
    data = card_of(tmp_path / "pipe").data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    (tmp_path / "pipe" / "README.md").write_text(HEAD)
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "README.md").read_text() == HEAD


def test_licence_language_and_base_are_told_on_and_folders_are_not(start, tmp_path):
    (start / "README.md").write_text(HEAD)
    NextFlowForConditionalGeneration.from_pretrained(start).save_pretrained(tmp_path / "again")
    pipe = NextFlowPipeline.from_pretrained(start)
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "model" / "README.md").unlink()
    NextFlowPipeline.from_pretrained(tmp_path / "pipe").model.save_pretrained(tmp_path / "out of it")
    for folder in ("again", "out of it"):
        data = card_of(tmp_path / folder).data
        assert (data.license, data.language, data.base_model) == ("apache-2.0", "en", "someone/base")
    assert derived_card_metadata("someone/other") == {"license": "unknown", "base_model": "someone/other"}
    assert read_card_metadata(tmp_path) == {}


def test_what_a_training_leaves_says_what_it_is(start, photos, tmp_path):
    options = changes(**SHORT, logging_steps=1)
    run("train", "--model", start, "--data", photos, "--output", tmp_path / "out", *options)
    card = card_of(tmp_path / "out" / "final", "1 of 1 steps", "Trained on 3 rows of a local data set", "image_loss")
    assert card.data.widget == [
        {"text": f"all {name}", "output": {"url": "samples.png"}} for name in ("red", "lime", "blue")
    ]
    assert Image.open(tmp_path / "out" / "final" / "samples.png").size == (4 * 20 + 4, 3 * 20 + 4)
    assert "| learning_rate | 0.002 |" in card.text and "output_dir" not in card.text


def test_nothing_is_compiled_to_draw_the_samples(start, photos, tmp_path, monkeypatch):
    with_gradients, plain_compile = [], torch.nn.Module.compile

    def backend(graph, inputs):
        with_gradients.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: plain_compile(self, backend=backend, **options)
    )
    torch._dynamo.reset()
    tiny_model(text_config={"num_hidden_layers": 1}).save_pretrained(start)
    options = changes(**SHORT, compile_layers=True)
    run("train", "--model", start, "--data", photos, "--output", tmp_path / "out", *options)
    assert with_gradients and all(with_gradients)
    torch._dynamo.reset()


def test_the_card_of_a_tokenizer_has_its_psnr_as_the_hub_reads_results(start, photos, tmp_path):
    run("train", "tokenizer", "--model", start, "--data", photos, "--output", tmp_path / "out", *changes(**SHORT))
    card = card_of(tmp_path / "out" / "final", "reconstructions.png", "It knows only images like those")
    (result,) = card.data.eval_results
    assert result.metric_type == "psnr" and 0 < result.metric_value < 60 and result.dataset_type == "local"
    assert (tmp_path / "out" / "final" / "reconstructions.png").is_file() and "| semantic_weight | 0 |" in card.text
    tiny_model().vq_model.save_pretrained(tmp_path / "vq")
    run(
        "train",
        "tokenizer",
        "--model",
        tmp_path / "vq",
        "--data",
        photos,
        "--output",
        tmp_path / "own",
        *changes(**SHORT),
    )
    assert "vq_model.reconstruct" in card_of(tmp_path / "own" / "final").text


def test_the_card_of_a_diffusion_decoder_says_what_it_draws_and_tells_its_bases_licence(start, photos, tmp_path):
    base = save_pipeline_folder(tmp_path / "base", "sd3")
    (base / "README.md").write_text(HEAD)
    options = changes(**SHORT, level=16, decoder=f"{{base: {base}, lora_rank: 2}}", logging_steps=1)
    run("train", "diffusion_decoder", "--model", start, "--data", photos, "--output", tmp_path / "out", *options)
    final = tmp_path / "out" / "final"
    card = card_of(final, "1 of 1 steps", 'decoder="diffusion"', "adapters of rank 2", "images of 16x16 pixels")
    told = card.data
    assert (told.library_name, told.pipeline_tag, told.license) == ("diffusers", "image-to-image", "apache-2.0")
    assert told.base_model == "someone/base" and Image.open(final / "reconstructions.png").size == (64, 64)
    decoder = NextFlowDiffusionDecoder.from_pretrained(final)
    decoder.save_pretrained(tmp_path / "again")
    assert card_of(tmp_path / "again", "of the same size").data.license == "apache-2.0"


@pytest.mark.filterwarnings("ignore:An adapter cannot draw what its tokenizer")  # which nothing has trained
def test_the_card_of_an_adapter_says_so_and_how_to_load_it(start, photos, tmp_path):
    pytest.importorskip("peft")
    (start / "README.md").write_text(HEAD)
    run("train", "--lora", "--model", start, "--data", photos, "--output", tmp_path / "out", *changes(**SHORT))
    card = card_of(tmp_path / "out" / "final", "LoRA, rank 16", "all red", "[pipelines,peft]")
    assert (card.data.library_name, card.data.license) == ("peft", "apache-2.0") and "lora" in card.data.tags
    assert card.data.base_model == "someone/base"
    assert NextFlowPipeline.from_pretrained(tmp_path / "out" / "final")("all red").images


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["whole", "lora"])
def test_the_card_of_rl_names_its_rewards(lora, start, photos, tmp_path):
    pytest.importorskip("trl")
    steps = changes(**SHORT | {"save_strategy": "steps", "save_steps": 1}, per_device_train_batch_size=2)
    command = ["train", "--rl", "--model", start, "--data", photos, "--output", tmp_path / "out", *steps]
    run(*command, *changes(num_generations=2), *lora)
    for folder in ("final", "checkpoint-1"):
        card = card_of(tmp_path / "out" / folder, "GRPO on rewards of what it draws (own_reading)")
        assert {"grpo", "rl"} <= set(card.data.tags) and ("lora" in card.data.tags) == bool(lora)
    card_of(tmp_path / "out")  # what is uploaded along with the checkpoints


def test_a_data_set_of_the_hub_is_named(start, photos, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: loaded)
    run("train", "--model", start, "--data", "someone/photos", "--output", tmp_path / "out", *changes(**SHORT))
    assert card_of(tmp_path / "out" / "final", "huggingface.co/datasets/someone/photos").data.datasets == [
        "someone/photos"
    ]


def test_a_repository_without_a_card_is_given_the_models_before_transformers_looks(monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def file_exists(self, repo_id, name):
            return repo_id == "someone/old"

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            calls.append((repo_id, path_in_repo, Path(path_or_fileobj).read_text()))

    monkeypatch.setattr(model_cards, "HfApi", Api)
    monkeypatch.setattr(
        "transformers.PreTrainedModel.push_to_hub", lambda self, repo_id, **kwargs: calls.append(repo_id)
    )
    model = tiny_model()
    model.push_to_hub("someone/new")
    model.push_to_hub("someone/old")
    (repo, name, text), *others = calls
    assert (repo, name) == ("someone/new", "README.md") and "pipeline_tag: any-to-any" in text
    assert others == ["someone/new", "someone/old"]
