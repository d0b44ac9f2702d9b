"""The benchmarks: what they draw and count is what they say, and results tell where they come from."""

import json
import mmap
import sys
from pathlib import Path

import pytest
import tiny_emoji
import torch
from tiny import tiny_model, tiny_processor
from torch.utils.flop_counter import FlopCounterMode

from transformers_nextflow import ImageSampling, NextFlowPipeline
from transformers_nextflow.data import load_vision_tokenizer
from transformers_nextflow.diffusion_decoder import small_decoder
from transformers_nextflow.evaluation import results
from transformers_nextflow.sequence import fused_cross_entropy
from transformers_nextflow.worlds.emoji.judge import Judge, Vocabulary


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import accumulation  # noqa: E402
import backbone  # noqa: E402
import before_and_after  # noqa: E402
import continue_after_image  # noqa: E402
import diffusion_decoder  # noqa: E402
import drawing_on_gpu  # noqa: E402
import fused_loss  # noqa: E402
import loop_overhead  # noqa: E402
import measured_steps  # noqa: E402
import memory_tiers  # noqa: E402
import packing  # noqa: E402
import raster_vs_scale  # noqa: E402
import resampling  # noqa: E402
import training_speed  # noqa: E402


SIDES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def model():
    return backbone.load_model("random", SIDES, (4,))


@torch.no_grad()
def test_the_raster_loop_gives_the_logits_of_one_causal_pass(model):
    prompt, seen = backbone.random_prompt(model.config, 5), []
    codes = raster_vs_scale.draw_raster(model, prompt, 16, torch.Generator().manual_seed(1), seen.append)
    language_model, visual = model.model.language_model, model.model.visual_embedding
    read = visual.connector(visual.codes(codes[None, :-1]))
    hidden_states = language_model(inputs_embeds=torch.cat([language_model.embed_tokens(prompt), read], 1))
    expected = model.visual_head(hidden_states.last_hidden_state[0, -16:])
    torch.testing.assert_close(torch.cat(seen), expected, atol=1e-5, rtol=1e-5)


def test_a_part_of_the_raster_passes_tells_the_time_of_all(model, monkeypatch):
    clock = [0.0]

    def draw_raster(model, prompt, count, callback):
        clock[0] += 100 * prompt.shape[1]  # the pass over the prompt, which is left out
        clock[0] += sum(3 + 0.5 * (prompt.shape[1] + code) for code in range(1, count))

    def seconds_of(draw, device):
        start = clock[0]
        draw()
        return clock[0] - start

    monkeypatch.setattr(raster_vs_scale, "draw_raster", draw_raster)
    monkeypatch.setattr(raster_vs_scale, "seconds_of", seconds_of)
    prompt = backbone.random_prompt(model.config, 5)
    of_all = sum(3 + 0.5 * (5 + code) for code in range(1, 64)) / 63
    for passes in (2, 9, 64):
        seconds = raster_vs_scale.raster_seconds(model, prompt, 64, passes, print)
        assert seconds == pytest.approx(64 * of_all)


def test_operations_are_those_that_torch_counts(model):
    def counted(queries: list[int]) -> raster_vs_scale.Cost:
        return sum(raster_vs_scale.drawing_costs(model.config, 5, queries, itemsize=4), raster_vs_scale.Cost())

    model.model.set_attn_implementation("eager")
    prompt, drawn = backbone.random_prompt(model.config, 5), []
    with FlopCounterMode(display=False) as by_scales:
        raster_vs_scale.draw_scales(model, prompt, 4, callback=lambda *_: drawn.append(1))
    with FlopCounterMode(display=False) as raster:
        # The loop prepares no masks, and eager attention knows no causality without; the count is the same.
        raster_vs_scale.draw_raster(model, prompt, 16)
    model.model.set_attn_implementation("sdpa")
    cost = counted([4, 9, 16])
    assert (cost.passes, cost.operations) == (len(drawn), by_scales.get_total_flops())
    cost = counted([1] * 15)
    # One code more is brought through the connector than is read by the backbone.
    connector = 2 * (model.config.vq_config.code_dim + 192) * 192
    assert (cost.passes, cost.operations + connector) == (16, raster.get_total_flops())


