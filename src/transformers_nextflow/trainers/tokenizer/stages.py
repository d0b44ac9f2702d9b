"""The stages in which a vision tokenizer is trained (paper, section 2.1): a new one is a line of this table."""

from __future__ import annotations

from dataclasses import dataclass

from ...modeling_nextflow_vq import NextFlowVQModel


@dataclass(frozen=True)
class Stage:
    """What a stage does.

    Args:
        trains: the parts of [`NextFlowVQModel`] that are trained; `None` for all. The others rest.
        quantizes: whether images go through codes.
        after_autoencoder: whether they do so only once `autoencoder_share` of the steps is over.
        learns_codes: whether the codebooks learn: then they start from k-means, codes that nothing uses are revived,
            the semantic loss and the codebook loss count, and scales are dropped. Where codes only rest, whole images
            are decoded: such a stage polishes what is drawn, not the previews.
    """

    trains: tuple[str, ...] | None
    quantizes: bool = False
    after_autoencoder: bool = False
    learns_codes: bool = False

    def freeze(self, model: NextFlowVQModel):
        """Leaves trainable what the stage trains."""
        model.requires_grad_(self.trains is None)
        for name in self.trains or ():
            model.get_submodule(name).requires_grad_(True)

    def first_quantized_step(self, autoencoder_share: float, max_steps: int) -> int:
        return round(autoencoder_share * max_steps) if self.after_autoencoder else 0

    def starts_codebook(self, autoencoder_share: float) -> bool:
        """Whether the codebooks start anew, from k-means: not where the codes were there from the beginning, and not
        where they never come in."""
        return self.learns_codes and (not self.after_autoencoder or 0 < autoencoder_share < 1)


STAGES = {
    # The pixel branch as a plain autoencoder.
    "pixel": Stage(("pixel_encoder", "pixel_decoder")),
    # All parts: as an autoencoder at first, then through codes.
    "joint": Stage(None, quantizes=True, after_autoencoder=True, learns_codes=True),
    # Codebooks and decoders, on the latents as they are.
    "codebook": Stage(("quantizer", "pixel_decoder", "semantic_decoder"), quantizes=True, learns_codes=True),
    # The pixel decoder only, on the codes as they are.
    "decoder": Stage(("pixel_decoder",), quantizes=True),
}
