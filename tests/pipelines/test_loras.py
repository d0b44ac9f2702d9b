"""Adapters by diffusers' names: what is loaded, mixed, merged and taken away draws as PEFT's own ways do."""

import shutil

import accelerate
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import draw, quiet
from tiny import tiny_model, tiny_processor
from tiny_onecat import tiny_onecat_model, tiny_onecat_processor
from tiny_tokenflow_t2i import tiny_t2i_model, tiny_t2i_processor

from transformers_nextflow import NextFlowPipeline
from transformers_nextflow.adapters import lora_config


def random_adapter(folder, seed: int, rank: int = 2, make=tiny_model, processor=tiny_processor, **options):
    """A saved adapter, and what a model with it draws."""
    model = make()
    wrapped = peft.get_peft_model(model, lora_config(model, rank, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "trainable_tokens" in name or "modules_to_save" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return draw(quiet(NextFlowPipeline(wrapped.eval(), processor())))


def random_path(folder, rank: int = 2, **options):
    """The folder of a saved adapter."""
    random_adapter(folder, 3, rank, **options)
    return folder


@pytest.fixture
def pipe():
    return quiet(NextFlowPipeline(tiny_model(), tiny_processor()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return folder, {name: random_adapter(folder / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.mark.parametrize("options", [{}, {"new_token_ids": [20, 30]}], ids=["layers", "tokens too"])
def test_a_loaded_adapter_draws_as_it_was_saved_and_leaves_nothing_behind(pipe, options, tmp_path):
    plain, names = draw(pipe), {name for name, _ in pipe.model.named_parameters()}
    expected = random_adapter(tmp_path / "adapter", 0, **options)
    pipe.load_lora_weights(tmp_path / "adapter")
    assert torch.equal(draw(pipe), expected) and not torch.equal(expected, plain)
    assert pipe.get_active_adapters() == ["default_0"]
    pipe.save_lora_weights(tmp_path / "again")
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain) and {name for name, _ in pipe.model.named_parameters()} == names
    pipe.load_lora_weights(tmp_path / "again", "again")
    assert torch.equal(draw(pipe), expected)


OTHERS = {"TokenFlow-t2i": (tiny_t2i_model, tiny_t2i_processor), "OneCAT": (tiny_onecat_model, tiny_onecat_processor)}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_take_adapters_by_the_same_names(kind, tmp_path):
    make, processor = OTHERS[kind]
    expected = random_adapter(tmp_path, 0, make=make, processor=processor)
    pipe = quiet(NextFlowPipeline(make(), processor()))
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), expected) and not torch.equal(expected, plain)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def test_a_model_that_only_draws_takes_a_whole_ones_adapter_without_what_it_left_out(tmp_path):
    expected = random_adapter(tmp_path / "adapter", 0, make=tiny_onecat_model, processor=tiny_onecat_processor)
    NextFlowPipeline(tiny_onecat_model(), tiny_onecat_processor()).save_pretrained(tmp_path / "whole")
    drawing = quiet(NextFlowPipeline.from_pretrained(tmp_path / "whole", drawing_only=True))
    drawing.load_lora_weights(tmp_path / "adapter")
    assert torch.equal(draw(drawing), expected)


def test_adapters_are_switched_mixed_and_switched_off(pipe, saved):
    folder, drawn = saved
    plain = draw(pipe)
    for name in drawn:
        pipe.load_lora_weights(folder / name, adapter_name=name)
    assert pipe.get_list_adapters() == {"model": ["one", "two"]} and pipe.get_active_adapters() == ["two"]
    for name in ("one", "two"):
        pipe.set_adapters(name)
        assert torch.equal(draw(pipe), drawn[name])
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.set_adapters(["one", "two"], 0.5)
    assert not any(torch.equal(draw(pipe), other) for other in (plain, *drawn.values()))
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain) and pipe.get_active_adapters() == []
    pipe.enable_lora()
    pipe.set_adapters("one")
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters() == {"model": ["one"]} and torch.equal(draw(pipe), drawn["one"])
    pipe.delete_adapters("one")
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("fuse", [None, False, True])
def test_compiled_drawing_stays_fused_or_not_where_adapters_come(pipe, saved, fuse):
    pipe.model.compile_drawing(fuse=fuse)
    before = pipe.model.compiled_drawing
    pipe.load_lora_weights(saved[0] / "one")
    assert pipe.model.compiled_drawing is not before and pipe.model.compiled_drawing.fuse is fuse


def test_fused_weights_draw_the_same_and_can_be_parted_or_kept(pipe, saved):
    folder, drawn = saved
    plain = draw(pipe)
    pipe.load_lora_weights(folder / "one")
    pipe.fuse_lora()
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    pipe.fuse_lora(lora_scale=0.0)
    assert torch.equal(draw(pipe), plain)
    pipe.unfuse_lora()
    pipe.set_adapters("default_0", 0.5)
    half = draw(pipe)
    pipe.fuse_lora(lora_scale=2.0)
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.unfuse_lora()
    assert torch.equal(draw(pipe), half)
    pipe.set_adapters("default_0")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), drawn["one"])


