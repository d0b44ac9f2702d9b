"""Precision: codes of an image are the same in whatever precision the rest runs, and what is trained is float32."""

import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from processes import in_two_processes
from test_trainer import conversation, drawing, make_trainer, rows, text, training_arguments
from test_vq_trainer import make_images, tiny_vq_model
from test_vq_trainer import make_trainer as make_vq_trainer
from tiny import free_port, tiny_config, tiny_model, tiny_processor
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_common import _is_composable_with_fsdp
from transformers import AutoConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from transformers_nextflow import KeptRegion, NextFlowForConditionalGeneration, NextFlowPipeline, SelfCorrection
from transformers_nextflow.adapters import lora_config
from transformers_nextflow.data import load_vision_tokenizer, tokenizer_fingerprint
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer
from transformers_nextflow.trainers.recipes import Recipe, run_recipe
from transformers_nextflow.trainers.runs.trained_weights import prepare_sharding
from transformers_nextflow.trainers.tokenizer.codebook_maintenance import initialize_codebook, revive_dead_codes


GRID = torch.tensor([[4, 4]])
HALVES = (torch.bfloat16, torch.float16)


def images(count: int = 48, seed: int = 0) -> torch.Tensor:
    """(B, 3, 16, 16) float32 as the image processor makes them of 8-bit images."""
    levels = torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


def half_autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


# Codes ----------------------------------------------------------------------------------------------------------------


def loaded(folder, **options):
    return NextFlowForConditionalGeneration.from_pretrained(folder, **options)


def made_in_half(folder):
    model = NextFlowForConditionalGeneration._from_config(tiny_config(), dtype=torch.bfloat16)
    model.load_vision_tokenizer(tiny_model().vq_model)
    return model


def saved_in_half(folder):
    loaded(folder, dtype=torch.bfloat16).save_pretrained(folder / "half")
    return loaded(folder / "half")


