"""NextFlow for transformers and diffusers: one transformer that writes text token by token and draws scale by scale."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# Not from the top level: transformers 5.17 shows it there only beside torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_nextflow import NextFlowConfig, NextFlowVQConfig
from .generation.image_codes import ScaleState
from .generation.interleaved import InterleavedGenerationOutput, InterleavedStreamer, Segment
from .generation.region_editing import KeptRegion
from .generation.sampling import ImageSampling
from .generation_nextflow import ImageGenerationOutput
from .image_processing_nextflow import NextFlowImageProcessorPil
from .modeling_nextflow import NextFlowForConditionalGeneration, NextFlowModel
from .modeling_nextflow_vq import NextFlowVQModel
from .processing_nextflow import NextFlowProcessor
from .scale_schedule import ScaleSchedule, ScaleSchedules
from .tokenflow_t2i.configuration_tokenflow_t2i import TokenFlowT2IConfig
from .tokenflow_t2i.generation_tokenflow_t2i import RefinedImageSampling
from .tokenflow_t2i.modeling_tokenflow_t2i import TokenFlowT2IForConditionalGeneration
from .tokenflow_t2i.processing_tokenflow_t2i import TokenFlowT2IProcessor
from .vision_tokenizer.multiscale_quantizer import SelfCorrection


__version__ = "0.1.0"

__all__ = [
    "ImageGenerationOutput",
    "InterleavedGenerationOutput",
    "InterleavedStreamer",
    "KeptRegion",
    "Segment",
    "ImageSampling",
    "NextFlowConfig",
    "NextFlowDiffusionDecoder",
    "NextFlowForConditionalGeneration",
    "NextFlowImageProcessorPil",
    "NextFlowModel",
    "NextFlowPipeline",
    "NextFlowProcessor",
    "NextFlowVQConfig",
    "NextFlowVQModel",
    "RefinedImageSampling",
    "ScaleSchedule",
    "ScaleSchedules",
    "ScaleState",
    "SelfCorrection",
    "TokenFlowT2IConfig",
    "TokenFlowT2IForConditionalGeneration",
    "TokenFlowT2IProcessor",
]

AutoConfig.register("nextflow", NextFlowConfig, exist_ok=True)
AutoConfig.register("nextflow_vq", NextFlowVQConfig, exist_ok=True)
AutoModel.register(NextFlowConfig, NextFlowModel, exist_ok=True)
AutoModel.register(NextFlowVQConfig, NextFlowVQModel, exist_ok=True)
AutoModelForImageTextToText.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
AutoProcessor.register(NextFlowConfig, NextFlowProcessor, exist_ok=True)
AutoImageProcessor.register(NextFlowConfig, image_processor_classes={"pil": NextFlowImageProcessorPil}, exist_ok=True)

AutoConfig.register("tokenflow_t2i", TokenFlowT2IConfig, exist_ok=True)
AutoModel.register(TokenFlowT2IConfig, TokenFlowT2IForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(TokenFlowT2IConfig, TokenFlowT2IForConditionalGeneration, exist_ok=True)
AutoProcessor.register(TokenFlowT2IConfig, TokenFlowT2IProcessor, exist_ok=True)
AutoImageProcessor.register(
    TokenFlowT2IConfig, image_processor_classes={"pil": NextFlowImageProcessorPil}, exist_ok=True
)


def __getattr__(name: str):
    # The pipeline and the diffusion decoder need diffusers, an extra: they are imported when they are asked for.
    if name == "NextFlowDiffusionDecoder":
        try:
            from .diffusion_decoder import NextFlowDiffusionDecoder
        except ImportError as error:
            needed = "NextFlowDiffusionDecoder needs diffusers: pip install transformers-nextflow[pipelines]"
            raise ImportError(needed) from error
        return NextFlowDiffusionDecoder
    if name == "NextFlowPipeline":
        from .pipeline_nextflow import NextFlowPipeline

        return NextFlowPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
