"""Self-correction: share of the tokens

In the paper (section 3.1, figure 10), self-correction on all samples works best when 60% of the tokens of each scale
are sampled among their nearest codes.

Here the shares are 0, 30, 60 and 100% of the tokens, sampled among the nearest four codes, with residual features.
Images are sampled from the model's own probabilities. Losses are measured on held-out images with the nearest codes.
"""

from experiment import Ablation, Claim
from training import train_on_bundled_codes


ABLATION = Ablation(
    name="correction",
    arms={f"{share}%": {"correction_share": share / 100} for share in (0, 30, 60, 100)},
    run=train_on_bundled_codes,
    scores={"exact_drawing": "drawn exactly", "drawing": "drawn right", "code_loss": "loss of a code"},
    claims=tuple(Claim("drawing", "60%", other, "above") for other in ("0%", "30%", "100%")),
)


if __name__ == "__main__":
    ABLATION.main(__doc__)
