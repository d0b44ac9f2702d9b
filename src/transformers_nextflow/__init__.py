"""NextFlow for transformers and diffusers: one transformer that writes text token by token and draws scale by scale."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# Not from the top level: transformers 5.17 exports it there only if torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from .generation.interleaved import InterleavedGenerationOutput, InterleavedStreamer, Segment
from .generation.region_editing import KeptRegion
from .generation.sampling import ImageSampling
from .generation.scale_loop import ImageGenerationOutput, ScaleState
from .image_processing_nextflow import NextFlowImageProcessor
from .modeling_nextflow import NextFlowForConditionalGeneration, NextFlowModel
from .modeling_nextflow_vq import NextFlowVQModel
from .onecat.configuration_onecat import BitwiseVQConfig, OneCatConfig
from .onecat.generation_onecat import BitwiseEditingSampling, BitwiseImageSampling
from .onecat.image_processing_onecat import OneCatImageProcessor
from .onecat.modeling_bitwise_vq import BitwiseVQModel
from .onecat.modeling_onecat import OneCatForConditionalGeneration
from .onecat.processing_onecat import OneCatProcessor
from .processing_nextflow import NextFlowProcessor
from .scale_schedule import ScaleSchedule, ScaleSchedules
from .tokenflow_t2i.configuration_tokenflow_t2i import TokenFlowT2IConfig
from .tokenflow_t2i.generation_tokenflow_t2i import RefinedImageSampling
from .tokenflow_t2i.modeling_tokenflow_t2i import TokenFlowT2IForConditionalGeneration
from .tokenflow_t2i.processing_tokenflow_t2i import TokenFlowT2IProcessor
from .utils.version import __version__ as __version__
from .vision_tokenizer.multiscale_quantizer import SelfCorrection


if TYPE_CHECKING:
    from .diffusion_decoder import NextFlowDiffusionDecoder
    from .pipeline_nextflow import NextFlowPipeline, NextFlowPipelineOutput

__all__ = [
    "BitwiseEditingSampling",
    "BitwiseImageSampling",
    "BitwiseVQConfig",
    "BitwiseVQModel",
    "ImageGenerationOutput",
    "InterleavedGenerationOutput",
    "InterleavedStreamer",
    "KeptRegion",
    "Segment",
    "ImageSampling",
    "NextFlowConfig",
    "NextFlowForConditionalGeneration",
    "NextFlowImageProcessor",
    "NextFlowModel",
    "NextFlowProcessor",
    "NextFlowVQConfig",
    "NextFlowVQModel",
    "OneCatConfig",
    "OneCatForConditionalGeneration",
    "OneCatImageProcessor",
    "OneCatProcessor",
    "RefinedImageSampling",
    "ScaleSchedule",
    "ScaleSchedules",
    "ScaleState",
    "SelfCorrection",
    "TokenFlowT2IConfig",
    "TokenFlowT2IForConditionalGeneration",
    "TokenFlowT2IProcessor",
]
# Names that need an extra; `from transformers_nextflow import *` works without it.
if find_spec("diffusers"):
    __all__ += ["NextFlowDiffusionDecoder", "NextFlowPipeline", "NextFlowPipelineOutput"]

AutoConfig.register("nextflow", NextFlowConfig, exist_ok=True)
AutoConfig.register("nextflow_vq", NextFlowVQConfig, exist_ok=True)
AutoModel.register(NextFlowConfig, NextFlowModel, exist_ok=True)
AutoModel.register(NextFlowVQConfig, NextFlowVQModel, exist_ok=True)
AutoModelForCausalLM.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
AutoProcessor.register(NextFlowConfig, NextFlowProcessor, exist_ok=True)

AutoConfig.register("tokenflow_t2i", TokenFlowT2IConfig, exist_ok=True)
AutoModel.register(TokenFlowT2IConfig, TokenFlowT2IForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(TokenFlowT2IConfig, TokenFlowT2IForConditionalGeneration, exist_ok=True)
AutoProcessor.register(TokenFlowT2IConfig, TokenFlowT2IProcessor, exist_ok=True)

AutoConfig.register("onecat", OneCatConfig, exist_ok=True)
AutoConfig.register("bitwise_vq", BitwiseVQConfig, exist_ok=True)
AutoModel.register(OneCatConfig, OneCatForConditionalGeneration, exist_ok=True)
AutoModel.register(BitwiseVQConfig, BitwiseVQModel, exist_ok=True)
AutoModelForImageTextToText.register(OneCatConfig, OneCatForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(OneCatConfig, OneCatForConditionalGeneration, exist_ok=True)
AutoProcessor.register(OneCatConfig, OneCatProcessor, exist_ok=True)

# The processor on PIL is registered for torchvision too: codes must not depend on which packages are installed.
for _config, _image_processor in (
    (NextFlowConfig, NextFlowImageProcessor),
    (TokenFlowT2IConfig, NextFlowImageProcessor),
    (OneCatConfig, OneCatImageProcessor),
):
    _backends = dict.fromkeys(("pil", "torchvision"), _image_processor)
    AutoImageProcessor.register(_config, image_processor_classes=_backends, exist_ok=True)


def __getattr__(name: str):
    # The pipeline and the diffusion decoder need the extra diffusers, so they are imported only on access.
    if name in ("NextFlowPipeline", "NextFlowPipelineOutput"):
        return getattr(import_module(".pipeline_nextflow", __name__), name)
    if name == "NextFlowDiffusionDecoder":
        return import_module(".diffusion_decoder", __name__).NextFlowDiffusionDecoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
