"""Train a small diffusion decoder for the shapes world: codes of 64 pixels a side to images of 128.

    OMP_NUM_THREADS=1 python examples/shapes/train_diffusion_decoder.py --output_dir runs/diffusion-decoder

Scenes are rendered at 128 pixels, and the tokenizer reads them at 64. They have up to twice as many objects as the
world allows, since cells without an object teach little. `--start FOLDER` starts from the weights of a decoder, and
`--resume` continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from transformers_nextflow.data import load_vision_tokenizer
from transformers_nextflow.diffusion_decoder import NextFlowDiffusionDecoder, small_decoder
from transformers_nextflow.trainers.diffusion.arguments import NextFlowDiffusionTrainingArguments
from transformers_nextflow.trainers.diffusion.diffusion_trainer import NextFlowDiffusionTrainer
from transformers_nextflow.worlds.shapes.scene import World, random_scene
from transformers_nextflow.worlds.shapes.tokenizer_suite import pixels_of


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes"
UPSAMPLING = 2
LARGE = World(canvas=UPSAMPLING * World().canvas, max_objects=2 * World().max_objects)


# The codes determine nearly all of an image, so most is learnt where there is much noise.
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


class Scenes(Dataset):
    """Random scenes without held-out pairs. An item depends only on the seed and its number."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    @property
    def settings(self) -> dict:
        return {"count": self.count, "seed": self.seed}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        return {"pixel_values": pixels_of([random_scene(rng, LARGE)], LARGE)[0]}


def make_decoder(vq_model, seed: int, start: str | None = None) -> NextFlowDiffusionDecoder:
    torch.manual_seed(seed)
    if start is not None:
        return NextFlowDiffusionDecoder.from_pretrained(start, torch_dtype=torch.float32)
    size = World().canvas
    return small_decoder(
        vq_model, channels=(32, 64, 160), upsampling=UPSAMPLING, projected_channels=32, trained_sizes=[[size, size]],
        num_inference_steps=4, scheduler=SCHEDULER,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=CHECKPOINT, help="folder of the checkpoint whose codes are decoded")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="folder of a decoder from whose weights the training starts")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    vq_model = load_vision_tokenizer(options.model)
    args = NextFlowDiffusionTrainingArguments(
        options.output_dir, max_steps=options.steps, per_device_train_batch_size=options.batch_size, seed=options.seed,
        learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=50, weight_decay=0.01,
        ema_decay=0.98, condition_dropout=0.05, logging_steps=50, save_steps=options.save_steps, save_total_limit=2,
        disable_tqdm=True,
    )  # fmt: skip
    rows = Scenes(options.steps * options.batch_size, options.seed + 1)
    trainer = NextFlowDiffusionTrainer(
        make_decoder(vq_model, options.seed, options.start), args, rows, vq_model=vq_model
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    with trainer.averaged_weights():
        copy.deepcopy(trainer.model).to(torch.bfloat16).save_pretrained(Path(options.output_dir) / "final")


if __name__ == "__main__":
    main()
