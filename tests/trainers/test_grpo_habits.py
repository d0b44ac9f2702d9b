"""What a user of TRL types: names of models, conversations for prompts."""

import pytest
import torch
from tiny import tiny_model, tiny_processor


pytest.importorskip("trl")

from datasets import Dataset, IterableDataset  # noqa: E402
from test_grpo import PROMPTS, TEXTS, low_codes, make_trainer  # noqa: E402

from transformers_nextflow import NextFlowPipeline  # noqa: E402
from transformers_nextflow.trainers import NextFlowGRPOTrainer  # noqa: E402


def weights(trainer):
    trainer.train()
    return trainer.model.state_dict()


def test_a_name_of_a_checkpoint_trains_as_its_model_does(tmp_path):
    NextFlowPipeline(tiny_model(), tiny_processor()).save_pretrained(tmp_path / "model")
    args = make_trainer(tmp_path / "one").args
    args.num_prefix_scales = 3
    named = NextFlowGRPOTrainer(str(tmp_path / "model"), low_codes, args, train_dataset=Dataset.from_list(PROMPTS))
    trained = weights(named)  # before the other one is made, which seeds anew
    for name, weight in weights(make_trainer(tmp_path / "two")).items():
        assert torch.equal(weight, trained[name]), name


@pytest.mark.parametrize("streamed", [False, True])
def test_conversations_of_one_turn_train_as_their_texts(streamed, tmp_path):
    parts = [text if number % 2 else [{"type": "text", "text": text}] for number, text in enumerate(TEXTS)]
    rows = [{"prompt": [{"role": "user", "content": part}]} for part in parts]
    if streamed:
        conversations = IterableDataset.from_generator(lambda: iter(rows))
        texts = IterableDataset.from_generator(lambda: iter(PROMPTS))
    else:
        # Arrow has one type for a column.
        texts = PROMPTS
        conversations = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in TEXTS])
    trained = weights(make_trainer(tmp_path / "one", rows=conversations))
    for name, weight in weights(make_trainer(tmp_path / "two", rows=texts)).items():
        assert torch.equal(weight, trained[name]), name


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a circle"}],
        [{"role": "assistant", "content": "a circle"}],
    ],
    ids=["two turns", "no user"],
)
def test_other_conversations_are_refused(prompt, tmp_path):
    with pytest.raises(ValueError, match="one turn of a user"):
        make_trainer(tmp_path, rows=Dataset.from_list([{"prompt": prompt}] * 4))
