"""Train the shapes world's transformer on two cores, or on a GPU.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/shapes/train_transformer.py \
        --tokenizer runs/tokenizer/final --data runs/data --output_dir runs/model
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoProcessor, Qwen2_5_VLTextConfig

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowVQModel
from transformers_nextflow.trainers import NextFlowCollator, NextFlowTrainer, NextFlowTrainingArguments


def model_config(vq_model: NextFlowVQModel, processor) -> NextFlowConfig:
    text_config = Qwen2_5_VLTextConfig(
        vocab_size=-(-len(processor.tokenizer) // 8) * 8,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        # With sections of one, rows, columns and scales each get high and low frequencies. In so small a head, three
        # blocks would leave only the lowest ones for the columns.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1] * 16},
        bos_token_id=None,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return NextFlowConfig(
        text_config=text_config,
        vq_config=vq_model.config,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
        read_last_scale=processor.read_last_scale,
        rope_range=8.0,
    )


@torch.no_grad()
def take_over(model: NextFlowForConditionalGeneration, processor, folder: str):
    """Loads the weights of another run; text tokens are matched by their spelling, since vocabularies differ."""
    source = NextFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    rows = AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    state, own = source.state_dict(), model.state_dict()
    for name in {name for name in own if name.endswith(("embed_tokens.weight", "lm_head.weight"))}:
        words = own[name].clone()
        for word, row in processor.tokenizer.get_vocab().items():
            if word in rows:
                words[row] = state[name][rows[word]]
        state[name] = words
    model.load_state_dict(state)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=32, help="samples of each process in a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument(
        "--decay_share", type=float, default=0.4, help="share of the steps in which the learning rate falls to 0"
    )
    parser.add_argument("--model", help="start from the weights of this run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--bf16", action="store_true", help="train in bfloat16, three times as fast on a processor with bfloat16 units"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that prepare batches; with 0 a GPU waits for them"
    )
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    processor = AutoProcessor.from_pretrained(Path(arguments.data) / "processor")
    vq_model = NextFlowVQModel.from_pretrained(arguments.tokenizer, dtype=torch.float32)
    # On a CPU the plain products are faster for heads of 32 channels.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    model = NextFlowForConditionalGeneration._from_config(
        model_config(vq_model, processor), attn_implementation=attention
    )
    model.load_vision_tokenizer(vq_model)
    if arguments.model:
        take_over(model, processor, arguments.model)
    dataset = load_from_disk(arguments.data)
    args = NextFlowTrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": round(arguments.decay_share * arguments.steps),
            "decay_type": "linear",
            "min_lr_ratio": 0.0,
        },
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        muon=True,
        compile_layers=arguments.compile,
        bf16=arguments.bf16,
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=arguments.workers,
        dataloader_persistent_workers=arguments.workers > 0,
        logging_steps=50,
        save_steps=1000,
        save_total_limit=2,
        seed=arguments.seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if "RANK" in os.environ and not torch.cuda.is_available() else None,
        report_to=[],
    )
    collator = NextFlowCollator(processor, pad_to_multiple_of=8)
    trainer = NextFlowTrainer(model, args, train_dataset=dataset, data_collator=collator, processing_class=processor)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model()


if __name__ == "__main__":
    main()
