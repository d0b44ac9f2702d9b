"""Packing: samples in one row do not touch each other, packs keep their budget, processes share them out."""

import os
import random

import pytest
import torch
from processes import in_two_processes
from test_modeling import ATTENTIONS, LAYOUTS, attention
from test_trainer import codes, conversation, drawing, question, text
from tiny import free_port, tiny_config, tiny_model, tiny_processor

from transformers_nextflow.scale_schedule import ScaleSchedules
from transformers_nextflow.sequence.scale_sdpa import SCALE_SDPA
from transformers_nextflow.trainers import (
    CostModel,
    NextFlowCollator,
    NextFlowTrainer,
    NextFlowTrainingArguments,
    PackedDataset,
    PackedStream,
)
from transformers_nextflow.trainers.packing import SampleSize, pack


def chat(question: str, answer: str) -> dict:
    return {"messages": conversation([text(question)], [text(answer)]), "image_tokens": [], "image_grids": []}


def mixed_rows(processor) -> list[dict]:
    tall = processor.image_processor.schedule_for_grid(7, 2)
    edit = {
        "messages": conversation([{"type": "image"}, text("one")], [{"type": "image"}, text("a star")]),
        "image_tokens": [codes(5, tall.num_tokens), codes(6)],
        "image_grids": [list(tall.final_grid), [4, 4]],
    }
    return [drawing("a red circle", 1), chat("how many?", "one"), question("how many?", "two", 2), edit]


def packed_and_padded(processor, rows, **options):
    collator = NextFlowCollator(processor, **options)
    return collator([rows]), collator(rows)


def check_packed_equals_padded(model, processor, rows, **options):
    packed, padded = packed_and_padded(processor, rows, **options)
    labels = [batch.pop("labels") for batch in (packed, padded)]
    alone = model(**padded).logits[padded["attention_mask"].bool()]
    together = model(**packed).logits[packed["seq_idx"] < len(rows)]
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    losses = [model(**batch, labels=own) for batch, own in zip((packed, padded), labels)]
    for name in ("loss", "text_loss", "image_loss", "scale_losses"):
        torch.testing.assert_close(*(loss[name] for loss in losses), atol=1e-5, rtol=1e-5, equal_nan=True)


# In one row -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [*ATTENTIONS, SCALE_SDPA])
def test_packed_samples_have_the_logits_and_losses_of_padded_ones(implementation):
    model, processor = tiny_model(), tiny_processor()
    model.set_attn_implementation(implementation)
    with torch.no_grad(), attention(implementation):
        check_packed_equals_padded(model, processor, mixed_rows(processor))
        check_packed_equals_padded(model, processor, mixed_rows(processor), pad_to_multiple_of=64)
        check_packed_equals_padded(model, processor, [chat("one", "two"), chat("how many?", "one")])


@LAYOUTS
@torch.no_grad()
def test_packing_holds_for_every_layout(options):
    model = tiny_model(**options)
    vq = model.config.vq_config
    processor = tiny_processor(levels=vq.levels, read_last_scale=model.config.read_last_scale)
    check_packed_equals_padded(model, processor, mixed_rows(processor))


@pytest.mark.parametrize("implementation", ["sdpa", SCALE_SDPA])
def test_no_sample_of_a_row_depends_on_another(implementation):
    model, processor = tiny_model(), tiny_processor()
    model.set_attn_implementation(implementation)
    batch, _ = packed_and_padded(processor, mixed_rows(processor))
    embeds = model.model.language_model.embed_tokens
    kept = []
    handle = embeds.register_forward_hook(lambda module, args, output: kept.append(output) or output.retain_grad())
    batch.pop("labels")
    logits = model(**batch).logits
    handle.remove()
    for sample in range(4):
        own = batch["seq_idx"][0] == sample
        kept[0].grad = None
        logits[0, own].square().sum().backward(retain_graph=True)
        touched = kept[0].grad[0].abs().sum(-1) > 0
        assert touched[own].any() and not touched[~own].any()


