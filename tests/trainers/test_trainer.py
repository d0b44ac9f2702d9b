"""Training of the transformer: its collator, its losses, what it leaves alone, and resuming."""

import copy
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor
from transformers import IntervalStrategy, TrainerState, TrainingArguments

from transformers_nextflow import ImageSampling
from transformers_nextflow.data import BadRowError
from transformers_nextflow.trainers import (
    ImageGrids,
    NextFlowCollator,
    NextFlowTrainer,
    NextFlowTrainingArguments,
)
from transformers_nextflow.trainers.recipe_data import StageRows


GRID, CODES = [4, 4], 1 + 4 + 9 + 16
SLOTS = CODES - 1


def codes(seed: int, count: int = CODES) -> list[int]:
    return torch.randint(32, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def conversation(question: list[dict], answer: list[dict]) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def drawing(prompt: str, seed: int) -> dict:
    messages = conversation([text(prompt)], [{"type": "image"}])
    return {"messages": messages, "image_tokens": [codes(seed)], "image_grids": [GRID]}


def question(words: str, answer: str, seed: int) -> dict:
    messages = conversation([{"type": "image"}, text(words)], [text(answer)])
    return {"messages": messages, "image_tokens": [codes(seed)], "image_grids": [GRID]}


def rows() -> list[dict]:
    return [drawing("a red circle", seed=1), question("how many circles are there?", "one", seed=2)]


def training_arguments(folder, data, **options) -> NextFlowTrainingArguments:
    values = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": len(data),
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    return NextFlowTrainingArguments(output_dir=str(folder), **(values | options))


def make_trainer(folder, model, data, **options) -> NextFlowTrainer:
    args = training_arguments(folder, data, **options)
    return NextFlowTrainer(model, args, train_dataset=data, data_collator=NextFlowCollator(tiny_processor()))


def test_batches_of_one_length_are_made_from_the_lengths_column(tmp_path):
    data = datasets.Dataset.from_list([row | {"length": 10 + index} for index, row in enumerate(rows())])
    trainer = make_trainer(tmp_path, tiny_model(), data, train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    # A column, which equals it, is read from disk for each length.
    assert type(sampler.lengths) is list and sampler.lengths == [10, 11]
    trainer.train()
    # As recipes take them.
    trainer = make_trainer(
        tmp_path, tiny_model(), StageRows(data, tiny_processor()), train_sampling_strategy="group_by_length"
    )
    assert trainer._get_train_sampler().lengths == [10, 11]
    trainer = make_trainer(tmp_path, tiny_model(), rows(), train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length' needs a column 'length'"):
        trainer.train()


def test_metrics_that_are_never_logged_do_not_pile_up(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), rows(), max_steps=3, logging_strategy="no")
    trainer.train()
    means = trainer._trained
    assert means.sums.shape == (2, len(means.names)) and means.sums[1, means.names.index("loss")] > 0


# The collator ---------------------------------------------------------------------------------------------------------


def test_a_image_becomes_boi_its_slots_and_eoi_and_only_answers_have_labels():
    processor = tiny_processor()
    boi, eoi, slot = processor.boi_token_id, processor.eoi_token_id, processor.image_token_id
    for row, answer in zip(rows(), ([boi] + [slot] * SLOTS + [eoi], processor.tokenizer("one").input_ids)):
        ids, labels = NextFlowCollator(processor).encode(row)
        start = ids.index(boi)
        assert ids[start : start + SLOTS + 2] == [boi] + [slot] * SLOTS + [eoi]
        assert ids.count(slot) == SLOTS and ids.count(boi) == ids.count(eoi) == 1
        # The answer ends with the token at which generation stops.
        trained = [(token, label) for token, label in zip(ids, labels) if label != -100]
        assert [label for _, label in trained] == [*answer, processor.tokenizer.eos_token_id]
        assert all(token == label for token, label in trained)


def test_images_of_several_turns_come_in_their_order_and_sizes():
    processor = tiny_processor()
    messages = conversation([{"type": "image"}, text("one"), {"type": "image"}], [{"type": "image"}, text("one")])
    tall = processor.image_processor.schedule_for_grid(7, 2)
    grids = [GRID, list(tall.final_grid), GRID]
    row = {"messages": messages, "image_grids": grids}
    row["image_tokens"] = [codes(0), codes(1, tall.num_tokens), codes(2)]
    batch = NextFlowCollator(processor)([row])
    ids = batch["input_ids"][0].tolist()
    starts = [i for i, token in enumerate(ids) if token == processor.boi_token_id]
    ends = [i for i, token in enumerate(ids) if token == processor.eoi_token_id]
    assert [end - start - 1 for start, end in zip(starts, ends)] == [SLOTS, tall.num_slots(), SLOTS]
    assert [int(batch["labels"][0, end] != -100) for end in ends] == [0, 0, 1]
    assert batch["image_grids"].tolist() == grids
    for given, padded in zip(row["image_tokens"], batch["image_tokens"].tolist()):
        assert padded == given + [-1] * (max(CODES, tall.num_tokens) - len(given))


def test_a_model_that_reads_the_last_scale_gets_one_more_grid_of_slots():
    processor = tiny_processor(read_last_scale=True)
    ids, _ = NextFlowCollator(processor).encode(rows()[1])
    assert ids.count(processor.image_token_id) == SLOTS + 16


@pytest.mark.parametrize("multiple", [1, 32])
def test_rows_are_padded_on_the_right_to_a_common_length(multiple):
    collator = NextFlowCollator(tiny_processor(), pad_to_multiple_of=multiple)
    longer, shorter = question("how many circles are there? " * 3, "one", 0), drawing("one", 1)
    batch = collator([longer, shorter])
    lengths = [len(collator.encode(row)[0]) for row in (longer, shorter)]
    expected = -(-max(lengths) // multiple) * multiple
    assert lengths[1] < lengths[0] and {batch[name].shape for name in ("input_ids", "labels")} == {(2, expected)}
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (expected - n) for n in lengths]
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == tiny_processor().tokenizer.pad_token_id).all()
    assert (batch["labels"][padding] == -100).all()


def test_codes_to_be_written_may_differ_from_those_to_be_read():
    corrected = drawing("one", 1) | {"image_labels": [codes(7)]}
    batch = NextFlowCollator(tiny_processor())([corrected, drawing("one", 2)])
    assert batch["image_tokens"].tolist() == [codes(1), codes(2)]
    assert batch["image_labels"].tolist() == [codes(7), codes(2)]


@pytest.mark.parametrize("flags", [(None, None), (True, None), (True, False), (None, False)])
def test_a_image_is_read_with_sampled_codes_exactly_where_it_is_trained_on(flags):
    shown, drawn = ({"type": "image"} | ({} if flag is None else {"train": flag}) for flag in flags)
    row = {"messages": conversation([shown, text("one")], [drawn, text("two")]), "image_grids": [GRID] * 2}
    row |= {"image_tokens": [codes(1), codes(2)], "image_labels": [codes(3), codes(4)]}
    row |= {"image_clean_tokens": [codes(5), codes(6)]}
    processor = tiny_processor()
    batch = NextFlowCollator(processor)([row])
    trained = (batch["labels"][batch["input_ids"] == processor.eoi_token_id] != -100).tolist()
    assert trained == [flags[0] is True, flags[1] is not False]
    assert batch["image_tokens"].tolist() == [codes(n + 1) if on else codes(n + 5) for n, on in enumerate(trained)]
    assert [label for label, on in zip(batch["image_labels"].tolist(), trained) if on] == [
        codes(n + 3) for n, on in enumerate(trained) if on
    ]


def test_rows_without_images_make_a_batch_of_text():
    row = {"messages": conversation([text("how many?")], [text("one")]), "image_tokens": [], "image_grids": []}
    assert set(NextFlowCollator(tiny_processor())([row])) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_tokens": [], "image_grids": []}, "image_tokens: the messages hold 1 images, but there are 0 here"),
        ({"image_grids": [GRID, GRID]}, "image_grids: the messages hold 1 images, but there are 2 here"),
        ({"image_tokens": [codes(0), codes(1)]}, "image_tokens: the messages hold 1 images, but there are 2 here"),
        ({"image_grids": [[4, 40]]}, "outside 1:4 to 4:1"),
    ],
)
def test_rows_whose_images_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NextFlowCollator(tiny_processor())([drawing("one", 0) | change])