@pytest.mark.parametrize(
    "hold",
    [
        partial(loaded, dtype=torch.bfloat16),
        partial(loaded, dtype=torch.float16),
        partial(loaded, dtype=torch.float64),
        saved_in_half,
        made_in_half,
        lambda folder: loaded(folder).to(torch.bfloat16),
        lambda folder: loaded(folder).half(),
        lambda folder: loaded(folder).double(),
        lambda folder: NextFlowPipeline(loaded(folder), tiny_processor()).to(torch.bfloat16).model,
    ],
    ids=["bfloat16", "float16", "float64", "saved in bfloat16", "made in bfloat16", "to", "half", "double", "pipeline"],
)
def test_a_model_in_another_precision_makes_the_codes_of_float32_under_the_same_fingerprint(hold, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    held = hold(tmp_path)
    assert held.dtype != torch.float32
    assert torch.equal(held.vq_model.encode(images()).image_tokens, model.vq_model.encode(images()).image_tokens)
    assert tokenizer_fingerprint(held.vq_model) == tokenizer_fingerprint(model.vq_model)
    # Decoders go with the model.
    decoded = held.vq_model.decode(torch.zeros(1, 30, dtype=torch.long), model.config.vq_config.scale_schedules.build())
    assert decoded.shape == (1, 3, 16, 16) and decoded.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", ["area", "rotary"])
def test_autocast_changes_nothing_of_the_tokenizer_but_its_decoders(mode, dtype):
    vq_model = tiny_model(vq_config={"downsample": mode, "upsample": mode.replace("area", "bicubic")}).vq_model
    quantizer, schedule, pixels = vq_model.quantizer, vq_model.config.scale_schedules.build(), images()
    latents = vq_model.encode_latents(pixels)
    codes = quantizer.encode(latents, schedule).image_tokens
    correct = partial(quantizer.encode, latents, schedule, SelfCorrection())
    compute = {
        "encode": lambda: vq_model.encode(pixel_values=pixels).image_tokens,
        "latents": lambda: vq_model.encode_latents(pixels),
        "quantise": lambda: quantizer.encode(latents, schedule).image_tokens,
        "self-correction": lambda: correct(generator=torch.Generator().manual_seed(0)).image_tokens,
        "nearest": lambda: quantizer.nearest(latents, (2, 2)),
        "targets": lambda: quantizer.targets(latents, (2, 2))[0],
        "truncate": lambda: quantizer.truncate(latents, schedule, torch.full((len(latents),), 2)),
        "lookup": lambda: torch.cat([vectors.flatten() for vectors in quantizer.lookup(codes, schedule)]),
        "decode": lambda: quantizer.decode(codes, schedule),
        "distances": lambda: quantizer.distances(latents[:, :, 0, 0], quantizer.codebook),
    }
    with torch.no_grad():
        for name, function in compute.items():
            expected = function()
            with half_autocast(dtype):
                assert torch.equal(function(), expected), name


def test_a_region_is_kept_the_same_under_autocast():
    vq_model = tiny_model(vq_config={"downsample": "rotary", "upsample": "rotary"}).vq_model
    schedule, region = vq_model.config.scale_schedules.build(), torch.zeros(16, 16, dtype=torch.bool)
    region[:6, :6] = True
    before = torch.randint(32, (8, 5), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def kept():
        kept = KeptRegion(vq_model, list(images(8)), [region] * 8)
        codes = kept.keep_outside(torch.zeros(8, 9, dtype=torch.long), before, slice(None), schedule)
        return torch.cat(kept.own_codes), kept.condition(torch.zeros(8, 9, 32), before, slice(None), schedule), codes

    expected = kept()
    with half_autocast():
        assert all(map(torch.equal, kept(), expected))


def test_k_means_and_revival_are_the_same_under_autocast():
    def cared_for():
        model = tiny_vq_model(downsample="rotary", upsample="rotary")
        initialize_codebook(model, make_images(24))
        started = model.quantizer.codebook.clone()
        revive_dead_codes(model, make_images(24, seed=1), torch.arange(32) < 8)
        return started, model.quantizer.codebook

    expected = cared_for()
    with half_autocast():
        assert all(map(torch.equal, cared_for(), expected))


@pytest.mark.parametrize("dtype", HALVES)
def test_pixels_that_were_rounded_on_their_way_make_the_codes_of_the_image(dtype):
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    pixels = torch.cat([tiny_processor().image_processor(levels, return_tensors="pt")["pixel_values"], images()])
    vq_model = tiny_model().vq_model
    assert not torch.equal(pixels.to(dtype).float(), pixels)
    assert torch.equal(vq_model.encode_latents(pixels.to(dtype)), vq_model.encode_latents(pixels))


def write_images(folder, count: int):
    for number, pixels in enumerate(images(count)):
        levels = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(folder / f"{number}.png")


def image_rows(count: int) -> list[dict]:
    answers = ([{"type": "image", "image": f"{number}.png"}] for number in range(count))
    return [{"messages": conversation([text("one")], answer)} for answer in answers]


def test_codes_in_a_training_step_are_the_stored_ones(tmp_path, monkeypatch):
    # Dropout in the tower would be another way in which a training makes other codes.
    model = tiny_model()
    model.config.vq_config.semantic_config.attention_dropout = 0.5
    for module in model.vq_model.semantic_encoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    write_images(tmp_path, 24)
    data, read = image_rows(24), []
    stored = model.vq_model.encode(images(24)).image_tokens
    encode = type(model).get_image_tokens
    monkeypatch.setattr(type(model), "get_image_tokens", lambda *args: read.append(encode(*args)) or read[-1])
    for options in ({}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}):
        args = training_arguments(tmp_path / "run", data, max_steps=1, dataloader_num_workers=0, **options)
        collator = NextFlowCollator(tiny_processor(), root=tmp_path)
        NextFlowTrainer(model, args, train_dataset=data, data_collator=collator).train()
        order = [int((stored == row).all(1).nonzero()) for row in read.pop()]
        assert sorted(order) == list(range(24)) and not read


@pytest.mark.parametrize("stage, half", [("pixel", True), ("joint", True), ("codebook", False), ("decoder", False)])
def test_a_tokenizer_in_training_quantises_in_float32_and_encoders_at_rest_give_their_codes(stage, half, tmp_path):
    model, seen = tiny_vq_model(), {}
    expected = model.eval().encode(make_images(8)).image_tokens
    model.pixel_encoder.register_forward_hook(lambda module, args, output: seen.update(encoder=output.dtype))
    distances = model.quantizer.distances
    model.quantizer.distances = lambda *args: seen.update(distances=distances(*args).dtype) or distances(*args)
    options = {"bf16": True, "max_steps": 1, "learning_rate": 0.0, "kmeans_images": 6}
    trainer = make_vq_trainer(tmp_path, model, stage=stage, **options)
    tokens, count = [], trainer._count_codes
    trainer._count_codes = lambda codes: tokens.append(codes) or count(codes)
    trainer.train()
    assert seen["encoder"] == (torch.bfloat16 if half else torch.float32)
    assert seen.get("distances", torch.float32) == torch.float32 and ("distances" in seen) == (stage != "pixel")
    if stage == "decoder":
        assert sorted(tokens[0].tolist()) == sorted(expected.tolist())
    # Scores of an evaluation are those of the codes that the tokenizer makes.
    with half_autocast():
        assert torch.equal(model.eval()(make_images(8)).latents, model.encode_latents(make_images(8)))


# What cannot be float32 is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["pixel_encoder", "semantic_projection", "quantizer"])
def test_a_tokenizer_that_was_rounded_all_the_same_is_refused_with_the_remedy(part):
    vq_model = tiny_model().vq_model
    getattr(vq_model, part).bfloat16()
    with pytest.raises(
        ValueError, match=r"weight is torch.bfloat16, but codes are made in float32 .* load the .* again"
    ):
        vq_model.encode(images(1))
    if part == "quantizer":
        with pytest.raises(ValueError, match="semantic_codebook.weight is torch.bfloat16"):
            vq_model.decode(torch.zeros(1, 30, dtype=torch.long), vq_model.config.scale_schedules.build())
    vq_model.keep_codes_in_float32()
    assert vq_model.encode(images(1)).image_tokens.shape == (1, 30)


def test_a_tokenizer_whose_file_was_rounded_has_a_fingerprint_of_its_own(tmp_path):
    model = tiny_model()
    rounded = {
        name: weight.bfloat16() if weight.is_floating_point() else weight for name, weight in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=rounded)
    found = load_vision_tokenizer(tmp_path)
    assert {weight.dtype for weight in found.parameters()} == {torch.float32}
    assert not torch.equal(found.encode(images()).image_tokens, model.vq_model.encode(images()).image_tokens)
    assert tokenizer_fingerprint(found) != tokenizer_fingerprint(model.vq_model)
    for dtype in (torch.float32, torch.bfloat16):
        assert tokenizer_fingerprint(loaded(tmp_path, dtype=dtype).vq_model) == tokenizer_fingerprint(found)


# Sharding -------------------------------------------------------------------------------------------------------------


def _sharded_codes(rank: int, port: int, folder: str):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    shard = partial(
        fully_shard,
        mesh=torch.distributed.init_device_mesh("cpu", (2,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    model, read = tiny_model(), []
    for layer in model.model.language_model.layers:
        shard(layer)
    shard(model)
    encode = model.vq_model.encode
    model.vq_model.encode = lambda pixels: read.append(encode(pixels)) or read[-1]
    batch = NextFlowCollator(tiny_processor(), root=folder)(image_rows(24))
    model(**batch).loss.backward()
    model.get_image_tokens(images(24), GRID.expand(24, 2))  # outside of a pass
    # A layer that is sharded by itself is told.
    shard(model.vq_model.pixel_encoder.blocks[0])
    try:
        model.get_image_tokens(images(1), GRID)
    except ValueError as error:
        read.append(str(error))
    placed = {name: hasattr(weight, "placements") for name, weight in model.named_parameters()}
    if rank == 0:
        torch.save(([r if isinstance(r, str) else r.image_tokens for r in read], placed), f"{folder}/codes.pt")
    torch.distributed.destroy_process_group()


def test_a_trainer_places_a_tokenizer_that_fsdp_leaves_out_and_refuses_what_would_leave_it_empty():
    plugin = SimpleNamespace(cpu_ram_efficient_loading=False, fsdp_version=2, mixed_precision_policy=None)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(is_fsdp_enabled=False, accelerator=accelerator, model=tiny_model())
    trainer.args = SimpleNamespace(device="meta")
    for enabled in (False, True):
        trainer.is_fsdp_enabled = enabled
        prepare_sharding(trainer)
        assert trainer.model.vq_model.device.type == ("meta" if enabled else "cpu")
    assert trainer.model.lm_head.weight.device.type == "cpu"
    plugin.cpu_ram_efficient_loading = True
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading .* set it to false"):
        prepare_sharding(trainer)


def test_a_tokenizer_that_is_trained_by_itself_is_sharded_again(tmp_path):
    vq_model = tiny_model().vq_model
    assert not _is_composable_with_fsdp(vq_model)
    make_vq_trainer(tmp_path, vq_model)
    assert _is_composable_with_fsdp(vq_model) and _is_composable_with_fsdp(tiny_vq_model())


def test_sharding_in_bfloat16_leaves_the_tokenizer_whole_and_its_codes_as_they_are(tmp_path):
    write_images(tmp_path, 24)
    in_two_processes(_sharded_codes, free_port(), str(tmp_path))
    (inside, outside, refusal), placed = torch.load(tmp_path / "codes.pt", weights_only=True)
    expected = tiny_model().vq_model.encode(images(24)).image_tokens
    assert torch.equal(inside, expected) and torch.equal(outside, expected)
    assert "a DTensor of torch.float32, but codes are made in float32 from whole weights" in refusal
    of_tokenizer = {name for name in placed if "vq_model" in name and "pixel_encoder.blocks.0" not in name}
    assert not any(placed[name] for name in of_tokenizer)
    assert all(sharded for name, sharded in placed.items() if "vq_model" not in name)


# Quantisation ---------------------------------------------------------------------------------------------------------


class RoundingConfig(QuantizationConfigMixin):
    """A method of quantisation that needs no library: linear layers are rounded to few values."""

    def __init__(self, modules_to_not_convert: list[str] | None = None, **kwargs):
        self.quant_method, self.modules_to_not_convert = "rounding", modules_to_not_convert


class RoundingQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *args, **kwargs):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        # As those of bitsandbytes, torchao and quanto ask.
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and should_convert_module(name, self.modules_to_not_convert):
                module.weight.data = (module.weight.data * 4).round() / 4
        return model


@pytest.mark.parametrize("skipped", [None, ["lm_head"]], ids=["by default", "with a list of one's own"])
def test_quantisation_leaves_the_tokenizer_out(skipped, tmp_path, monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "rounding", RoundingConfig)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "rounding", RoundingQuantizer)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    quantized = loaded(tmp_path, quantization_config=RoundingConfig(skipped))
    before, after = dict(model.named_modules()), dict(quantized.named_modules())
    changed = {
        name for name, module in before.items()
        if isinstance(module, nn.Linear) and not torch.equal(module.weight, after[name].weight)
    }  # fmt: skip
    layers = {name for name, module in before.items() if isinstance(module, nn.Linear) and "language_model" in name}
    assert layers <= changed and not any("vq_model" in name or name == "lm_head" for name in changed)
    assert ("visual_head" in changed) == (skipped is not None)
    assert torch.equal(quantized.vq_model.encode(images()).image_tokens, model.vq_model.encode(images()).image_tokens)


def test_slots_are_read_whatever_the_type_of_a_quantised_connector():
    model = tiny_model()
    codes, schedule = torch.zeros(1, 30, dtype=torch.long), model.config.vq_config.scale_schedules.build()
    embedding = model.model.visual_embedding

    def slots():
        features = embedding.slot_features(codes, schedule, 3)
        return embedding(features, torch.tensor(3), torch.tensor([[4]]))

    expected = slots()
    for index in (0, 2):
        plain = embedding.connector[index]
        packed = nn.Linear(1, 1)
        # As 4-bit layers hold their numbers.
        packed.weight = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
        packed.forward = plain.forward
        embedding.connector[index] = packed
    assert torch.equal(slots(), expected)


# What is trained ------------------------------------------------------------------------------------------------------


def trained_weights(model) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_a_recipe_from_a_bfloat16_checkpoint_moves_as_from_the_same_weights_in_float32(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    loaded(tmp_path / "half", dtype=torch.float32).save_pretrained(tmp_path / "whole")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    arguments = {"max_steps": 5, "learning_rate": 1e-6, "lr_scheduler_type": "constant", "bf16": True, "use_cpu": True}
    arguments |= {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    recipe = Recipe("transformer", arguments)
    start = trained_weights(loaded(tmp_path / "whole"))
    ends = []
    for name in ("half", "whole"):
        tiny_processor().save_pretrained(tmp_path / name)
        run_recipe(recipe, tmp_path / name, tmp_path / "rows.jsonl", tmp_path / f"{name}-run")
        ends.append(trained_weights(loaded(tmp_path / f"{name}-run" / "final")))
    assert all(weight.dtype == torch.float32 and torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    moves = torch.cat([(weight - start[name]).abs().flatten() for name, weight in ends[0].items()])
    assert (moves[moves > 0] > 1e-7).float().mean() > 0.9 and (moves > 0).float().mean() > 0.5


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"bf16": True, "muon": True}])
def test_weights_to_be_trained_in_half_precision_are_refused_with_the_remedy(options, tmp_path):
    message = r"is bfloat16, .* from_pretrained\(..., dtype=torch.float32\)"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_model().to(torch.bfloat16), rows(), **options)
    # A full evaluation in half precision casts the model between the two.
    trainer = make_trainer(tmp_path, tiny_model(), rows(), **options)
    trainer.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    frozen = tiny_model().to(torch.bfloat16).requires_grad_(False)
    frozen.visual_head.float().requires_grad_(True)
    make_trainer(tmp_path, frozen, rows(), **(options | {"bf16": True, "max_steps": 1, "muon": False})).train()
    # What is only evaluated may be in any precision.
    args = training_arguments(tmp_path, rows())
    trainer = NextFlowTrainer(tiny_model().to(torch.bfloat16), args, processing_class=tiny_processor())
    assert trainer.evaluate(rows())["eval_loss"] > 0


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="All weights are frozen"):
        make_trainer(tmp_path, tiny_model().requires_grad_(False), rows()).train()


