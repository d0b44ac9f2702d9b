"""Input features on the paper's kind of tokenizer: residual or accumulated, with and without self-correction

In the paper (section 2.2, figure 10), a scale reads only the codes of the scale before it ("residual" features). With
"accumulated" features it reads the sum over all earlier scales, as in VAR. With accumulated features, self-correction
made training worse; with residual features, it made training much better. The tokenizer of the shapes world cannot test
this claim, because it is unusual: it lists the objects before it lays them out on grids.

Here the same four arms are trained on the codes of the emoji checkpoint. Its tokenizer is of the paper's kind, with two
branches, area interpolation down, bicubic interpolation up, and grids of 1 2 3 4 6 8 cells a side. The images show one
of 100 things in one of three styles on a plain background. With self-correction, 60% of the codes of each scale are
sampled among the nearest ten. Images are sampled from the model's own probabilities. A judge, a small network, reads
them: "thing drawn" is the share of prompts whose image shows the thing, "drawn right" the share that has everything
that was asked for.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from experiment import Ablation, Claim
from jobs import Budget, Cache, Point
from training import BATCH_SIZE, DATA_SEED, Curve, small_config, train
from transformers import AutoProcessor

from transformers_nextflow import (
    ImageSampling,
    NextFlowForConditionalGeneration,
    NextFlowVQModel,
    SelfCorrection,
)
from transformers_nextflow.data import tokenizer_fingerprint
from transformers_nextflow.evaluation.image_metrics import generator_of, to_uint8
from transformers_nextflow.worlds.emoji import Art, World, held_out_cases, training_case
from transformers_nextflow.worlds.emoji.cases import Case
from transformers_nextflow.worlds.emoji.judge import Judge
from transformers_nextflow.worlds.score_tables import metric_table


ROOT = Path(__file__).parents[2]
MODEL, PROCESSOR = (ROOT / "checkpoints" / "nextflow-emoji" / part for part in ("model", "processor"))
# Written by `examples/emoji/make_art.py` and `train_judge.py`; see `benchmarks/README.md`.
ART, JUDGE = ROOT / "runs" / "emoji" / "art.zip", ROOT / "runs" / "emoji" / "medium" / "judge"
CORRECTION_TOP_K = 10
HELD_OUT_ROWS = 256


def recipe():
    """Imports `examples/emoji/make_data.py` under another name, since the shapes recipe has a `make_data` too."""
    folder = ROOT / "examples" / "emoji"
    sys.path.insert(0, str(folder))  # the script imports modules of its own folder
    spec = importlib.util.spec_from_file_location("emoji_make_data", folder / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


DATA = recipe()


@torch.no_grad()
def rows_of(cases: list[Case], vq_model: NextFlowVQModel, scenes_of: World, correction_share: float = 0.0) -> Dataset:
    """Makes rows with codes; in each scale a share `correction_share` of the codes that are read is sampled."""
    correction = SelfCorrection(CORRECTION_TOP_K, correction_share) if correction_share else None
    exchanges = [[case.exchange] for case in cases]
    scenes = [scene for one in exchanges for scene, _ in DATA.images_in(one)]
    codes = iter(DATA.encode_scenes(vq_model, scenes, scenes_of, correction, torch.Generator().manual_seed(DATA_SEED)))
    rows = [DATA.row(one, [next(codes) for _ in DATA.images_in(one)], scenes_of, None) for one in exchanges]
    return Dataset.from_list(rows, features=DATA.FEATURES)


class EmojiCurve(Curve):
    """Scores at every evaluation; the judge scores the drawn images."""

    def __init__(self, processor, world: World, budget: Budget, seed: int):
        self.processor, self.world, self.seed, self.points = processor, world, seed, []
        self.judge = Judge.load(JUDGE)
        self.cases = held_out_cases("drawing", world, 6 * budget.prompts)

    def image_size(self) -> tuple[int, int]:
        return self.world.side, self.world.side

    @torch.no_grad()
    def drawing_scores(self, model: NextFlowForConditionalGeneration) -> dict[str, float]:
        """Returns `drawing`, the share that is right in everything, and `concept`, the share with the right concept."""
        results = []
        for start in range(0, len(self.cases), BATCH_SIZE):
            cases = self.cases[start : start + BATCH_SIZE]
            output = model.generate_images(
                **self.processor.apply_image_prompt([case.asked[0] for case in cases]),
                image_sizes=[self.image_size()] * len(cases),
                sampling=ImageSampling(),
                generator=[generator_of(self.seed, start + i) for i in range(len(cases))],
            )
            images = to_uint8(torch.stack(model.decode_image_tokens(output.image_tokens, output.image_grids)))
            scores = (case.score((scene,), self.world) for case, scene in zip(cases, self.judge.read(list(images))))
            results += [("all", {"right": s["right"], "concept": s["concept"]}) for s in scores]
        table = metric_table(results)
        return {"drawing": table["overall"], "concept": table["overall_concept"]}


def run(
    seed: int, budget: Budget, cache: Cache, correction_share: float = 0.0, accumulate_features: bool = False
) -> list[Point]:
    """Returns the curve of a small model; the rows are the same for all seeds."""
    scenes_of = World.load(JUDGE / "world.json", Art(ART))
    trained = NextFlowForConditionalGeneration.from_pretrained(MODEL)
    vq_model = trained.vq_model.eval()
    count = BATCH_SIZE * budget.steps

    def make(folder: Path):
        rng = np.random.default_rng(DATA_SEED)
        cases = [training_case(rng, scenes_of, "drawing") for _ in range(count)]
        rows_of(cases, vq_model, scenes_of, correction_share).save_to_disk(folder)

    data = {"count": count, "correction_share": correction_share, "tokenizer": tokenizer_fingerprint(vq_model)}
    rows = load_from_disk(cache.folder("emoji-rows", data, make))
    held_out = rows_of(held_out_cases("drawing", scenes_of, HELD_OUT_ROWS, seed=1), vq_model, scenes_of)
    processor = AutoProcessor.from_pretrained(PROCESSOR)
    config = small_config(trained.config, accumulate_features=accumulate_features)
    torch.manual_seed(seed)
    model = NextFlowForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.load_vision_tokenizer(vq_model)
    curve = EmojiCurve(processor, scenes_of, budget, seed)
    return train(model, processor, scenes_of, rows, held_out, seed, budget, curve)


ABLATION = Ablation(
    name="emoji_features",
    arms={
        "residual": {"correction_share": 0.0},
        "residual, corrected": {"correction_share": 0.6},
        "accumulated": {"correction_share": 0.0, "accumulate_features": True},
        "accumulated, corrected": {"correction_share": 0.6, "accumulate_features": True},
    },
    run=run,
    scores={"concept": "thing drawn", "drawing": "drawn right", "code_loss": "loss of a code"},
    claims=(
        Claim("concept", "residual, corrected", "residual", "above"),
        Claim("concept", "accumulated, corrected", "accumulated", "below"),
        Claim("concept", "residual, corrected", "accumulated, corrected", "above"),
    ),
    steps=600,
)


if __name__ == "__main__":
    ABLATION.main(__doc__)
