"""Tokenizer recipes on images of any ratio and several levels: batches of one size, scale dropout, averaged weights."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import ExifTags, Image
from processes import in_two_processes
from safetensors.torch import load_file
from test_data_format import image, write_lines
from test_trainer import Killed, conversation, text
from test_vq_trainer import make_trainer, tiny_vq_model
from tiny import free_port, tiny_model, tiny_processor, tiny_vq_config
from torch.utils.data import BatchSampler
from transformers import AutoProcessor, TrainerCallback

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowVQModel
from transformers_nextflow.trainers.recipe_data import BucketedImages
from transformers_nextflow.trainers.recipe_trainers import make_trainer as trainer_of
from transformers_nextflow.trainers.recipes import Recipe, load_recipe, run_recipe
from transformers_nextflow.trainers.tokenizer.codebook_maintenance import revive_dead_codes
from transformers_nextflow.trainers.tokenizer.image_batches import OneSizeSampler
from transformers_nextflow.trainers.tokenizer.vq_trainer import NextFlowVQTrainer


LEVELS = [[12, 3], [16, 4]]
# Heights and widths of files.
SIZES = [(40, 40), (20, 40), (80, 30), (16, 16), (33, 64), (24, 90), (50, 50)]
ARGUMENTS = {
    "stage": "joint", "semantic_weight": 0.0, "autoencoder_share": 0.25, "scale_dropout": 1.0, "ema_decay": 0.9,
    "max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_steps": 5, "logging_steps": 1,
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "kmeans_images": 7, "revive_every": 3,
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    generator, rows = np.random.default_rng(0), []
    for number, size in enumerate(SIZES):
        pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[274] = 6 if number == 2 else 1  # turned by a quarter of a circle
        Image.fromarray(pixels).save(tmp_path / f"{number}.png", exif=exif)
        rows.append({"messages": conversation([text("")], [image(f"{number}.png")])})
    write_lines(tmp_path / "rows.jsonl", rows)
    tiny_vq_model(levels=LEVELS).save_pretrained(tmp_path / "start")
    return tmp_path


def recipe_of(levels=(12, 16), cut_square=False, **changes) -> Recipe:
    return Recipe("tokenizer", ARGUMENTS | changes, levels=levels, cut_square=cut_square)


def batches_of(sampler, batch_size) -> list[list[int]]:
    return list(BatchSampler(sampler, batch_size, drop_last=False))


def test_every_batch_is_of_one_size_and_every_image_comes():
    sizes = [(16, 16)] * 7 + [(8, 32)] * 2 + [(32, 8)]
    sampler = OneSizeSampler(sizes, 3, seed=1)
    batches = batches_of(sampler, 3)
    assert len(sampler) == 15 and [len(batch) for batch in batches] == [3] * 5
    assert all(len({sizes[number] for number in batch}) == 1 for batch in batches)
    counts = Counter(number for batch in batches for number in batch)
    assert set(counts) == set(range(10)) and counts[9] == 3 and max(counts[number] for number in range(7)) == 2
    assert batches_of(OneSizeSampler(sizes, 3, seed=1), 3) == batches
    sampler.set_epoch(1)
    assert batches_of(sampler, 3) != batches


def test_processes_have_as_many_batches_each_of_one_size_and_of_its_own():
    sizes = [(16, 16)] * 7 + [(8, 32)] * 2 + [(32, 8)]
    own = [list(BatchSamplerShard(BatchSampler(OneSizeSampler(sizes, 3, 2), 3, False), 2, rank)) for rank in range(2)]
    assert len(own[0]) == len(own[1]) == 3
    assert all(len(batch) == 3 and len({sizes[n] for n in batch}) == 1 for batches in own for batch in batches)
    assert {number for batches in own for batch in batches for number in batch} == set(range(10))


def test_images_keep_their_ratios_at_the_level_that_is_drawn_for_them(data):
    processor = tiny_processor(levels=LEVELS).image_processor
    content = io.BytesIO()
    Image.new("RGB", (64, 16)).save(content, "PNG")
    held = [content.getvalue(), Image.new("RGB", (16, 64))]
    rows = [{"messages": conversation([text("")], [{"type": "image", "image": one}])} for one in held]
    rows += [{"messages": conversation([text("")], [image(f"{number}.png")])} for number in range(len(SIZES))]
    images = BucketedImages(rows, data, processor, (12, 16), cut_square=False, seed=2)
    assert set(images.levels) == {12, 16} and len(set(images.sizes)) > 3
    for index, (size, level) in enumerate(zip(images.sizes, images.levels)):
        pixels = images[index]["pixel_values"]
        source = held[index] if index < 2 else str(data / f"{index - 2}.png")
        expected = processor.preprocess(source, level=level, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected) and tuple(pixels.shape[1:]) == size
    turned = BucketedImages(rows, data, processor, (16,), cut_square=False).sizes[4]
    assert turned[1] > turned[0]  # the file is high, and lies on its side
    squares = BucketedImages(rows, data, processor, (12, 16), cut_square=True, seed=2)
    assert squares.sizes == [(level, level) for level in images.levels]
    assert all(squares[index]["pixel_values"].shape[1:] == size for index, size in enumerate(squares.sizes))


def test_a_recipe_trains_on_them_with_dropped_scales_and_averages_and_goes_on_exactly(data, monkeypatch):
    seen, step = [], NextFlowVQTrainer.training_step

    def seeing(self, model, inputs, *args):
        seen.append(tuple(inputs["pixel_values"].shape[-2:]))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(NextFlowVQTrainer, "training_step", seeing)

    class KilledAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 11:
                raise Killed

    whole = trainer_of(recipe_of(), data / "start", data / "rows.jsonl", data / "whole")
    assert 12 > len(whole.get_train_dataloader())  # the training ends in a later epoch than it began in
    whole.train()
    shapes, broken = list(seen), trainer_of(recipe_of(), data / "start", data / "rows.jsonl", data / "broken")
    assert len(set(shapes)) > 3 and {"codebook_loss", "pixel_loss"} <= set(whole.state.log_history[-2])
    broken.add_callback(KilledAt())
    with pytest.raises(Killed):
        broken.train()
    seen.clear()
    resumed = trainer_of(recipe_of(), data / "start", data / "rows.jsonl", data / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert seen == shapes[10:]
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(torch.equal(value, resumed._averages[name]) for name, value in whole._averages.items())


def test_the_outcome_holds_the_average_also_within_a_model(data):
    tiny_model(vq_config={"levels": LEVELS}).save_pretrained(data / "model")
    tiny_processor(levels=LEVELS).save_pretrained(data / "model")
    for start in ("start", "model"):
        run_recipe(recipe_of(max_steps=4), data / start, data / "rows.jsonl", data / f"from-{start}")
    averaged = NextFlowForConditionalGeneration.from_pretrained(data / "from-model" / "final" / "ema")
    trained = NextFlowForConditionalGeneration.from_pretrained(data / "from-model" / "final")
    own = load_file(data / "from-model" / "checkpoint-4" / "ema.safetensors")
    assert all(torch.equal(averaged.vq_model.get_parameter(name), value) for name, value in own.items())
    assert not torch.equal(averaged.vq_model.quantizer.codebook, trained.vq_model.quantizer.codebook)
    assert torch.equal(averaged.model.visual_embedding.codes.weight, averaged.vq_model.quantizer.codebook)
    assert averaged.config.trained_on["lowest_psnr"] and AutoProcessor.from_pretrained(data / "from-model/final/ema")
    assert NextFlowVQModel.from_pretrained(data / "from-start" / "final" / "ema")


def test_averages_of_codes_that_were_set_begin_anew(tmp_path):
    model = tiny_vq_model()
    options = {"stage": "codebook", "ema_decay": 0.9, "max_steps": 1, "learning_rate": 0.0, "kmeans_images": 8}
    start = model.quantizer.codebook.clone()
    trainer = make_trainer(tmp_path, model, **options)
    trainer.train()
    for name, average in trainer._averages.items():
        torch.testing.assert_close(average, model.get_parameter(name), rtol=0, atol=1e-6)
    assert not torch.allclose(model.quantizer.codebook, start, atol=1e-2)
    name = "quantizer.pixel_codebook.weight"
    weight = model.get_parameter(name)
    weight.data += 1
    trainer.restart_averages("quantizer.", torch.arange(32) < 3)
    torch.testing.assert_close(trainer._averages[name][:3], weight[:3].detach())
    torch.testing.assert_close(trainer._averages[name][3:], weight[3:].detach() - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (12,), "level": 16}, r"at level 16 or at the levels \[12\]; leave out one"),
        ({"levels": (20,)}, r"Level 20 is none of \[12, 16\]"),
        ({"kind": "rl", "levels": (12,), "reward": "shapes"}, "levels=.* is of the kind tokenizer"),
        ({"kind": "transformer", "cut_square": False}, "cut_square=False is of the kind tokenizer"),
    ],
)
def test_levels_that_make_no_sense_are_refused(fields, message, data):
    with pytest.raises(ValueError, match=message):
        kind, arguments = fields.pop("kind", "tokenizer"), {}
        recipe = Recipe(kind, ARGUMENTS if kind == "tokenizer" else arguments, **fields)
        trainer_of(recipe, data / "start", data / "rows.jsonl", data / "out")


def test_an_image_whose_ratio_is_not_drawn_is_named_and_a_file_says_levels(data):
    Image.new("RGB", (90, 10)).save(data / "3.png")
    with pytest.raises(ValueError, match=r"row 3, messages\[1\]\.content\[0\]\.image: .* lies outside 1:4 to 4:1"):
        trainer_of(recipe_of(), data / "start", data / "rows.jsonl", data / "out")
    recipe = load_recipe("tokenizer_joint", ["level=null", "levels=[256, 512]", "cut_square=false", "ema_decay=0.999"])
    assert recipe.levels == (256, 512) and not recipe.cut_square and recipe.arguments["scale_dropout"] == 1.0


def test_images_that_lie_on_their_side_are_read_with_the_size_that_is_told(tmp_path):
    rows, exif = [], Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for kind in ("jpeg", "png", "tiff"):
        Image.new("RGB", (80, 30)).save(tmp_path / f"own.{kind}", exif=exif)
        rows.append({"messages": conversation([text("one")], [image(f"own.{kind}")])})
    images = BucketedImages(rows, tmp_path, tiny_processor(levels=LEVELS).image_processor, [16], False)
    assert [tuple(images[index]["pixel_values"].shape[1:]) for index in range(3)] == images.sizes


def _revive(rank: int, port: int, folder: str):
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = NextFlowVQModel(tiny_vq_config(codebook_size=256, levels=LEVELS)).eval()
    side = (12, 16)[rank]
    revive_dead_codes(model, torch.rand(2, 3, side, side) * 2 - 1, torch.ones(256, dtype=torch.bool))
    torch.save(model.quantizer.codebook, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_with_images_of_two_sizes_revive_the_same_codes(tmp_path):
    in_two_processes(_revive, free_port(), str(tmp_path))
    assert torch.equal(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