@pytest.mark.parametrize("pack", [False, True])
def test_a_row_of_which_nothing_is_learned_is_refused(pack):
    silent = {"messages": conversation([text("how many?")], [text("one") | {"train": False}])}
    silent["messages"][1]["train"] = False
    for row in (silent, {"messages": silent["messages"][:1]}):
        data = [drawing("one", 1), row | {"image_tokens": [], "image_grids": []}]
        with pytest.raises(ValueError, match="messages: none of them is trained on"):
            NextFlowCollator(tiny_processor())([data] if pack else data)


# The trainer ----------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_loss_are_logged_as_the_model_tells_them(tmp_path):
    model, data = tiny_model(), rows()
    with torch.no_grad():
        expected = model(**NextFlowCollator(tiny_processor())(data))
    trainer = make_trainer(tmp_path, model, data)
    trainer.train()
    first, second, summary = trainer.state.log_history
    assert first["loss"] == pytest.approx(float(expected.loss), abs=1e-3)
    assert first["text_loss"] == pytest.approx(float(expected.text_loss), abs=1e-3)
    assert first["image_loss"] == pytest.approx(float(expected.image_loss), abs=1e-3)
    assert first["text_accuracy"] == pytest.approx(float(expected.text_accuracy), abs=1e-3)
    scales = [first[f"scale_{scale}_loss"] for scale in range(1, 5)]
    assert scales == pytest.approx(expected.scale_losses.tolist(), abs=1e-3)
    assert second["image_loss"] != first["image_loss"] and "image_loss" not in summary