def test_a_module_that_an_adapter_holds_whole_is_switched_fused_and_taken_away_with_it(pipe, saved, tmp_path):
    plain, whole = draw(pipe), {"modules_to_save": ["visual_head"]}
    drawn = {name: random_adapter(tmp_path / name, seed, **whole) for seed, name in enumerate(("one", "two"))}
    for name in drawn:
        pipe.load_lora_weights(tmp_path / name, name)
    assert torch.equal(draw(pipe), drawn["two"])
    pipe.set_adapters("one")
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    with pytest.raises(ValueError, match="replace the same module; use one"):
        pipe.set_adapters(["one", "two"])
    with pytest.raises(ValueError, match="replace the same module; fuse one"):
        pipe.fuse_lora(adapter_names=["one", "two"])
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.fuse_lora(adapter_names=["two"])
    assert torch.equal(draw(pipe), drawn["two"])
    pipe.unfuse_lora()
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.load_lora_weights(saved[0] / "one", "plain")  # which has no such module
    assert torch.equal(draw(pipe), saved[1]["one"])
    pipe.set_adapters(["plain", "one"], [0.0, 1.0])
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.delete_adapters("two")
    assert torch.equal(draw(pipe), drawn["one"]) and pipe.get_active_adapters() == ["plain", "one"]
    pipe.save_pretrained(tmp_path / "both")
    again = quiet(NextFlowPipeline.from_pretrained(tmp_path / "both"))
    again.set_adapters("one")
    assert torch.equal(draw(again), drawn["one"])
    pipe.set_adapters("one")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), drawn["one"])


def test_an_adapter_takes_the_place_of_another_in_its_own_tensors(pipe, saved, tmp_path):
    folder, drawn = saved
    third = random_adapter(tmp_path / "third", 2, rank=1)
    pipe.load_lora_weights(folder / "one", "style")
    pipe.load_lora_weights(folder / "two", "style_of_another")
    pipe.set_adapters("style", 0.5)
    tensors = {name: weight.data_ptr() for name, weight in pipe.model.named_parameters()}
    for path, expected in ((folder / "two", drawn["two"]), (tmp_path / "third", third), (folder / "one", drawn["one"])):
        pipe.load_lora_weights(path, "style", hotswap=True)
        assert torch.equal(draw(pipe), expected) and pipe.get_active_adapters() == ["style"]
    assert {name: weight.data_ptr() for name, weight in pipe.model.named_parameters()} == tensors
    pipe.load_lora_weights(tmp_path / "third", "style", hotswap=True)
    pipe.save_lora_weights(tmp_path / "again", "style")
    pipe.set_adapters("style_of_another")
    assert torch.equal(draw(pipe), drawn["two"])
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "again")
    assert torch.equal(draw(pipe), third)


