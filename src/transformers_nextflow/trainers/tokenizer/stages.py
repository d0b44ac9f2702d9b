"""The stages in which a vision tokenizer is trained (paper, section 2.1): a new one is an entry of `STAGES`."""

from __future__ import annotations

from dataclasses import dataclass

from ...modeling_nextflow_vq import NextFlowVQModel


@dataclass(frozen=True)
class Stage:
    """A stage of the tokenizer's training.

    Args:
        trains: the parts of [`NextFlowVQModel`] that are trained; `None` for all. The others are frozen.
        quantizes: whether images are quantised.
        after_autoencoder: whether they are quantised only after a share `autoencoder_share` of the steps.
        learns_codes: whether the codebooks are trained: then they start from k-means, unused codes are revived, the
            semantic loss and the codebook loss count, and scales are dropped. With frozen codes all scales are decoded:
            such a stage improves finished images, not previews.
    """

    trains: tuple[str, ...] | None
    quantizes: bool = False
    after_autoencoder: bool = False
    learns_codes: bool = False

    def freeze(self, model: NextFlowVQModel):
        """Makes only the parts trainable that the stage trains."""
        model.requires_grad_(self.trains is None)
        for name in self.trains or ():
            model.get_submodule(name).requires_grad_(True)

    def first_quantized_step(self, autoencoder_share: float, max_steps: int) -> int:
        """The step from which on images are quantised, and at which k-means starts the codebooks."""
        return round(autoencoder_share * max_steps) if self.after_autoencoder else 0

    def starts_codebook(self, autoencoder_share: float) -> bool:
        """Whether the codebooks start from k-means: not if codes are used from the first step on, and not if codes are
        never used.
        """
        return self.learns_codes and (not self.after_autoencoder or 0 < autoencoder_share < 1)


STAGES = {
    # The pixel branch as a plain autoencoder.
    "pixel": Stage(("pixel_encoder", "pixel_decoder")),
    # All parts: first as an autoencoder, then with codes.
    "joint": Stage(None, quantizes=True, after_autoencoder=True, learns_codes=True),
    # Codebooks and decoders; the encoders are frozen.
    "codebook": Stage(("quantizer", "pixel_decoder", "semantic_decoder"), quantizes=True, learns_codes=True),
    # Only the pixel decoder; encoders and codes are frozen.
    "decoder": Stage(("pixel_decoder",), quantizes=True),
}
