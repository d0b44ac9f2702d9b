"""The recipes of the diffusion decoder: its two stages, trained bases, errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipes import SMALL_VQ, write_rows
from tiny import tiny_model, tiny_processor
from tiny_diffusion import save_pipeline_folder

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.data import open_rows
from transformers_nextflow.diffusion_decoder import NextFlowDiffusionDecoder, small_decoder
from transformers_nextflow.trainers.diffusion.from_recipe import DecoderImages
from transformers_nextflow.trainers.recipes import load_recipe, run_recipe


TINY = [*SMALL_VQ, "decoder={channels: [8, 16], layers: 1, pixel_cell: 2}"]


@pytest.fixture
def start(tmp_path):
    """The folder of a model."""
    NextFlowPipeline(tiny_model(), tiny_processor()).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": [{"type": "image"}]}]
    return write_rows(tmp_path / "rows.jsonl", [{"messages": messages, "images": [f"{n}.png"]} for n in range(2)])


def test_the_second_stage_goes_on_from_the_first_at_twice_the_size(start, rows, tmp_path):
    first = load_recipe("diffusion_decoder", TINY)
    run_recipe(first, start, rows, tmp_path / "first")
    folder = tmp_path / "first" / "final"
    small = NextFlowDiffusionDecoder.from_pretrained(folder)
    assert small.config.upsampling == 1 and small.config.trained_sizes == [[16, 16]]
    second = load_recipe("diffusion_decoder_large", [*SMALL_VQ, f"decoder={{start: {folder}, upsampling: 2}}"])
    run_recipe(second, start, rows, tmp_path / "second")
    pipe = NextFlowPipeline.from_pretrained(start, diffusion_decoder=tmp_path / "second" / "final")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", decoder="diffusion").images[0].size == (32, 32)


def test_a_trained_base_is_named_in_the_recipe(start, rows, tmp_path):
    folder = save_pipeline_folder(tmp_path / "base", "flux")
    recipe = load_recipe("diffusion_decoder", [*SMALL_VQ, f"decoder={{base: {folder}, lora_rank: 2}}"])
    run_recipe(recipe, start, rows, tmp_path / "out")
    trained = NextFlowDiffusionDecoder.from_pretrained(tmp_path / "out" / "final")
    assert trained.config.lora_rank == 2 and trained.config.base["_class_name"] == "FluxTransformer2DModel"


def test_a_folder_of_images_is_enough_and_the_level_is_the_tokenizers_largest(start, rows, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in rows.parent.glob("*.png"):
        path.rename(photos / path.name)
    run_recipe(load_recipe("diffusion_decoder", [*TINY, "level=null"]), start, photos, tmp_path / "out")
    trained = NextFlowDiffusionDecoder.from_pretrained(tmp_path / "out" / "final")
    assert trained.config.trained_sizes == [[16, 16]]


def test_images_are_read_at_the_decoders_size_as_the_image_processor_reads_them(rows):
    source, root = open_rows(rows)
    images = DecoderImages(source, root, tiny_processor().image_processor, 16, 1)
    expected = tiny_processor().image_processor(images.square(0, 16), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(images[0]["pixel_values"], expected)
    large = DecoderImages(source, root, tiny_processor().image_processor, 16, 2)[0]["pixel_values"]
    assert large.shape == (3, 32, 32) and large.min() < -0.9 and large.max() > 0.9


def test_recipes_that_do_not_fit_are_refused(start, rows, tmp_path):
    with pytest.raises(ValueError, match="lora_rank is for the transformer"):
        load_recipe("diffusion_decoder", ["lora_rank=2"])
    with pytest.raises(ValueError, match="decoder=.* is of the kind diffusion_decoder"):
        load_recipe("tokenizer_pixel", ["decoder={layers: 1}"])
    with pytest.raises(ValueError, match="chanels"):
        run_recipe(load_recipe("diffusion_decoder", [*TINY[:-1], "decoder={chanels: [8]}"]), start, rows, tmp_path)
    other = small_decoder(tiny_model(seed=1).vq_model, channels=(8, 16), pixel_cell=2)
    other.save_pretrained(tmp_path / "other")
    recipe = load_recipe("diffusion_decoder", [*SMALL_VQ, f"decoder={{start: {tmp_path / 'other'}}}"])
    with pytest.raises(ValueError, match="trained on the codes of the tokenizer"):
        run_recipe(recipe, start, rows, tmp_path / "out")