def test_room_for_higher_ranks_is_made_before_and_recorded_scales_are_kept(pipe, saved, tmp_path):
    folder, drawn = saved
    large = random_adapter(tmp_path / "large", 2, rank=5, lora_alpha=3)
    half = random_adapter(tmp_path / "half", 2, rank=5, lora_alpha=1.5)
    pipe.enable_lora_hotswap(target_rank=6)
    pipe.load_lora_weights(folder / "one")
    pipe.model.compile_drawing()
    assert torch.allclose(draw(pipe), drawn["one"], atol=1e-5)
    recorded = pipe.model.compiled_drawing
    pipe.load_lora_weights(tmp_path / "large", hotswap=True)
    assert pipe.model.compiled_drawing is recorded and torch.allclose(draw(pipe), large, atol=1e-5)
    pipe.set_adapters("default_0", 0.5)
    assert torch.allclose(draw(pipe), half, atol=1e-5)
    pipe.fuse_lora(lora_scale=2.0)
    assert torch.allclose(draw(pipe), large, atol=1e-5)
    pipe.unfuse_lora()
    assert torch.allclose(draw(pipe), half, atol=1e-5)
    pipe.save_lora_weights(tmp_path / "again")
    pipe.unload_lora_weights()
    plain = quiet(NextFlowPipeline(tiny_model(), tiny_processor()))
    plain.load_lora_weights(tmp_path / "again")
    assert torch.equal(draw(plain), large)
    with pytest.raises(ValueError, match="there is room for"):
        plain.load_lora_weights(random_path(tmp_path / "larger", 7), hotswap=True)
    with pytest.raises(ValueError, match="has rank 7, and enable_lora_hotswap made room for 6"):
        pipe.load_lora_weights(tmp_path / "larger")
    assert torch.equal(draw(plain), large) and pipe.get_list_adapters() == {"model": []}
    with pytest.raises(ValueError, match="before the first is loaded"):
        plain.enable_lora_hotswap()


def test_an_adapter_of_other_parts_takes_no_ones_place(pipe, saved, tmp_path):
    folder, drawn = saved
    with pytest.raises(ValueError, match="no adapters; name the one"):
        pipe.load_lora_weights(folder / "one", hotswap=True)
    pipe.load_lora_weights(folder / "one", "one")
    with pytest.raises(ValueError, match="no adapter 'two'"):
        pipe.load_lora_weights(folder / "two", "two", hotswap=True)
    others = {
        "tokens": {"new_token_ids": [20]},
        "whole": {"modules_to_save": ["visual_head"]},
        "rs": {"use_rslora": True},
    }
    for name, options in others.items():
        with pytest.raises(ValueError, match="only one of them has|incompatible"):
            pipe.load_lora_weights(random_path(tmp_path / name, **options), "one", hotswap=True)
    assert torch.equal(draw(pipe), drawn["one"])
    few = random_path(tmp_path / "few", target_modules=r".*language_model.*\.q_proj")
    expected = quiet(NextFlowPipeline(peft.PeftModel.from_pretrained(tiny_model(), few), tiny_processor()))
    pipe.load_lora_weights(few, "one", hotswap=True)
    assert torch.equal(draw(pipe), draw(expected))
    pipe.save_lora_weights(tmp_path / "again")
    pipe.load_lora_weights(tmp_path / "again", "again")
    assert torch.equal(draw(pipe), draw(expected))
    pipe.set_adapters("one")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="'one' is fused"):
        pipe.load_lora_weights(folder / "two", "one", hotswap=True)


def test_adapters_move_to_another_device_one_by_one(pipe, saved):
    folder, drawn = saved
    for name in drawn:
        pipe.load_lora_weights(folder / name, name)
    pipe.set_lora_device(["one"], "meta")
    devices = {name: weight.device.type for name, weight in pipe.model.named_parameters()}
    assert {name for name, device in devices.items() if device == "meta"} == {n for n in devices if ".one." in n}
    assert torch.equal(draw(pipe), drawn["two"])
    with pytest.raises(ValueError, match="no adapter 'three'"):
        pipe.set_lora_device("three", "cpu")


