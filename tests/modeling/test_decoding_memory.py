"""Batched decoding: equal to that of single images, by stripes as by whole layers, in little memory."""

import weakref

import pytest
import torch
from test_modeling_vq import tiny_vq_model
from tiny import tiny_model, tiny_vq_config
from tiny_onecat import tiny_onecat_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformers_nextflow import NextFlowVQConfig, NextFlowVQModel, modeling_nextflow_vq
from transformers_nextflow.modeling_nextflow_vq import images_at_once
from transformers_nextflow.vision_tokenizer import pixel_branches, striped_convolutions
from transformers_nextflow.vision_tokenizer.pixel_branches import ConvolutionalDecoder


def convolutional(**options) -> NextFlowVQModel:
    config = tiny_vq_config(
        pixel_encoder_type="convolutional",
        pixel_channel_multipliers=(1, 2, 2),
        pixel_decoder_num_res_blocks=2,
        **options,
    )
    torch.manual_seed(0)
    return NextFlowVQModel(config).eval()


def bitwise():
    return tiny_onecat_model().vq_model


def random_codes(model, count: int, size: tuple[int, int] = (16, 16)):
    schedule = model.config.scale_schedules.for_size(*size)
    return torch.randint(32, (count, schedule.num_tokens), generator=torch.Generator().manual_seed(0)), schedule


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("size", [(16, 16), (8, 32), (28, 8)], ids=str)
def test_stripes_of_any_height_give_the_pixels_of_the_layers(rows, size, monkeypatch):
    model = convolutional()
    codes, schedule = random_codes(model, 2, size)
    expected = model.decode(codes, schedule).detach()
    monkeypatch.setattr(pixel_branches, "WHOLE_BYTES", 0)
    monkeypatch.setattr(striped_convolutions, "STRIPE_BYTES", rows * 2 * 32 * 4 * size[1])
    with torch.no_grad():
        torch.testing.assert_close(model.decode(codes, schedule), expected, atol=2e-5, rtol=0)


def test_stripes_in_half_precision_are_as_near_to_float32_as_the_layers(monkeypatch):
    model = convolutional()
    codes, schedule = random_codes(model, 1)
    exact = model.decode(codes, schedule).detach()
    model.pixel_decoder.bfloat16()
    plain = model.decode(codes, schedule).detach()
    monkeypatch.setattr(pixel_branches, "WHOLE_BYTES", 0)
    with torch.no_grad():
        striped = model.decode(codes, schedule)
    assert (striped - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()


@torch.no_grad()
def test_images_of_several_sizes_are_decoded_as_single_ones():
    model, called = tiny_model(), []
    model.vq_model.pixel_decoder.register_forward_hook(lambda module, args, output: called.append(len(output)))
    schedules = [model.config.vq_config.scale_schedules.for_size(*size) for size in ((16, 16), (8, 32))]
    longest = max(schedule.num_tokens for schedule in schedules)
    rows = [0, 1, 0, 1, 0]
    codes = torch.full((5, longest), -1)
    for row, which in enumerate(rows):
        count = schedules[which].num_tokens if row < 4 else schedules[which].offsets[2]  # a preview
        codes[row, :count] = torch.randint(32, (count,), generator=torch.Generator().manual_seed(row))
    grids = torch.tensor([schedules[which].final_grid for which in rows])
    together = model.decode_image_tokens(codes, grids)
    assert called == [1] * 5
    for row in range(5):
        (single,) = model.decode_image_tokens(codes[row : row + 1], grids[row : row + 1])
        assert torch.equal(together[row], single)


@torch.no_grad()
@pytest.mark.parametrize("make", [convolutional, tiny_vq_model, bitwise])
def test_on_a_cpu_an_image_does_not_depend_on_its_neighbours_by_a_bit(make):
    model = make()
    schedule = model.config.scale_schedules.for_size(*model.config.scale_schedules.all_sizes()[-1])
    codes = torch.randint(32, (16, schedule.num_tokens), generator=torch.Generator().manual_seed(0))
    together = model.decode(codes, schedule)
    assert all(torch.equal(model.decode(codes[n : n + 1], schedule)[0], together[n]) for n in range(16))


@torch.no_grad()
def test_off_a_cpu_as_many_images_are_decoded_at_once_as_memory_is_meant_for(monkeypatch):
    model, called = convolutional().to("meta"), []
    model.pixel_decoder.register_forward_hook(lambda module, args, output: called.append(len(output)))
    schedule = random_codes(model, 5)[1]
    features = torch.empty(5, model.config.semantic_code_dim + model.config.pixel_code_dim, 4, 4, device="meta")
    monkeypatch.setattr(modeling_nextflow_vq, "BYTES_AT_ONCE", 2 * 5 * 16 * 16 * 16 * 4)
    channels = model.config.pixel_decoder_channels
    assert model.decode_in_parts(features, channels, schedule, 4).shape == (5, 3, 16, 16) and called == [2, 2, 1]


@torch.no_grad()
def test_as_many_images_are_encoded_at_once_as_memory_is_meant_for(monkeypatch):
    model, called = tiny_model(), []
    pixels, grids = torch.rand(5, 3, 16, 16) * 2 - 1, torch.tensor([[4, 4]] * 5)
    expected = model.get_image_tokens(pixels, grids)
    model.vq_model.pixel_encoder.register_forward_hook(lambda module, args, output: called.append(len(output)))
    monkeypatch.setattr(modeling_nextflow_vq, "BYTES_AT_ONCE", 2 * 5 * (2 * 16 * 4 * 4 + 3 * 16 * 16) * 4)
    assert torch.equal(model.get_image_tokens(pixels, grids), expected) and called == [2, 2, 1]


class PeakOfTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, on tensors without data."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def _gone(self, key, size):
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
                    self.peak = max(self.peak, self.now)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_four_images_of_1024_pixels_are_decoded_in_2_gib_beside_the_weights(dtype):
    config = NextFlowVQConfig(levels=[[256, 12], [512, 16], [1024, 18]])
    schedule = config.scale_schedules.for_size(1024, 1024)
    with torch.device("meta"):
        decoder = ConvolutionalDecoder(config).to(dtype)
        at_once = images_at_once(config, config.pixel_decoder_channels, schedule, dtype.itemsize)
        features = torch.empty(4, config.pixel_code_dim, *schedule.final_grid, dtype=dtype)
    with PeakOfTensors() as memory:
        images = [decoder(part) for part in features.split(at_once)]
    assert sum(len(part) for part in images) == 4 and 0.2 * 2**30 < memory.peak <= 2 * 2**30
