"""What `transformers-nextflow evaluate --suite NAME` scores."""

from ..utils.registry import Registry


# Each is `evaluate(checkpoint, limit=None, seeds=4, sheets=None, device=None)`, which scores the checkpoint of a folder
# and gives suite → category → score. `limit` is how many cases of each kind are asked at most (`None`: the suite's own
# number), `seeds` how many images are drawn for each prompt, and `sheets` a folder for contact sheets, if any.
SUITES = Registry(
    "suite",
    {
        "shapes": "transformers_nextflow.worlds.shapes.evaluation:evaluate_shapes",
        "emoji": "transformers_nextflow.worlds.emoji.evaluation:evaluate_emoji",
    },
)
