"""One graph for text, decoding steps and prepared batches with images; no step of decoding waits for the device."""

import pytest
import torch
from reference_nextflow import as_batch
from test_modeling import LEVELS, ragged_batch, random_image, special_tokens
from test_packing import mixed_rows, packed_and_padded
from tiny import tiny_model, tiny_processor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from transformers_nextflow.generation.cached_sequences import Prompts
from transformers_nextflow.generation.sequence_writer import SequenceWriter
from transformers_nextflow.sequence.layout import layout_batch
from transformers_nextflow.utils.older_transformers import CACHE_KEYWORD


aten = torch.ops.aten
# What a GPU has to be waited for: numbers and shapes that depend on values.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
}


class NoWaiting(TorchDispatchMode):
    """Raises where the values of a tensor are asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def assert_same(model, **inputs):
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


def prepared(model):
    """A batch with images in which nothing is left to look at."""
    _, inputs = ragged_batch(model.config)
    layout = layout_batch(model.config, **inputs)
    inputs.pop("image_grids")
    return inputs | {"layout": layout}


def step_behind(model, cache, with_mask=True):
    """Inputs of the next token behind a batch that goes into the cache."""
    inputs = prepared(model)
    model(**inputs, past_key_values=cache, use_cache=True)
    position = inputs["layout"].position_ids[0, :, -1:] + 1
    step = {"input_ids": torch.full(position.shape, 30), "position_ids": position.expand(3, -1, -1)}
    if with_mask:
        step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(step["input_ids"])], 1)
    return step | {"past_key_values": cache}


def caches(model):
    return DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, max_cache_len=150)


def test_text_compiles_in_one_graph():
    model = tiny_model()
    ids, mask = torch.tensor([[20, 21, 22, 23], [9, 24, 25, 26]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    assert_same(model, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_features": True, "read_last_scale": True, "vq_config": LEVELS | {"upsample": "rotary"}}],
    ids=["default", "all"],
)
def test_a_prepared_batch_with_images_compiles_in_one_graph(options):
    model = tiny_model(**options)
    assert_same(model, **prepared(model))


def test_a_prepared_packed_row_compiles_in_one_graph():
    model, processor = tiny_model(), tiny_processor()
    packed, _ = packed_and_padded(processor, mixed_rows(processor))
    names = ("input_ids", "image_tokens", "image_grids", "seq_idx")
    layout = layout_batch(model.config, **{name: packed[name] for name in names})
    inputs = {name: packed[name] for name in ("input_ids", "image_tokens", "seq_idx")}
    assert_same(model, **inputs, layout=layout)


@torch.no_grad()
def test_a_decoding_step_compiles_in_one_graph():
    model = tiny_model()
    for cache, again in zip(caches(model), caches(model)):
        expected = model(**step_behind(model, cache)).logits
        found = compiled(model)(**step_behind(model, again)).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_no_decoding_step_waits_for_the_device(implementation, with_mask):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    for cache in caches(model):
        step = step_behind(model, cache, with_mask)
        images = {"image_tokens": torch.zeros(1, 30).long(), "image_grids": torch.tensor([[4, 4]])}
        with NoWaiting():
            outputs = model(**step)
            # As `generate` prepares it, with images that were read before.
            prepared_step = model.prepare_inputs_for_generation(
                step["input_ids"], next_sequence_length=1, **{CACHE_KEYWORD: cache}, use_cache=True, **images
            )
        assert outputs.logits.isfinite().all() and not set(images) & set(prepared_step)


@torch.no_grad()
def test_text_without_positions_goes_on_without_waiting():
    model = tiny_model()
    for cache in caches(model):
        model(torch.tensor([[20, 21]]), past_key_values=cache)
        with NoWaiting():
            logits = model(torch.tensor([[22]]), past_key_values=cache).logits
        torch.testing.assert_close(logits, model(torch.tensor([[20, 21, 22]])).logits[:, -1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_writer_appends_without_waiting():
    model = tiny_model()
    _, inputs = as_batch([[20, random_image(model.config), 21], [22]], *special_tokens(model.config))
    writer = SequenceWriter(model, Prompts(**inputs))
    with NoWaiting():
        writer.append([[30], [31]])
        writer.append([[32, 33], []])
        assert writer.text_logits.shape == (2, model.config.text_config.vocab_size)


def test_a_prepared_layout_gives_what_the_model_finds_itself():
    model = tiny_model(read_last_scale=True)
    _, inputs = ragged_batch(model.config)
    batch = prepared(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        with NoWaiting():
            found = model(**batch | {"layout": batch["layout"].to("cpu")}).logits
    assert torch.equal(found, expected)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert torch.equal(model(**batch, labels=labels).loss, model(**inputs, labels=labels).loss)


def test_a_layout_is_checked_when_it_is_prepared():
    model = tiny_model()
    _, inputs = ragged_batch(model.config)
    for change, message in (
        ({"image_tokens": inputs["image_tokens"] + 100}, "image_tokens run from 0 to 31, got 100"),
        ({"image_tokens": inputs["image_tokens"][:, :5]}, "image_tokens hold 5 codes an image"),
        ({"image_tokens": inputs["image_tokens"][:-1]}, "3 rows of image_tokens came with 4 image_grids"),
        ({"image_tokens": None}, "4 image_grids came without image_tokens"),
        ({"image_grids": None}, "hold 4 whole images"),
    ):
        with pytest.raises(ValueError, match=message):
            layout_batch(model.config, **inputs | change)
    batch = prepared(model)
    with pytest.raises(ValueError, match="layout is of a batch"):
        model(**batch | {"input_ids": batch["input_ids"][:, 1:]})
    with pytest.raises(ValueError, match="layout is of 4 images, but 0 rows"):
        model(**batch | {"image_tokens": None})
