"""Input features: residual or accumulated, with and without self-correction

Paper (section 2.2, figure 10): a scale reads the codes of the scale before it alone ("residual"). Summed over all
earlier scales, as VAR reads them, they made training with self-correction worse than without it; residual features made
it much better.

Here: both kinds of features, each with the nearest codes and with 60% of the codes of each scale drawn among the
nearest four. Drawings are sampled from the model's own probabilities, so that errors accumulate as they do in use;
losses are on held-out images with the nearest codes.
"""

from experiment import Ablation, Claim
from training import train_on_bundled_codes


ABLATION = Ablation(
    name="features",
    arms={
        "residual": {"correction_share": 0.0},
        "residual, corrected": {"correction_share": 0.6},
        "accumulated": {"correction_share": 0.0, "accumulate_features": True},
        "accumulated, corrected": {"correction_share": 0.6, "accumulate_features": True},
    },
    run=train_on_bundled_codes,
    scores={"exact_drawing": "drawn exactly", "drawing": "drawn right", "code_loss": "loss of a code"},
    claims=(
        Claim("drawing", "residual, corrected", "residual", "above"),
        Claim("drawing", "accumulated, corrected", "accumulated", "below"),
        Claim("drawing", "residual, corrected", "accumulated, corrected", "above"),
    ),
)


if __name__ == "__main__":
    ABLATION.main(__doc__)
