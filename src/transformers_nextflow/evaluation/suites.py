"""The evaluation suites that `transformers-nextflow evaluate --suite NAME` runs."""

from ..utils.registry import Registry


# A suite is a function `evaluate(checkpoint, limit=None, seeds=4, sheets=None, device=None)` that scores the checkpoint
# in a folder and returns suite → category → score. `limit` is the largest number of cases of each kind (`None`: the
# suite's own), `seeds` how many images are drawn for each prompt, and `sheets` a folder for contact sheets or `None`.
SUITES = Registry(
    "suite",
    {
        "shapes": "transformers_nextflow.worlds.shapes.evaluation:evaluate_shapes",
        "emoji": "transformers_nextflow.worlds.emoji.evaluation:evaluate_emoji",
    },
)
