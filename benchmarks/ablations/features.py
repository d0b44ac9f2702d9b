"""Input features: residual or accumulated, with and without self-correction

In the paper (section 2.2, figure 10), a scale reads only the codes of the scale before it ("residual" features). With
"accumulated" features it reads the sum over all earlier scales, as in VAR. With accumulated features, self-correction
made training worse; with residual features, it made training much better.

Here both kinds of features are trained without and with self-correction. Without it, each scale reads the nearest
codes; with it ("corrected"), 60% of the codes of each scale are sampled among the nearest four. Images are sampled from
the model's own probabilities, so errors accumulate as they do in use. Losses are measured on held-out images with the
nearest codes.
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