def test_packed_gradients_are_those_of_padding_also_with_checkpointing():
    processor, gradients = tiny_processor(), []
    packed, padded = packed_and_padded(processor, mixed_rows(processor))
    for batch, checkpointing in ((padded, False), (packed, False), (packed, True)):
        model = tiny_model()
        model.set_attn_implementation(SCALE_SDPA)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3)


def test_nothing_predicts_the_first_token_of_a_sample():
    model, processor = tiny_model(), tiny_processor()
    packed, padded = packed_and_padded(processor, mixed_rows(processor))
    for batch, valid in ((packed, packed["seq_idx"] >= 0), (padded, padded["attention_mask"].bool())):
        batch["labels"] = batch["input_ids"].masked_fill(~valid, -100)
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).loss, model(**padded).loss)


def test_packed_rows_cannot_be_continued():
    model, processor = tiny_model(), tiny_processor()
    packed, _ = packed_and_padded(processor, mixed_rows(processor))
    del packed["labels"]
    cache = model(input_ids=torch.tensor([[20]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be continued"):
        model(**packed, past_key_values=cache)


# What a sample costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_last_scale", [False, True])
def test_pairs_are_those_of_the_attention_mask(read_last_scale):
    processor = tiny_processor(read_last_scale=read_last_scale)
    model = tiny_model(read_last_scale=read_last_scale)
    model.set_attn_implementation("eager")
    collator = NextFlowCollator(processor)
    for row in mixed_rows(processor):
        batch = collator([row])
        trained = int((batch.pop("labels") != -100).sum())
        pairs = int((model(**batch, output_attentions=True).attentions[0][0, 0] > 0).sum())
        size = collator.size(row)
        assert (size.length, size.trained) == (batch["input_ids"].shape[1], trained) and trained < size.length
        assert CostModel(head=0, attention=1).cost(size, read_last_scale) == size.length + pairs


def test_the_cost_model_counts_the_multiplications_of_the_model():
    config = tiny_config()
    layer = tiny_model().model.language_model.layers[0]
    linear = 2 * sum(p.numel() for name, p in layer.named_parameters() if "proj.weight" in name)
    model = CostModel.from_config(config)
    assert model.attention == pytest.approx(2 * 2 * 32 / linear)
    assert model.head == pytest.approx(4 / 3 * 32 * (320 + 32) / linear)
    image = ScaleSchedules(sides=(1, 2, 4), patch_size=4).build()
    size = SampleSize(length=30, trained=10, schedules=(image,))
    pairs = 30 * 31 / 2 + 4 * 3 / 2 + 16 * 15 / 2
    assert model.cost(size) == pytest.approx(30 + 10 * model.head + pairs * model.attention)


# Packs ----------------------------------------------------------------------------------------------------------------


def test_packs_hold_every_sample_once_and_are_nearly_full():
    generator = random.Random(0)
    costs = [generator.choice([5, 20, 100, 400]) * generator.uniform(0.8, 1.2) for _ in range(5000)]
    packs = list(pack(range(5000), costs, budget=1000))
    assert sorted(sample for samples in packs for sample in samples) == list(range(5000))
    filled = [sum(costs[sample] for sample in samples) for samples in packs]
    assert max(filled) <= 1000 + 1e-6
    assert sum(filled) / len(filled) > 980


def test_samples_that_share_no_pack_have_one_each():
    assert sorted(map(len, pack(range(3000), [6] * 3000, budget=10))) == [1] * 3000


def test_packs_of_a_stream_come_before_the_stream_ends():
    taken = []
    packs = pack((taken.append(n) or n for n in range(10**6)), (10 for _ in range(10**6)), budget=100)
    assert len(next(packs)) == 10 and len(taken) < 2000


@pytest.mark.parametrize("kind", [PackedDataset, PackedStream])
def test_a_budget_below_one_sample_is_refused_and_names_it(kind):
    rows = [{"cost": 10}, {"cost": 31}]
    with pytest.raises(ValueError, match="Row 1 costs 31, more than the packing_budget of 30; give a budget"):
        list(kind(rows, lambda row: row["cost"], 30))


def test_a_batch_is_one_pack():
    with pytest.raises(ValueError, match="one pack, got 2; set per_device_train_batch_size to 1"):
        NextFlowCollator(tiny_processor())([[drawing("one", 0)], [drawing("one", 1)]])


# In the trainer -------------------------------------------------------------------------------------------------------


def arguments(folder, **options) -> NextFlowTrainingArguments:
    values = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no", "logging_steps": 1}
    values |= {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    return NextFlowTrainingArguments(output_dir=str(folder), **(values | options))


class Recorder(NextFlowTrainer):
    """Keeps which samples each step had, and its length."""

    def compute_loss(self, model, inputs, **kwargs):
        self.seen = getattr(self, "seen", []) + [inputs["image_tokens"][:, 0].tolist()]
        self.lengths = getattr(self, "lengths", []) + [inputs["input_ids"].shape[1]]
        return super().compute_loss(model, inputs, **kwargs)


def numbered_rows(count: int) -> list[dict]:
    """Drawings whose first code is their number, with prompts of different length."""
    rows = [drawing("a red circle " * (1 + n % 7), seed=n) for n in range(count)]
    for number, row in enumerate(rows):
        row["image_tokens"][0][0] = number
    return rows


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("packing", ["length", "compute"])
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_an_epoch_trains_on_every_row_once_within_the_budget(packing, stream, tmp_path):
    rows, collator = numbered_rows(30), NextFlowCollator(tiny_processor())
    args = arguments(tmp_path, packing=packing, packing_budget=300, **({"max_steps": 16} if stream else {}))
    trainer = Recorder(tiny_model(), args, train_dataset=Stream(rows) if stream else rows, data_collator=collator)
    assert trainer.model.config.text_config._attn_implementation == SCALE_SDPA
    trainer.train()
    seen = [number for step in trainer.seen for number in step]
    if stream:
        assert set(seen) == set(range(30))
    else:
        assert sorted(seen) == list(range(30))
    assert max(trainer.lengths) <= 300 and max(map(len, trainer.seen)) > 2


def test_packing_takes_a_budget_and_batches_of_one(tmp_path):
    for options, message in [
        ({"packing": "tight"}, "packing must be one of"),
        ({"packing": "length"}, "'length' needs a packing_budget from 1, got None"),
        ({"packing": "compute", "packing_budget": 0}, "needs a packing_budget from 1, got 0"),
        ({"packing_budget": 100}, "packing_budget 100 is for packing 'length' or 'compute'"),
        (
            {"packing": "length", "packing_budget": 9, "per_device_train_batch_size": 2},
            r"set per_device_train_batch_size to 1 \(got 2\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **options)


def _train_on_one_of_two(rank: int, port: int, folder: str):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    args = arguments(folder, packing="compute", packing_budget=300, ddp_backend="gloo")
    collator = NextFlowCollator(tiny_processor())
    trainer = Recorder(tiny_model(), args, train_dataset=numbered_rows(30), data_collator=collator)
    trainer.train()
    torch.save((trainer.seen, trainer.train_dataset.costs), f"{folder}/{rank}.pt")
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, f"{folder}/weights-{rank}.pt")


def test_two_processes_share_the_packs_and_end_with_the_same_weights(tmp_path):
    in_two_processes(_train_on_one_of_two, free_port(), str(tmp_path))
    (first, costs), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    seen = [number for step in first + second for number in step]
    assert len(first) == len(second) and set(seen) == set(range(30))
    # An odd number of packs makes one come twice; no other row does.
    assert len(seen) - 30 <= max(map(len, first + second))
    assert max(costs) <= 300
    weights = [torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
