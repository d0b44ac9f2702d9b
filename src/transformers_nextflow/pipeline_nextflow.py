"""Text to picture with diffusers' habits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.utils import cached_file

from .generation_nextflow import ScaleState
from .image_processing_nextflow import OUTPUT_TYPES
from .modeling_nextflow import NextFlowForConditionalGeneration
from .processing_nextflow import NextFlowProcessor
from .sampling_nextflow import ImageSampling, PerScale
from .scale_schedule import ScaleSchedule


try:
    from diffusers import DiffusionPipeline
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise ImportError("NextFlowPipeline needs diffusers: pip install transformers-nextflow[pipelines]") from error


Images = list[Image.Image] | np.ndarray | torch.Tensor
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass
class NextFlowPipelineOutput(BaseOutput):
    """Pictures and their codes.

    Args:
        images: a list of PIL pictures, or (B, H, W, 3) numpy, or a (B, 3, H, W) tensor; floats lie in [0, 1].
        image_tokens: (B, N) codes; fewer scales than all where the drawing was interrupted.
    """

    images: Images
    image_tokens: torch.LongTensor


class NextFlowPipeline(DiffusionPipeline):
    """Draws pictures from prompts.

    >>> pipe = NextFlowPipeline.from_pretrained("checkpoints/nextflow-shapes")
    >>> pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0].save("circle.png")

    Args:
        model: transformer and vision tokenizer in one.
        processor: makes token ids of prompts, and pictures of pixels.
    """

    model_cpu_offload_seq = "model"
    _callback_tensor_inputs = ["image_tokens", "preview"]

    def __init__(self, model: NextFlowForConditionalGeneration, processor: NextFlowProcessor):
        super().__init__()
        self.register_modules(model=model, processor=processor)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> NextFlowPipeline:
        """Load what `save_pretrained` of this pipeline wrote, or a plain model folder (model and processor together).

        No code of the folder is run, so there is nothing to trust; `DiffusionPipeline.from_pretrained` is the way that
        runs a folder's `pipeline.py`.

        Args:
            pretrained_model_name_or_path: a folder or a repository of the Hub.
            model, processor: components to use in place of the folder's.
            kwargs: options of transformers' `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, …

        Raises:
            OSError: if there is no such folder, or files are missing in it.
        """
        path, hub_options = pretrained_model_name_or_path, {k: v for k, v in kwargs.items() if k in HUB_OPTIONS}
        model, processor = kwargs.pop("model", None), kwargs.pop("processor", None)
        is_model_folder = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False, **hub_options)
        if model is None:
            subfolder = "" if is_model_folder else "model"
            model = AutoModelForMultimodalLM.from_pretrained(path, subfolder=subfolder, **kwargs)
        if processor is None:
            subfolder = "" if is_model_folder else "processor"
            processor = AutoProcessor.from_pretrained(path, subfolder=subfolder, **hub_options)
        pipeline = cls(model=model, processor=processor)
        pipeline.register_to_config(_name_or_path=str(path))
        return pipeline

    def to_json_string(self) -> str:
        # Where a `pipeline.py` lies beside the index, `DiffusionPipeline` takes the class from it.
        index = json.loads(super().to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked, by `pipe._interrupt = True`, to stop after the scale at hand."""
        return self._interrupt

    def check_inputs(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        num_images_per_prompt: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        is_guided: bool,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ):
        """Raises `ValueError` for inputs that do not fit together; the processor looks at the prompts themselves."""
        if len(negative_prompts) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(negative_prompts)} negative ones; give one for each."
            )
        if not is_guided and any(negative_prompts):
            raise ValueError(
                "A negative_prompt works through guidance alone, and guidance_scale is 1 at all scales; give another "
                "guidance_scale, or no negative_prompt."
            )
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be a whole number from 1, got {num_images_per_prompt}.")
        count = len(prompts) * num_images_per_prompt
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"{len(generator)} generators came with {count} pictures ({len(prompts)} prompts, "
                f"{num_images_per_prompt} each); give one for all, or one for each picture."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs takes {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )

    def encode_prompts(
        self, prompts: str | Sequence[str], num_images_per_prompt: int = 1, allow_empty: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (B, L) on the model's device, each prompt repeated for its pictures."""
        inputs = self.processor.apply_image_prompt(prompts, allow_empty=allow_empty).to(self._execution_device)
        return tuple(
            tensor.repeat_interleave(num_images_per_prompt, dim=0)
            for tensor in (inputs["input_ids"], inputs["attention_mask"])
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: PerScale | None = None,
        guidance_ramp: bool | None = None,
        num_unguided_scales: int | None = None,
        temperature: PerScale | None = None,
        top_k: PerScale | None = None,
        top_p: PerScale | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[NextFlowPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image_tokens",),
    ) -> NextFlowPipelineOutput | tuple:
        """Draw.

        Args:
            prompt: one prompt or a list.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; default: nothing said.
            height, width: pixels; default: the square of the model's largest level.
            guidance_scale, guidance_ramp, num_unguided_scales, temperature, top_k, top_p: as in [`ImageSampling`];
                default: the checkpoint's own. Its `top_k` is switched off by the size of the codebook.
            num_images_per_prompt: pictures for each prompt, one after the other in the output.
            generator: one for all pictures, or one for each: then a picture depends on its own seed alone.
            output_type: "pil", "np" or "pt".
            return_dict: whether to return a [`NextFlowPipelineOutput`] or a tuple of the same.
            callback_on_step_end: called as `callback(pipe, step, scale, callback_kwargs)` after each scale; step and
                scale are one number here, from 0. `pipe._interrupt = True` ends the drawing with what is there. What
                the callback returns is not looked at.
            callback_on_step_end_tensor_inputs: names of what `callback_kwargs` holds: "image_tokens", the codes (B, n)
                so far; "preview", the pictures that they decode to, in the form of the output. A preview costs a
                decoding and is made only where it is asked for.

        Raises:
            ValueError: for an empty prompt, a size that no schedule draws (it names the nearest), sampling values out
                of range, and inputs that do not fit together.
        """
        # 1. Settings and checks
        sampling = self._sampling(
            guidance_scale=guidance_scale, guidance_ramp=guidance_ramp, num_unguided_scales=num_unguided_scales,
            temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip
        schedule = self._schedule(height, width)
        is_guided = sampling.is_guided(0, schedule.num_scales)
        prompts = prompt if isinstance(prompt, list | tuple) else [prompt]
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt or ""] * len(prompts)
        self.check_inputs(
            prompts, negative_prompt, num_images_per_prompt, generator, output_type, is_guided,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip

        # 2. Prompts
        input_ids, attention_mask = self.encode_prompts(prompts, num_images_per_prompt)
        negative_ids, negative_mask = None, None
        if is_guided:
            negative_ids, negative_mask = self.encode_prompts(negative_prompt, num_images_per_prompt, allow_empty=True)

        # 3. The scale loop
        self._interrupt = False
        self._onload()
        with self.progress_bar(total=schedule.num_scales) as progress_bar:

            def after_scale(model, scale: int, state: ScaleState) -> bool:
                progress_bar.update()
                if callback_on_step_end is not None:
                    wanted = self._callback_kwargs(state, callback_on_step_end_tensor_inputs, output_type)
                    callback_on_step_end(self, scale, scale, wanted)
                return not self._interrupt

            drawn = self.model.generate_images(
                input_ids,
                attention_mask,
                image_sizes=[schedule.image_size(self.model.config.vq_config.patch_size)] * len(input_ids),
                negative_input_ids=negative_ids,
                negative_attention_mask=negative_mask,
                sampling=sampling,
                generator=generator,
                callback=after_scale,
            )

        # 4. Pixels
        pixels = self.model.decode_image_tokens(drawn.image_tokens, drawn.image_grids)
        output = NextFlowPipelineOutput(self._images(pixels, output_type), drawn.image_tokens)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def _sampling(self, **given) -> ImageSampling:
        given = {name: value for name, value in given.items() if value is not None}
        return replace(self.model.default_image_sampling, **given)

    def _schedule(self, height: int | None, width: int | None) -> ScaleSchedule:
        schedules = self.model.config.vq_config.scale_schedules
        side = schedules.resolutions[-1]
        return schedules.for_size(side if height is None else height, side if width is None else width)

    def _onload(self):
        # Offloading moves a model to its device when `forward` is called, which drawing never does.
        hook = getattr(self.model, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.model)

    def _images(self, pixels: list[torch.Tensor], output_type: str) -> Images:
        images = self.processor.post_process_images(pixels, output_type)
        return {"pil": list, "np": np.stack, "pt": torch.stack}[output_type](images)

    def _callback_kwargs(self, state: ScaleState, names: Sequence[str], output_type: str) -> dict:
        make = {
            "image_tokens": lambda: torch.stack(state.image_tokens),
            "preview": lambda: self._images(state.preview(), output_type),
        }
        return {name: make[name]() for name in names}