def test_guidance_takes_twice_the_operations_and_reads_the_weights_once(model):
    model.model.set_attn_implementation("eager")
    prompt, guided = backbone.random_prompt(model.config, 5), ImageSampling(guidance_scale=2.0)
    with FlopCounterMode(display=False) as drawing:
        model.generate_images(prompt, image_sizes=[(64, 64)], negative_input_ids=prompt, sampling=guided)
    model.model.set_attn_implementation("sdpa")
    costs = raster_vs_scale.drawing_costs(model.config, 5, [4, 9, 16], itemsize=4, batch=2)
    # Both rows read the same slots, which are brought through the connector once.
    connector = 2 * (model.config.vq_config.code_dim + 192) * 192 * (4 + 9 + 16)
    assert sum(cost.operations for cost in costs) - connector == drawing.get_total_flops()
    one, two = (raster_vs_scale.pass_cost(model.config, 4, 5, itemsize=4, batch=batch) for batch in (1, 2))
    keys = 4 * 9 * 2 * model.config.text_config.num_key_value_heads * 32 * model.config.text_config.num_hidden_layers
    assert (two.passes, two.bytes) == (1, one.bytes + keys)


def written_by(module, monkeypatch, tmp_path, *arguments) -> dict:
    """What a benchmark writes with these arguments."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments, "--results", str(tmp_path)])
    module.main()
    (file,) = tmp_path.glob("*.json")
    return json.loads(file.read_text())


def test_drawing_on_a_gpu_compares_ways_prompts_and_a_diffusion_transformer(tmp_path, monkeypatch):
    small = ["--model", "random", "--device", "cpu", "--dtype", "float32", "--sizes", "64", "--batches", "1", "2"]
    values = written_by(drawing_on_gpu, monkeypatch, tmp_path, *small, "--repeats", "1", "--matrix_side", "64")
    assert (tmp_path / "drawing_on_cpu.json").exists() and len(values["cases"]) == 8
    assert all(case["share_of_floor"] > 0 and case["decoding_seconds"] > 0 for case in values["cases"])
    assert {"compiled_speedup", "unequal_over_equal", "speedup_over_diffusion"} <= set(values)


@pytest.mark.parametrize("world", diffusion_decoder.SUBJECTS)
def test_a_diffusion_decoder_is_compared_with_the_pixel_decoder_on_each_world(world, tmp_path, monkeypatch):
    model = ROOT / "checkpoints" / "nextflow-shapes"
    if world == "emoji":
        model, scenes = tmp_path / "model", tiny_emoji.tiny_world(side=16, plain=True)
        NextFlowPipeline(tiny_model(), tiny_processor()).save_pretrained(model)
        Judge(Vocabulary(scenes.concepts, scenes.styles), width=4).save(tmp_path / "judge")
        scenes.save(tmp_path / "judge" / "world.json")
        monkeypatch.setattr(diffusion_decoder, "JUDGE", tmp_path / "judge")
        monkeypatch.setattr(diffusion_decoder, "ART", tiny_emoji.FIXTURES / "art.zip")
    vq_model = load_vision_tokenizer(model)
    size = vq_model.config.scale_schedules.resolutions[-1]
    decoder = small_decoder(vq_model, channels=(8, 8), upsampling=2, trained_sizes=[[size, size]])
    decoder.save_pretrained(tmp_path / "decoder")
    options = f"--world {world} --model {model} --decoder {tmp_path / 'decoder'} --scenes 2 --edits 1 --steps 1".split()
    monkeypatch.setattr(
        sys, "argv", ["benchmark", *options, "--results", str(tmp_path), "--figures", str(tmp_path / "figures")]
    )
    diffusion_decoder.main()
    [file] = tmp_path.glob("diffusion_decoder*.json")
    values = json.loads(file.read_text())
    assert (values["world"], values["scenes"], values["size"]) == (world, 2, 2 * size)
    assert values["pixel_decoder"].keys() < values["diffusion_decoder"]["1_steps"].keys()
    # An exact checker reads all renderings right; a judge that was not trained does not.
    assert values["renderings"]["judged_right"] == 1 or world == "emoji"
    assert values["psnr_outside_of_masks"].keys() == {"pixel_decoder", "diffusion_decoder"}


def test_training_speed_compares_attentions_and_counts_what_the_model_multiplies(tmp_path, monkeypatch):
    small = ["--level", "64", "--images", "2", "--tokenizer_batch", "1", "--repeats", "1"]
    monkeypatch.setattr(training_speed, "MATRIX_SIDE", {"cpu": 64})
    values = written_by(training_speed, monkeypatch, tmp_path, *small)
    assert set(values["maskless_speedup"]) == {"padded", "packed"} and values["images_per_second"] > 0
    assert len(values["ways"]) == 4

    model = backbone.load_model("random", SIDES, (4,)).train()
    model.set_attn_implementation("eager")
    batch = resampling.transformer_batch(model, 2, "cpu")
    with FlopCounterMode(display=False) as counter:
        model.model(**{name: batch[name] for name in ("input_ids", "image_tokens", "image_grids")})
    counted = counter.get_total_flops()
    text = model.config.text_config
    head = 2 * 2 * model.config.vocab_size * text.hidden_size * 30
    forward = training_speed.operations(model, batch) / 3 - head
    # The masked pass computes pairs that nobody attends, and the connector is left out.
    assert 0.9 < forward / counted < 1


def test_memory_grows_with_model_image_and_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_tiers, "PRESETS", {"nextflow-0.5b": backbone.PRESETS["nextflow-0.5b"]})
    values = written_by(memory_tiers, monkeypatch, tmp_path)
    onecat = [case["gib"] for case in values["onecat"] if case["size"] == 1024]
    assert onecat == sorted(onecat, reverse=True) and values["onecat"][-1]["fits"] == [12]
    cases = values["tiers"]
    by = {(case["size"], case["weights"]): case["gib"] for case in cases}
    assert by[256, "bf16"] < by[1024, "bf16"] and by[1024, "4 bits"] < by[1024, "int8"] < by[1024, "bf16"]


def test_interpolation_is_compared_with_that_of_torch(tmp_path, monkeypatch):
    for module in (resampling, measured_steps):
        monkeypatch.setattr(module, "SIDES", (1, 2, 16))
    values = written_by(resampling, monkeypatch, tmp_path, "--batch", "1", "--repeats", "1", "--images", "2")
    assert (
        values["largest_difference"] < 1e-6
        and values["images"] == 2
        and set(values["step_speedup"])
        == {
            "tokenizer",
            "transformer",
        }
    )


def test_this_code_is_compared_with_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_steps, "SIDES", (1, 2))
    monkeypatch.setattr(measured_steps, "REPEATS", 1)
    found = {name: run() for name, run in measured_steps.MEASUREMENTS.items()}
    assert all(figures["seconds"] > 0 and figures.get("bytes", 0) >= 0 for figures in found.values())
    now = before_and_after.ROOT
    monkeypatch.setattr(before_and_after, "measure", lambda code, name: {"seconds": 1.0 if code == now else 3.0})
    values = written_by(before_and_after, monkeypatch, tmp_path, "--before", str(tmp_path))
    assert values["tokenizer step, seconds"] == {"before": 3.0, "after": 1.0, "ratio": 3.0}
    assert len([name for name in values if "seconds" in name]) == len(found)


def test_the_7b_preset_keeps_its_schedule():
    with pytest.raises(ValueError, match="keeps the paper's schedule"):
        backbone.load_model(backbone.PRESET_7B, SIDES, (4,))
    model = backbone.load_model(backbone.PRESET_7B, device="meta", dtype=torch.bfloat16)
    assert model.num_parameters() == 8_272_532_587 and model.dtype == torch.bfloat16


def test_going_on_after_a_image_is_compared_with_reading_it_anew(model):
    seconds = continue_after_image.measure(model, 4)
    assert set(seconds) == {"drawing", "on the cache", "decoding and encoding", "reading anew"}


def test_a_checkpoint_keeps_its_weights_on_another_schedule(model, tmp_path):
    model.save_pretrained(tmp_path)
    longer = backbone.load_model(str(tmp_path), (1, 2, 3, 4, 6, 8), (4, 8))
    weights, longer_weights = model.state_dict(), longer.state_dict()
    for name in weights.keys() - {"model.visual_embedding.scale.weight"}:
        torch.testing.assert_close(longer_weights[name], weights[name], atol=0, rtol=0)
    assert len(raster_vs_scale.draw_scales(longer, backbone.random_prompt(longer.config, 5), 8)) == 130


def test_the_stopwatch_counts_no_second_twice():
    watch = loop_overhead.Stopwatch()
    inner = watch.timed(lambda: sum(range(100_000)), "inner")
    watch.timed(lambda: [inner(), inner()], "outer")()
    assert set(watch.seconds) == {"inner", "outer"}
    assert watch.seconds["inner"] > watch.seconds["outer"] > 0


def test_the_parts_of_the_loop_that_are_timed_include_its_forward_passes(model):
    figures = loop_overhead.figures_of(model, 4, guided=True, repeats=1)
    assert {"loop", "mask", "draw of codes", "guidance", loop_overhead.FORWARD} <= set(figures["parts"])
    assert 0 < figures["overhead"] < 1


@pytest.mark.parametrize("raster_passes", [None, 6])
def test_the_benchmark_writes_speedup_cost_and_origin(tmp_path, monkeypatch, capsys, raster_passes):
    arguments = [
        "raster_vs_scale.py",
        "--model",
        "random",
        "--grids",
        "4",
        "--repeats",
        "1",
        "--results",
        str(tmp_path),
    ]
    if raster_passes is not None:
        arguments += ["--raster_passes", str(raster_passes)]
    monkeypatch.setattr(sys, "argv", arguments)
    raster_vs_scale.main()
    written = json.loads((tmp_path / "raster_vs_scale.json").read_text())
    grid = written["grids"]["4x4"]
    assert written["speedup"]["4x4"] == pytest.approx(
        grid["raster"]["seconds"] / grid["by_scales"]["seconds"], abs=0.01
    )
    assert (grid["by_scales"]["passes"], grid["raster"]["passes"]) == (4, 16)
    assert written["raster_passes"] == raster_passes and grid["raster"]["seconds"] > 0
    assert grid["bytes_ratio"] > 1 > grid["operations_ratio"]
    assert written["command"].startswith("python raster_vs_scale.py --model random")
    assert "4x4" in capsys.readouterr().out


def test_a_result_says_command_commit_and_machine(tmp_path):
    written = json.loads(results.write_result(tmp_path / "new" / "name.json", {"speedup": 2.0}).read_text())
    assert written["speedup"] == 2.0
    assert set(written) == {"speedup", "command", "commit", "machine"}
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["cores"] >= 1


def test_a_commit_with_changed_files_is_dirty(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M src/x.py"}
    monkeypatch.setattr(results, "_git", lambda command, *_: answers[command])
    assert results.commit() == "abc-dirty"
    answers["status"] = ""
    assert results.commit() == "abc"
    answers["rev-parse"] = None
    assert results.commit() is None


def test_both_ways_of_the_loss_agree_and_the_fused_one_holds_no_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(fused_loss, "TEXT", 7000)
    monkeypatch.setattr(fused_loss, "CODES", 3000)
    monkeypatch.setattr(fused_cross_entropy, "LOGITS_AT_ONCE", 64 * 100)
    monkeypatch.setattr(fused_loss, "in_own_process", lambda *_: {"bytes": 1, "seconds": 1})
    command = ["fused_loss.py", "--tokens", "64", "--measured_tokens", "64", "--width", "4", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    fused_loss.main()
    written = json.loads((tmp_path / "fused_loss.json").read_text())
    logits = 4 * 64 * 10_000
    assert written["counted_bytes"]["plain"] > 2 * logits > 8 * written["counted_bytes"]["fused"]
    assert written["vocabulary"] == 10_000 and 0 < written["relative_error"] < 1e-5


def test_living_tensors_are_counted_while_they_live():
    with fused_loss.LivingTensors() as tensors:
        first = torch.ones(1000)
        second = torch.ones(2000)
        first.view(10, 100)
        del first
        third = torch.ones(500)
    assert tensors.peak == 4 * 3000 and sum(tensors.living.values()) == second.nbytes + third.nbytes


def test_the_memory_of_a_process_grows_with_what_it_holds():
    size, before = 2**25, fused_loss.memory_of("VmRSS")
    with mmap.mmap(-1, size) as held:  # a tensor may take memory that the process already has
        held.write(b"1" * size)
        assert fused_loss.memory_of("VmRSS") - before > 0.9 * size


def test_every_packing_has_all_samples_and_keeps_its_budget(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    model, processor = packing.make_model()
    collator, rows = packing.NextFlowCollator(processor), packing.make_rows(processor, 40)
    cost_model, budgets = packing.CostModel.from_config(model.config), {"length": 4096, "compute": 8192}
    useful = sum(collator.size(row).length for row in rows)
    for way in ("padding", "length", "compute"):
        batches, each, costs = packing.batches_of(way, rows, collator, cost_model, budgets)
        assert sum(each) == useful
        places = [batch["input_ids"].numel() for batch in batches]
        if way == "padding":
            assert sum(places) > useful
        else:
            assert places == each
            assert max(places if way == "length" else costs) <= budgets[way]


def test_the_wait_is_that_of_the_faster_of_two_workers():
    assert packing.wait([1, 2, 4, 4, 9, 1]) == pytest.approx((1 / 2 + 0) / 2)


@pytest.mark.parametrize("counted", [True, False])
def test_a_step_in_parts_is_compared_with_the_undivided_one(counted, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(accumulation, "KINDS", ("mixture",))
    monkeypatch.setattr(accumulation, "TRAINERS", {"NextFlowTrainer": accumulation.NextFlowTrainer})
    monkeypatch.setattr(accumulation, "in_processes", lambda count: accumulation.differences(count, str(tmp_path)))
    if not counted:
        monkeypatch.setattr(accumulation.NextFlowTrainer, "_get_num_items_in_batch", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["accumulation.py", "--processes", "1", "--results", str(tmp_path)])
    accumulation.main()
    written = json.loads((tmp_path / "accumulation.json").read_text())
    differences = written["relative_differences"]
    assert len(differences) == 4 and max(differences.values()) == written["largest_relative_difference"]
    assert all(value < 1e-6 if counted else value > 0.1 for value in differences.values())


def test_more_processes_wait_longer_for_the_slowest_and_packs_of_one_cost_hardly_at_all(monkeypatch, tmp_path):
    import packing_simulation

    arguments = ("--ranks", "2", "8", "--steps", "2", "--budget", "32768")
    stages = written_by(packing_simulation, monkeypatch, tmp_path, *arguments)["stages"]
    for stage in stages.values():
        few, many = (stage["ranks"][ranks] for ranks in ("2", "8"))
        assert many["padding"]["wait"] > few["padding"]["wait"] > 0
        assert many["compute"]["wait"] < many["length"]["wait"] and many["compute"]["fill"] > 0.9
        assert many["compute"]["speedup_over_padding"] > 1 == many["padding"]["speedup_over_padding"]
        assert many["compute"]["bytes_where_each_reads_all"] == pytest.approx(
            8 * many["compute"]["bytes_per_rank_and_step"], abs=8
        )


def test_the_data_of_many_rows_are_opened_without_reading_them_and_no_group_is_read_by_two(tmp_path, monkeypatch):
    import data_start

    monkeypatch.setattr(data_start, "GROUP", 100)
    for name, share in data_start.SHARES.items():
        data_start.write_rows(tmp_path / name, round(16 * share), name == "images", 2000)
    # Of the readers' first rows.
    assert data_start.count_groups(tmp_path, 4, 50)["groups_opened_by_two"] == 0
    assert sum(source.size for source in data_start.open_mixture(tmp_path, 0, 4).sources) == 32_000