def test_without_a_collator_one_is_made_from_the_processor(tmp_path):
    losses = []
    for packing in ("padding", "length"):
        options = {"packing": packing, "packing_budget": None if packing == "padding" else 200}
        args = training_arguments(tmp_path, rows(), max_steps=1, per_device_train_batch_size=1, **options)
        trainer = NextFlowTrainer(tiny_model(), args, train_dataset=rows()[:1], processing_class=tiny_processor())
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] > 0 and losses[0] == pytest.approx(losses[1], abs=1e-3)
    with pytest.raises(ValueError, match="Give processing_class, .* or data_collator"):
        NextFlowTrainer(tiny_model(), args, train_dataset=rows())


@pytest.mark.parametrize("units", ["avx512_bf16", "amx_bf16", None])
def test_bfloat16_on_a_processor_that_emulates_it_is_warned_of(units, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {units: True, "avx2": True}, raising=False)
    training_arguments(tmp_path, rows(), bf16=True)
    training_arguments(tmp_path, rows())
    warned = ["no bfloat16 units" in str(warning.message) for warning in recwarn]
    assert sum(warned) == (units is None)


def test_the_trainer_asks_for_its_own_arguments_and_packing_for_rows(tmp_path):
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="args must be NextFlowTrainingArguments, .* got TrainingArguments"):
        NextFlowTrainer(tiny_model(), plain, train_dataset=rows(), processing_class=tiny_processor())
    args = training_arguments(tmp_path, rows(), per_device_train_batch_size=1, packing="length", packing_budget=200)
    trainer = NextFlowTrainer(tiny_model(), args, processing_class=tiny_processor())
    assert trainer.evaluate(rows())["eval_loss"] > 0
    with pytest.raises(ValueError, match="requires a train_dataset"):
        trainer.train()


@pytest.mark.parametrize("packing", ["padding", "length"])
def test_a_bad_row_is_named_by_its_number(packing, tmp_path):
    data = rows() + [drawing("one", 3) | {"image_grids": None}]
    options = {"packing": packing, "packing_budget": None if packing == "padding" else 200}
    with pytest.raises(BadRowError, match="^row 2, image_grids: the messages hold 1 images"):
        make_trainer(tmp_path, tiny_model(), data, **options, per_device_train_batch_size=1, max_steps=3).train()


