"""The head: one for text and codes, or two

In the paper (figure 9), one output head over text and codes trained better than a head for each.

Here both arms have the same two weight matrices. With one head, the softmax runs over the classes of both; with two
heads, a text position chooses only among text tokens and an image position only among codes. A quarter of the samples
is text. The losses of two heads are lower by construction, because they choose among fewer classes, so only the scores
of drawn images can be compared.
"""

import torch
from experiment import Ablation, Claim
from jobs import Budget, Cache, Point
from training import train_on_bundled_codes

from transformers_nextflow import NextFlowForConditionalGeneration


class TwoHeads(NextFlowForConditionalGeneration):
    """A model whose text positions choose only among text tokens, and whose image positions only among codes."""

    def _cross_entropy(self, hidden_states, targets, z_weight=0.0):
        losses = torch.zeros_like(targets.weights)
        correct = torch.zeros_like(targets.scales, dtype=torch.bool)
        is_code = targets.scales > 0
        for head, own, first in ((self.lm_head, ~is_code, 0), (self.visual_head, is_code, self.lm_head.out_features)):
            logits, classes = head(hidden_states[own]).float(), targets.classes[own] - first
            losses[own] = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
            correct[own] = logits.argmax(-1) == classes
        return (losses * targets.weights).sum(), losses, correct


def run(seed: int, budget: Budget, cache: Cache, heads: int) -> list[Point]:
    model_class = {1: NextFlowForConditionalGeneration, 2: TwoHeads}[heads]
    return train_on_bundled_codes(seed, budget, cache, text_share=0.25, model_class=model_class)


ABLATION = Ablation(
    name="heads",
    arms={"one head": {"heads": 1}, "two heads": {"heads": 2}},
    run=run,
    scores={
        "exact_drawing": "drawn exactly",
        "drawing": "drawn right",
        "code_loss": "loss of a code",
        "text_loss": "loss of a word",
    },
    claims=(Claim("drawing", "one head", "two heads", "above"),),
)


if __name__ == "__main__":
    ABLATION.main(__doc__)