def test_a_wrapped_model_is_unwrapped_when_its_adapters_go(saved):
    folder, drawn = saved
    pipe = quiet(NextFlowPipeline(peft.PeftModel.from_pretrained(tiny_model(), folder / "one"), tiny_processor()))
    assert torch.equal(draw(pipe), drawn["one"])
    pipe.unload_lora_weights()
    assert type(pipe.model) is type(tiny_model())
    pipe.load_lora_weights(folder / "two")
    assert torch.equal(draw(pipe), drawn["two"])


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(pipe, saved, tmp_path):
    folder, drawn = saved
    other = tiny_model(text_config={"intermediate_size": 96})
    peft.get_peft_model(other, lora_config(other, 2)).save_pretrained(tmp_path / "other")
    plain = draw(pipe)
    with pytest.raises(ValueError, match="does not fit"):
        pipe.load_lora_weights(tmp_path / "other")
    assert torch.equal(draw(pipe), plain) and pipe.get_list_adapters() == {"model": []}
    pipe.load_lora_weights(folder / "one", "one")
    with pytest.raises(ValueError, match="does not fit"):
        pipe.load_lora_weights(tmp_path / "other", "two")
    assert torch.equal(draw(pipe), drawn["one"]) and pipe.get_list_adapters() == {"model": ["one"]}
    with pytest.raises(ValueError, match="'one' already"):
        pipe.load_lora_weights(folder / "one", "one")
    with pytest.raises(ValueError, match="no adapter 'three'"):
        pipe.set_adapters(["one", "three"])
    with pytest.raises(ValueError, match="1 adapters came with 2 weights"):
        pipe.set_adapters("one", [1.0, 2.0])
    for bad in ("half", True, [None], float("nan")):
        with pytest.raises(ValueError, match="adapter_weights"):
            pipe.set_adapters("one", bad)
    with pytest.raises(ValueError, match="lora_scale must be a number"):
        pipe.fuse_lora("half")
    with pytest.raises(ValueError, match="adapter_names must be a text or a list of texts"):
        pipe.delete_adapters(5)
    with pytest.raises(ValueError, match="no 'weight_name'"):
        pipe.load_lora_weights(folder / "one", "two", weight_name="pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="takes a folder or a repository"):
        pipe.load_lora_weights({"weights": 1}, "two")
    with pytest.raises(OSError):
        pipe.load_lora_weights(tmp_path, "two")


def test_a_scale_of_fusing_is_that_of_the_adapters_that_are_named(pipe, saved):
    for name in ("one", "two"):
        pipe.load_lora_weights(saved[0] / name, name)
    pipe.set_adapters("two", 0.5)
    half = draw(pipe)
    pipe.set_adapters("two")
    pipe.set_adapters("one")
    one = draw(pipe)
    pipe.fuse_lora(0.5, ["two"])
    torch.testing.assert_close(draw(pipe), half)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe), one)


def test_adapters_that_are_switched_off_are_not_fused(pipe, saved):
    pipe.load_lora_weights(saved[0] / "one")
    pipe.disable_lora()
    with pytest.raises(ValueError, match="call enable_lora before fuse_lora"):
        pipe.fuse_lora(0.5, ["default_0"])


def test_fused_adapters_stay_as_they_are_until_they_are_taken_out(pipe, saved):
    for name in ("one", "two"):
        pipe.load_lora_weights(saved[0] / name, name)
    pipe.set_adapters("one")
    pipe.fuse_lora(0.5)
    half, folder = draw(pipe), saved[0] / "two"
    for change in (pipe.disable_lora, lambda: pipe.delete_adapters("one"), lambda: pipe.load_lora_weights(folder)):
        with pytest.raises(ValueError, match="call unfuse_lora before"):
            change()
    assert torch.equal(draw(pipe), half)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe), saved[1]["one"])


