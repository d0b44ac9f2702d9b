"""Self-correction: share of the tokens

Paper (section 3.1, figure 10): with self-correction on all samples, 60% of the tokens of each scale are drawn among
their nearest codes; that came out best.

Here: 0, 30, 60 and 100% of the tokens, drawn among the nearest four codes, with residual features. Drawings are sampled
from the model's own probabilities; losses are on held-out images with the nearest codes.
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
