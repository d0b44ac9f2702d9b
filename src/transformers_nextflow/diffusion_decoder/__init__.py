"""The optional diffusion decoder (paper, section 2.4), on diffusers: the extra `pipelines`."""

try:
    import diffusers  # noqa: F401  (so that the error names the extra)
except ImportError as error:
    raise ImportError("The diffusion decoder needs diffusers: pip install transformers-nextflow[pipelines]") from error

from .bases import BASES, PromptEmbeddings
from .condition import code_condition, condition_fingerprint
from .decoding import decode_codes
from .initialization import decoder_on_base, small_decoder
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder
from .settings import DiffusionSettings


__all__ = [
    "BASES",
    "DiffusionSettings",
    "NextFlowDiffusionDecoder",
    "PromptEmbeddings",
    "code_condition",
    "condition_fingerprint",
    "decode_codes",
    "decoder_on_base",
    "small_decoder",
]