def test_adapters_that_are_not_safe_to_fuse_leave_the_weights_as_they_were(pipe, saved):
    pipe.load_lora_weights(saved[0] / "one")
    last = list(pipe._lora_layers())[-1]
    last.lora_B["default_0"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected"):
        pipe.fuse_lora(0.5, safe_fusing=True)
    last.lora_B["default_0"].weight.data[0, 0] = 0.0
    assert not any(layer.merged for layer in pipe._lora_layers())
    assert {layer.scaling["default_0"] for layer in pipe._lora_layers()} == {2.0}


@pytest.mark.parametrize("room", [False, True])
def test_weights_of_adapters_and_which_are_chosen_are_saved_with_the_model(pipe, saved, tmp_path, room):
    if room:
        pipe.enable_lora_hotswap(4)
    for name in ("one", "two"):
        pipe.load_lora_weights(saved[0] / name, name)
    pipe.set_adapters("one", 0.3)
    drawn = draw(pipe)
    pipe.disable_lora()
    pipe.save_pretrained(tmp_path)
    again = quiet(NextFlowPipeline.from_pretrained(tmp_path))
    assert again.get_active_adapters() == [] and torch.equal(draw(again), draw(pipe))
    again.enable_lora()
    assert again.get_active_adapters() == ["one"] and torch.equal(draw(again), drawn)


def test_adapters_are_not_written_into_weights_that_are_elsewhere(pipe, saved, tmp_path):
    folder, drawn = saved
    pipe.load_lora_weights(folder / "one", "one")
    accelerate.cpu_offload(pipe.model, torch.device("cpu"))
    for deed in (
        pipe.fuse_lora,
        pipe.unfuse_lora,
        lambda: pipe.load_lora_weights(folder / "two", "two"),
        lambda: pipe.load_lora_weights(folder / "two", hotswap=True),
        lambda: pipe.save_lora_weights(tmp_path / "saved"),
        lambda: pipe.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ValueError, match="offloaded, where .* does not reach them; do it before"):
            deed()
    assert torch.equal(draw(pipe), drawn["one"]) and not (tmp_path / "saved").exists()
    pipe.remove_all_hooks()
    pipe.load_lora_weights(folder / "two", hotswap=True)
    pipe.fuse_lora()
    accelerate.cpu_offload(pipe.model, torch.device("cpu"))
    assert torch.equal(draw(pipe), drawn["two"])


def test_an_adapter_that_is_loaded_acts_though_others_were_switched_off(pipe, saved):
    pipe.load_lora_weights(saved[0] / "one")
    pipe.disable_lora()
    pipe.load_lora_weights(saved[0] / "two", "two")
    assert pipe.get_active_adapters() == ["two"] and torch.equal(draw(pipe), saved[1]["two"])


def test_an_adapter_that_left_out_layers_of_a_lower_rank_is_saved_after_a_swap(pipe, tmp_path):
    old = random_path(tmp_path / "old", 2, rank_pattern={"q_proj": 8})
    few = random_path(tmp_path / "few", 8, target_modules=r".*language_model.*\.q_proj")
    pipe.load_lora_weights(old, "own")
    pipe.load_lora_weights(few, "own", hotswap=True)
    expected = draw(pipe)
    pipe.save_lora_weights(tmp_path / "again")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "again")
    assert torch.equal(draw(pipe), expected)


def test_an_adapter_is_not_swapped_into_a_narrower_dtype(pipe, saved, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(saved[0] / "one", narrow)
    weights = {name: value.bfloat16() for name, value in load_file(narrow / "adapter_model.safetensors").items()}
    save_file(weights, narrow / "adapter_model.safetensors")
    pipe.load_lora_weights(narrow, "own")
    before = draw(pipe)
    with pytest.raises(ValueError, match="torch.float32, which torch.bfloat16 does not hold; load it without hotswap"):
        pipe.load_lora_weights(saved[0] / "two", "own", hotswap=True)
    assert torch.equal(draw(pipe), before)


def test_only_loras_have_room_for_others(pipe, tmp_path):
    peft.get_peft_model(tiny_model(), peft.LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    pipe.enable_lora_hotswap(8)
    with pytest.raises(ValueError, match="kind LOHA; only LoRAs are hot-swapped"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {"model": []}


def test_the_scales_of_adapters_go_where_the_pipeline_goes(pipe, saved):
    pipe.enable_lora_hotswap(8)
    pipe.load_lora_weights(saved[0] / "one")
    pipe.model.to("meta")
    pipe._place_scales()
    scales = [scale for layer in pipe._lora_layers() for scale in layer.scaling.values()]
    assert scales and all(scale.device.type == "meta" for scale in scales)


def test_a_model_without_some_parts_swaps_what_it_loads(tmp_path):
    for seed, name in enumerate(("one", "two")):
        random_adapter(tmp_path / name, seed, make=tiny_onecat_model, processor=tiny_onecat_processor)
    pipes = []
    tiny_onecat_model().save_pretrained(tmp_path / "model")
    tiny_onecat_processor().save_pretrained(tmp_path / "model")
    for _ in range(2):
        pipes.append(quiet(NextFlowPipeline.from_pretrained(tmp_path / "model", drawing_only=True)))
    pipes[0].load_lora_weights(tmp_path / "one", "own")
    pipes[0].load_lora_weights(tmp_path / "two", "own", hotswap=True)
    pipes[1].load_lora_weights(tmp_path / "two", "own")
    assert torch.equal(draw(pipes[0]), draw(pipes[1]))
