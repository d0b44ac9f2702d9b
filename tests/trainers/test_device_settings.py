"""What a training sets by its device: the attention for the shapes at hand, compiled layers, kernels, checkpoints."""

import sys
import types

import pytest
import torch
from test_packing import arguments, mixed_rows, numbered_rows, packed_and_padded
from tiny import tiny_model, tiny_processor

from transformers_nextflow import NextFlowConfig
from transformers_nextflow.sequence import scale_sdpa
from transformers_nextflow.sequence.scale_sdpa import SCALE_SDPA
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer
from transformers_nextflow.trainers.device_settings import (
    backbone_of,
    calls_are_faster,
    choose_attention,
    compile_layers,
    use_liger,
)


def test_large_images_are_read_scale_by_scale_on_a_gpu_and_small_ones_by_flex_attention():
    schedules = NextFlowConfig.nextflow_7b().vq_config.scale_schedules
    assert calls_are_faster(schedules.build(level=1024), 3584)
    assert not calls_are_faster(schedules.build(level=256), 3584)


def test_the_attention_follows_the_device_unless_one_was_asked_for():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device, before, schedules, expected in (
        (cuda, None, "image", "flex_attention"),
        (cuda, None, "text", SCALE_SDPA),
        (cpu, None, "image", SCALE_SDPA),
        (cuda, "eager", "image", "eager"),
    ):
        model = tiny_model()
        if before:
            model.set_attn_implementation(before)
        choose_attention(model, device, [model.config.vq_config.scale_schedules.build()] * (schedules == "image"))
        assert backbone_of(model).config._attn_implementation == expected


def test_compiled_layers_give_the_same_for_every_pack_and_are_not_compiled_for_each(monkeypatch):
    monkeypatch.setattr(scale_sdpa, "CALL_COST", {"cpu": 0})
    plain_compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: plain_compile(self, backend=backend, **options)
    )
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    processor, model, compiled = tiny_processor(), tiny_model(), tiny_model()
    compile_layers(compiled)
    rows = mixed_rows(processor)
    counts = []
    for chosen in (rows, rows[:2], rows[1:], rows[2:]):
        packed, _ = packed_and_padded(processor, chosen)
        found, expected = (one.train()(**packed) for one in (compiled, model))
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
        counts.append(len(graphs))
    assert counts[-1] == counts[1]
    torch._dynamo.reset()


def test_only_every_so_many_th_layer_is_checkpointed(tmp_path):
    options = {"max_steps": 1, "gradient_checkpointing": True, "checkpoint_every": 2}
    model = tiny_model(text_config={"num_hidden_layers": 3})
    collator = NextFlowCollator(tiny_processor())
    trainer = NextFlowTrainer(
        model, arguments(tmp_path, **options), train_dataset=numbered_rows(4), data_collator=collator
    )
    trainer.train()
    assert [layer.gradient_checkpointing for layer in backbone_of(model).layers] == [True, False, True]
    for wrong in ({"checkpoint_every": 0, "gradient_checkpointing": True}, {"checkpoint_every": 2}):
        with pytest.raises(ValueError, match="checkpoint_every"):
            arguments(tmp_path, **wrong)
    with pytest.raises(ValueError, match="checkpoint_every=2 and every_n_layers .* leave one out"):
        arguments(tmp_path, **options, gradient_checkpointing_kwargs={"every_n_layers": 3})


def test_kernels_of_liger_are_used_where_it_is_installed(monkeypatch):
    model, plain = tiny_model(), tiny_model()
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    assert not use_liger(model)
    called = []

    def rms_norm(hidden_states, weight, epsilon):
        called.append("norm")
        return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, epsilon)

    def swiglu(gate, up):
        called.append("gated")
        return torch.nn.functional.silu(gate) * up

    functional = types.SimpleNamespace(liger_rms_norm=rms_norm, liger_swiglu=swiglu)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    assert use_liger(model)
    ids = torch.tensor([[20, 21, 22]])
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    layers = model.config.text_config.num_hidden_layers
    assert (called.count("norm"), called.count("gated")) == (2 * layers + 1, layers)