@pytest.mark.parametrize("muon", [False, True], ids=["AdamW", "Muon"])
def test_it_learns_two_samples_by_heart_and_leaves_the_tokenizer_alone(muon, tmp_path):
    # With so few frequencies only a small base tells neighbouring columns apart.
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 1, 1]}
    model, data = tiny_model(text_config={"rope_parameters": rope}), rows()
    before = copy.deepcopy(model.vq_model.state_dict())
    options = {"muon": muon, "max_steps": 60, "logging_steps": 60}
    trainer = make_trainer(tmp_path, model, data, **options)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == ("MuonWithAdamW" if muon else "AdamW")
    for name, value in model.vq_model.state_dict().items():
        assert torch.equal(value, before[name]), name

    metrics = trainer.evaluate(data)
    accuracies = [metrics[f"eval_{part}_accuracy"] for part in ("text", "scale_1", "scale_2", "scale_3", "scale_4")]
    assert accuracies == [1.0] * 5 and metrics["eval_image_loss"] == pytest.approx(0, abs=0.1)

    model.eval()
    processor = tiny_processor()
    inputs = processor.apply_image_prompt("a red circle")
    drawn = model.generate_images(**inputs, image_sizes=[(16, 16)], sampling=ImageSampling(temperature=0))
    assert drawn.image_tokens.tolist() == [codes(1)]
    messages = data[1]["messages"][:1]
    prompt = NextFlowCollator(processor).encode(data[1] | {"messages": messages})[0]
    prompt += processor.tokenizer("<|im_start|>assistant\n").input_ids
    answer = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        image_tokens=torch.tensor([codes(2)]),
        image_grids=torch.tensor([GRID]),
        max_new_tokens=8,
        do_sample=False,
    )
    assert processor.tokenizer.decode(answer[0, len(prompt) :], skip_special_tokens=True) == "one"


@pytest.mark.parametrize("muon", [False, True], ids=["AdamW", "Muon"])
def test_a_resumed_training_ends_with_the_same_weights(muon, tmp_path):
    data = rows() + [drawing("two blue squares", seed=3), question("one", "a green star", seed=4)]
    options = {"muon": muon, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1}

    def train(seed: int, checkpoint=None) -> dict[str, torch.Tensor]:
        model = tiny_model(seed)
        make_trainer(tmp_path, model, data, **options).train(resume_from_checkpoint=checkpoint)
        return model.state_dict()

    whole = train(seed=0)
    resumed = train(seed=1, checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Killed(BaseException):
    """Stands for a kill: no handler of the trainer catches it."""


@pytest.mark.parametrize("place", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_alone(place, tmp_path, monkeypatch):
    data = rows() + [drawing("two blue squares", seed=3)]
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}

    def kill(self, folder):
        if self.state.global_step == 4:
            raise Killed
        return whole(self, folder)

    expected = tiny_model()
    make_trainer(tmp_path / "whole", expected, data, **options).train()
    whole = getattr(NextFlowTrainer, place)
    with monkeypatch.context() as patch:
        patch.setattr(NextFlowTrainer, place, kill)
        with pytest.raises(Killed):
            make_trainer(tmp_path / "killed", tiny_model(), data, **options).train()
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = tiny_model(seed=1)
    make_trainer(tmp_path / "killed", resumed, data, **options).train(resume_from_checkpoint=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in expected.state_dict().items())
    names = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_old_checkpoints_go_and_the_best_one_stays(tmp_path, monkeypatch):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    options |= {"save_total_limit": 2, "metric_for_best_model": "image_loss", "greater_is_better": False}
    trainer = make_trainer(tmp_path, tiny_model(), rows(), **options)
    trainer.args.eval_strategy, trainer.eval_dataset = IntervalStrategy.STEPS, rows()
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: {"eval_image_loss": float(trainer.state.global_step)})
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_a_grid_of_images_is_drawn_and_changes_nothing_of_the_training(tmp_path, monkeypatch):
    def train(callbacks) -> dict[str, torch.Tensor]:
        model = tiny_model(text_config={"attention_dropout": 0.5})
        model.set_attn_implementation("eager")
        trainer = make_trainer(tmp_path, model, rows(), max_steps=2)
        for callback in callbacks:
            trainer.add_callback(callback)
        torch.manual_seed(0)
        trainer.train()
        return model.state_dict()

    shown = [{"prompt": "a red circle"}, {"prompt": "one"}]
    grid = ImageGrids(tiny_processor(), shown, every=1, num_images=3)
    without, with_grid = train([]), train([grid])
    assert all(torch.equal(value, with_grid[name]) for name, value in without.items())
    names = [f"step_0000{step}.png" for step in range(3)]
    assert sorted(path.name for path in (tmp_path / "image_grids").iterdir()) == names
    before = [path.read_bytes() for path in sorted((tmp_path / "image_grids").iterdir())]

    def full(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Image.Image, "save", full)
        train([grid])
    assert [path.read_bytes() for path in sorted((tmp_path / "image_grids").iterdir())] == before
    with pytest.raises(ValueError, match="0 rows"):
        ImageGrids(tiny_processor(), [])
    model = tiny_model()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO 3 shards the weights"):
        grid.on_step_end(None, TrainerState(global_step=1, is_world_process_zero=True), None, model=model)