def test_a_tokenizer_is_not_trained_in_half_precision(tmp_path):
    with pytest.raises(ValueError, match="pixel_decoder.* is bfloat16"):
        make_vq_trainer(tmp_path, tiny_vq_model().to(torch.bfloat16), stage="decoder")


def test_rl_trains_no_weights_in_half_precision_but_adapters_on_such(tmp_path):
    grpo = pytest.importorskip("test_grpo")
    with pytest.raises(ValueError, match="is bfloat16"):
        grpo.make_trainer(tmp_path, tiny_model().to(torch.bfloat16))
    base = tiny_model().to(torch.bfloat16)
    trainer = grpo.make_trainer(tmp_path, base, peft_config=grpo.lora())
    assert {weight.dtype for weight in trained_weights(trainer.model).values()} == {torch.float32}
    # TRL rounds the adapters of a quantised model, given ones too.
    given = peft.get_peft_model(tiny_model(), grpo.lora())
    before = {name: weight.detach().clone() for name, weight in trained_weights(given).items()}
    given.is_loaded_in_4bit = given.get_base_model().is_loaded_in_4bit = True
    after = trained_weights(grpo.make_trainer(tmp_path, given).model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("new_token_ids", [[], [20]])
def test_an_adapter_on_a_bfloat16_model_is_trained_in_float32(new_token_ids, tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model = peft.get_peft_model(model, lora_config(model, rank=2, new_token_ids=new_token_ids))
    before = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    make_trainer(tmp_path, model, [drawing("a red circle", 1)], bf16=True, max_steps=5, learning_rate=1e-6).train()
    after = trained_weights(model)
    moves = torch.cat([(after[name] - weight).abs().flatten() for name, weight in before.items() if "lora_B" in name])
    assert (moves > 1e-7).float().mean() > 0.9
