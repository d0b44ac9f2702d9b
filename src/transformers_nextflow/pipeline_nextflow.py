"""The pipeline for images, videos and conversations, with the conventions of diffusers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self, cast

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from .generation.likelihood import score_answers
from .generation.region_editing import KeptRegion
from .generation.sampling import ImageSampling, PerScale, check_generators
from .generation.scale_loop import ImageGenerationOutput
from .image_processing_nextflow import OUTPUT_TYPES
from .modeling_nextflow import NextFlowForConditionalGeneration
from .pipelines.auto_pipelines import AutoPipelinesMixin
from .pipelines.calls import CALLBACK_KWARGS, PipelineCallsMixin
from .pipelines.conversations import ConversationMixin
from .pipelines.decoding import DecodingMixin, decoder_provenance, generators_of_rows, load_diffusion_decoder, seeds_of
from .pipelines.loras import LoraMixin
from .pipelines.notebook_display import ScalePreviews
from .pipelines.out_of_domain_warnings import OutOfDomainWarningsMixin
from .pipelines.requests import ImageInput, ImageRequest, check_options, checked_scores
from .processing_nextflow import NextFlowProcessor
from .sequence.padding import pad_codes
from .utils.atomic_files import atomic_folder_write, check_path
from .utils.checkpoint_checks import loading_errors
from .utils.devices import usable_device
from .utils.folder_parts import holds, load_model, load_part
from .utils.known_names import checks_names
from .utils.model_cards import CARD, upload_card_if_missing
from .utils.offloading import check_holds_weights
from .utils.saved_adapters import FOLDER as ADAPTERS
from .utils.saved_adapters import HUB_OPTIONS, is_adapted, unwrap_peft, with_adapters_beside
from .utils.short_repr import short_repr
from .utils.typed_values import is_of_type
from .utils.user_warnings import warn_user


try:
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    from .diffusion_decoder import NextFlowDiffusionDecoder
    from .pipelines.outputs import NextFlowPipelineOutput
except ImportError as error:
    raise ImportError("NextFlowPipeline needs diffusers: pip install transformers-nextflow[pipelines]") from error


CandidateScorer = Callable[["NextFlowPipeline", torch.Tensor, torch.Tensor, list[str]], Sequence[float] | torch.Tensor]
# The code in a saved folder that `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` runs.
PIPELINE_FILE = """\
# The package must be installed: pip install transformers-nextflow[pipelines]
from transformers_nextflow.pipeline_nextflow import NextFlowPipeline  # noqa: F401
"""


def caption_scorer(pipe: NextFlowPipeline, image_tokens, image_grids, prompts: list[str]) -> torch.Tensor:
    """How likely the model finds each prompt as the description of its image, (B,) per token."""
    requests = [pipe.processor.caption_request] * len(prompts)
    scores = score_answers(pipe.unwrapped_model, pipe.processor, image_tokens, image_grids, requests, prompts)
    return scores.text / scores.num_text_tokens


def dtype_of(component: str, dtype):
    """The part of a component, of the model or the diffusion decoder, in a `dtype` that names components."""
    for one in dtype.values() if isinstance(dtype, dict) else [dtype]:
        known = getattr(torch, one, None) if isinstance(one, str) else one
        if one not in (None, "auto") and not isinstance(known, torch.dtype):
            raise ValueError(f"dtype must be a type of torch, such as torch.bfloat16, got {short_repr(one)}.")
    if not isinstance(dtype, dict):
        return dtype
    if unknown := sorted(dtype.keys() - {"model", "processor", "diffusion_decoder", "default"}):
        raise ValueError(f"A dict of dtype names model, processor, diffusion_decoder or default, got {unknown[0]!r}.")
    return dtype.get(component, dtype.get("default", torch.float32))


class NextFlowPipeline(
    AutoPipelinesMixin,
    ConversationMixin,
    DecodingMixin,
    LoraMixin,
    OutOfDomainWarningsMixin,
    PipelineCallsMixin,
    DiffusionPipeline,
):
    """Draws images from prompts and from other images, videos, and answers in text and images.

    >>> pipe = NextFlowPipeline.from_pretrained("checkpoints/nextflow-shapes")
    >>> circle = pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0]
    >>> pipe("make the red circle blue", image=circle).images[0].save("blue.png")

    `video` draws videos, `chat` continues a conversation, `score` says how well images and prompts fit.

    Args:
        model: transformer and vision tokenizer in one.
        processor: turns prompts into token ids, and pixel values into images.
        diffusion_decoder: decodes images if a call has `decoder="diffusion"`; not used by default, as in the paper.

    Raises:
        ValueError: for a processor that does not fit the model, or the diffusion decoder of another tokenizer; the
            message names what differs.
    """

    model_cpu_offload_seq = "model->diffusion_decoder"
    _optional_components = ["diffusion_decoder"]
    # The largest number of images of one call, all in one batch; more would fill the memory.
    max_batch_size = 1024
    _callback_tensor_inputs = list(CALLBACK_KWARGS)

    def __init__(
        self,
        model: NextFlowForConditionalGeneration,
        processor: NextFlowProcessor,
        diffusion_decoder: NextFlowDiffusionDecoder | None = None,
    ):
        super().__init__()
        own = unwrap_peft(model)  # raises for kinds of adapters that do not support drawing
        for name, part, method in (("model", own, "generate_images"), ("processor", processor, "drawing_inputs")):
            if not hasattr(part, method):
                raise ValueError(
                    f"{name} must be one of a NextFlow, or of a model that draws like it, got {type(part)}."
                )
        if hasattr(processor, "check_fits"):
            processor.check_fits(own.config)
        self.check_diffusion_decoder(diffusion_decoder, own)
        self.register_modules(model=model, processor=processor, diffusion_decoder=diffusion_decoder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> Self:
        """Load a folder written by `save_pretrained` of this pipeline, or a model folder (model and processor
        together), or the folder of an adapter, whose base model is loaded with it.

        No code in the folder is run; only `DiffusionPipeline.from_pretrained` runs a folder's `pipeline.py`.

        Args:
            pretrained_model_name_or_path: a folder or a repository of the Hub.
            model, processor: components to use in place of the folder's.
            diffusion_decoder: a diffusion decoder, or its folder or repository; default: that in the folder, if there
                is one.
            kwargs: options of transformers' `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, … As in
                diffusers, `dtype` may be a dict with a dtype for "model" or "default", and `quantization_config` a
                `PipelineQuantizationConfig` for "model".

        Raises:
            OSError: if there is no such folder, or files are missing in it.
            ValueError: for a `subfolder`, or a `dtype` of a component that does not exist.
        """
        if not isinstance(pretrained_model_name_or_path, str | os.PathLike):
            raise ValueError(
                f"A pipeline is loaded from a folder or a repository of the Hub, got "
                f"{short_repr(pretrained_model_name_or_path)}."
            )
        if "subfolder" in kwargs:
            raise ValueError(f"A pipeline has no subfolder of its own, got {kwargs['subfolder']!r}; load its parts.")
        if isinstance(kwargs.get("quantization_config"), PipelineQuantizationConfig):
            mapping = kwargs.pop("quantization_config")
            chosen = mapping._resolve_quant_config(is_diffusers=False, module_name="model")
            kwargs |= {} if chosen is None else {"quantization_config": chosen}
        if "torch_dtype" in kwargs:  # diffusers' name, of which transformers warns
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        asked = kwargs.get("dtype")
        kwargs |= {"dtype": dtype_of("model", asked)} if "dtype" in kwargs else {}
        path, hub_options = pretrained_model_name_or_path, {k: v for k, v in kwargs.items() if k in HUB_OPTIONS}
        model, processor = kwargs.pop("model", None), kwargs.pop("processor", None)
        diffusion_decoder = kwargs.pop("diffusion_decoder", None)
        with loading_errors(path):
            if model is None:
                model = load_model(AutoModelForMultimodalLM, path, **kwargs)
            if processor is None:
                processor = load_part(AutoProcessor, "processor", path, **hub_options)
            decoder_options = {"dtype": dtype_of("diffusion_decoder", asked), "device": model.device}
            if isinstance(diffusion_decoder, str | os.PathLike):
                diffusion_decoder = load_diffusion_decoder(diffusion_decoder, **decoder_options)
            elif diffusion_decoder is None and holds(path, "diffusion_decoder/config.json", **hub_options):
                options = hub_options | {"subfolder": "diffusion_decoder"} | decoder_options
                diffusion_decoder = load_diffusion_decoder(path, **options)
            pipeline = cls(model=model, processor=processor, diffusion_decoder=diffusion_decoder)
        pipeline.register_to_config(_name_or_path=str(path))
        return pipeline

    def save_pretrained(self, save_directory, **kwargs):
        """Write model and processor, and the `pipeline.py` through which `DiffusionPipeline` finds this class.

        Adapters of PEFT, in the model itself or in a `PeftModel` around it, are saved beside the model's full weights.
        Loading the folder restores them, with the same adapters active and with the same weights.

        Args:
            save_directory: a folder.
            kwargs: options of `DiffusionPipeline.save_pretrained`, such as `push_to_hub`.

        Raises:
            ValueError: for adapters that are merged into weights and not unloaded, for those of a quantised model, and
                for weights that are offloaded one by one.
        """
        check_path(save_directory)
        pipeline, model = self, self.unwrapped_model
        if not hasattr(model, "hf_device_map"):  # with one, transformers saves what is offloaded
            check_holds_weights(model, "save_pretrained")
        if kwargs.get("push_to_hub"):
            upload_card_if_missing(self, kwargs.get("repo_id", os.path.basename(save_directory)), kwargs.get("token"))
        has_card = os.path.exists(os.path.join(save_directory, CARD))
        if is_adapted(model):
            pipeline = copy.copy(self)
            pipeline.model = with_adapters_beside(model)
        with atomic_folder_write(save_directory, replaced=[f"model/{ADAPTERS}"]) as folder:
            # First, so that they are there when the folder is uploaded.
            (folder / "pipeline.py").write_text(PIPELINE_FILE)
            if not has_card:
                self.write_model_card(folder)
            DiffusionPipeline.save_pretrained(pipeline, str(folder), **kwargs)

    def to(self, *args, **kwargs) -> Self:
        """As in diffusers. Raises `ValueError` for a device that cannot be used, and for a dtype that is no float."""
        for dtype in (one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)):
            if not dtype.is_floating_point:
                raise ValueError(f"The weights cannot be {dtype}; use torch.float32, torch.bfloat16 or torch.float16.")
        places = [one for one in (*args, *kwargs.values()) if not isinstance(one, torch.dtype | bool | None)]
        with usable_device(places[0] if places else "cpu"):
            super().to(*args, **kwargs)
        self._place_scales()
        return self

    def write_model_card(self, folder):
        """Write the model card of the pipeline to a folder, as `model.write_model_card` does for the model."""
        self.unwrapped_model.write_model_card(folder, library_name="diffusers", pipeline_tag="text-to-image")

    def to_json_string(self) -> str:
        # Where a `pipeline.py` lies beside the index, `DiffusionPipeline` takes the class from it.
        index = json.loads(super().to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def unwrapped_model(self) -> NextFlowForConditionalGeneration:
        """The model without a wrapper of PEFT around it; its adapters are inside of it and still act."""
        return unwrap_peft(self.model)

    def check_inputs(
        self,
        request: ImageRequest,
        sampling: ImageSampling,
        num_images_per_prompt: int,
        num_candidates: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ):
        """Raises `ValueError` for inputs that do not fit together; the processor checks the prompts themselves."""
        counts = [schedule.num_scales for schedule in request.schedules]
        contexts = sampling.contexts(counts)
        if any(request.negative_prompts) and not contexts:
            raise ValueError(
                "A negative_prompt works only through guidance, and guidance_scale is 1 at all scales; give another "
                "guidance_scale, or no negative_prompt."
            )
        if request.images is None and "unconditional" in contexts:
            raise ValueError("image_guidance_scale leads towards input images; give image=, or leave it at 1.")
        for name, value in (("num_images_per_prompt", num_images_per_prompt), ("num_candidates", num_candidates)):
            if not is_of_type(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {short_repr(value)}.")
        if request.regions is not None and not self.unwrapped_model.draws_in_regions:
            raise ValueError(
                f"{type(self.unwrapped_model).__name__} does not draw inside of masks; leave mask_image out, and say "
                "in the prompt what is to change."
            )
        count = num_images_per_prompt * num_candidates
        self.check_batch_size(len(request.prompts) * count)
        check_generators(generator, len(request.prompts) * count)
        if (kept := request.num_kept_scales) is not None and count > 1:
            if not all(any(sampling.is_sampled_at(scale, n) for scale in range(kept, n)) for n in counts):
                raise ValueError(
                    f"The {count} variations of a prompt would be one image: num_kept_scales={kept} leaves no scale "
                    "that is drawn with chance. Keep fewer scales, or give a temperature above 0."
                )
        if output_type not in (*OUTPUT_TYPES, "latent"):
            raise ValueError(f"output_type must be one of {(*OUTPUT_TYPES, 'latent')}, got {output_type!r}.")
        if output_type in ("np", "pt") and len(set(request.schedules)) > 1:
            raise ValueError(
                f"Images of different sizes cannot be one array; use output_type='pil', not {output_type!r}."
            )
        wanted = callback_on_step_end_tensor_inputs
        if not isinstance(wanted, list | tuple) or not all(name in self._callback_tensor_inputs for name in wanted):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is a list of {self._callback_tensor_inputs}, got {wanted!r}."
            )

    def enable_vae_slicing(self):
        """Does nothing: batches are always decoded in parts, as large as memory allows."""

    def enable_vae_tiling(self):
        """Does nothing: large images are always decoded in stripes, with the same pixels as whole."""

    def disable_vae_slicing(self):
        """Nothing to switch off, see `enable_vae_slicing`: the pixels are the same in parts."""

    def disable_vae_tiling(self):
        """Nothing to switch off, see `enable_vae_tiling`: the pixels are the same by stripes."""

    def check_batch_size(self, count: int):
        """Raises `ValueError` for more images in one batch than the attribute `max_batch_size`."""
        if count > self.max_batch_size:
            raise ValueError(
                f"{count} images would be drawn in one batch, which takes memory for all at once; draw at most "
                f"{self.max_batch_size} in a call, or set max_batch_size of the pipeline."
            )

    def _check_reads(self, purpose: str):
        """Raises `ValueError` if the model can only draw, as TokenFlow-t2i."""
        if not hasattr(self.processor, "caption_request"):
            raise ValueError(f"{purpose} takes a model that reads images; {type(self.model).__name__} only draws.")

    @property
    def interleaves(self) -> bool:
        """Whether the model continues a sequence after an image that it has drawn, which OneCAT does not: `video`,
        `score`, thoughts, and images in chats take such a model.
        """
        return hasattr(self.unwrapped_model, "generate_interleaved")

    def _check_interleaves(self, purpose: str):
        """Raises `ValueError` if the model cannot continue a sequence after an image that it has drawn."""
        self._check_reads(purpose)
        if not self.interleaves:
            raise ValueError(
                f"{purpose} takes a model that reads what it draws; {type(self.unwrapped_model).__name__} draws, edits "
                "and answers in separate calls."
            )

    @checks_names
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: ImageInput | list[ImageInput] | list[list[ImageInput]] | None = None,
        mask_image: ImageInput | list[ImageInput] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: PerScale | None = None,
        image_guidance_scale: PerScale | None = None,
        guidance_ramp: bool | None = None,
        num_unguided_scales: int | None = None,
        temperature: PerScale | None = None,
        top_k: PerScale | None = None,
        top_p: PerScale | None = None,
        num_kept_scales: int | None = None,
        paste_back: bool = False,
        decoder: str = "pixel",
        decoder_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        think: bool = False,
        max_thought_tokens: int = 128,
        thought_temperature: float = 0.0,
        num_images_per_prompt: int = 1,
        num_candidates: int = 1,
        candidate_scorer: CandidateScorer | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        preview: bool = False,
        callback_on_step_end: Callable[[NextFlowPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("image_tokens",),
    ) -> NextFlowPipelineOutput:
        """Generate images from prompts, and from input images if there are any.

        Args:
            prompt: one prompt or a list; with `image` the instruction.
            image: images that the prompt refers to. With one prompt one image or a list; with a list of prompts a
                list that holds for each prompt one image or a list.
            mask_image: for each prompt a mask of the size of its image, light where to draw; the prompt must have
                exactly one image. Outside of the mask each scale takes the codes nearest to the residual of the image.
            negative_prompt: what guidance steers away from, one for all or one for each prompt; default: the empty
                prompt.
            height, width: pixels; default: the size of the prompt's last image, or the square of the model's largest
                level.
            guidance_scale, image_guidance_scale, guidance_ramp, num_unguided_scales, temperature, top_k, top_p: as in
                [`ImageSampling`]; default: the checkpoint's own, which differ where there is an `image`. A `top_k` of
                the codebook's size switches the checkpoint's off.
            num_kept_scales: draw a variation of `image`: its first n scales are kept and the others are sampled again.
                The image is then not a part of the prompt. With fewer scales the variations differ more; several
                variations that cannot differ are an error, and variations that turn out the same raise a warning.
            paste_back: with `mask_image`, put the image's own pixels back outside of the mask.
            decoder: "pixel", the tokenizer's own, or "diffusion", the pipeline's `diffusion_decoder`, which is sharper
                but may change the image. Its images are `upsampling` times as large; previews are not.
            decoder_steps, decoder_guidance_scale: settings of the diffusion decoder; default: its own.
            think: write a thought (reasoning in text) first, and draw from it.
            max_thought_tokens: the largest length of the thought.
            thought_temperature: above 0 thoughts are sampled, so several images of one prompt have different thoughts.
            num_images_per_prompt: images for each prompt, one after the other in the output.
            num_candidates: how many candidates are drawn for each image, of which the best is kept; if the call is
                interrupted, the first.
            candidate_scorer: `scorer(pipe, image_tokens, image_grids, prompts)` gives a score for each image; the
                highest is the best. Default: the likelihood of the prompt as a description of the image.
            generator: one for all images, or one for each, candidates included; then an image depends only on its own
                seed.
            output_type: "pil", "np", "pt"; or "latent": the codes, which `model.decode_image_tokens` turns into pixels.
            return_dict: whether to return a [`NextFlowPipelineOutput`] or a tuple of its entries.
            preview: keep the image after each scale (`previews` of the output), and show it growing in a notebook.
            callback_on_step_end: called as `callback(pipe, step, scale, callback_kwargs)` after each scale; step and
                scale are the same number, counted from 0. A dict that it returns may hold other "image_tokens", which
                the next scale reads. `pipe._interrupt = True` ends the drawing with the scales so far.
            callback_on_step_end_tensor_inputs: names of the entries of `callback_kwargs`: "image_tokens", the codes (B,
                n) so far; "preview", the images decoded from them, in the form of the output. A preview takes the time
                of a decoding and is made only if it is named here.

        Raises:
            ValueError: for an empty prompt, a size that no schedule has (the message names the nearest), sampling
                values out of range, `think` with a model that was not trained to think, and inputs that do not fit
                together.
        """
        # 1. Settings and checks
        request = ImageRequest.build(
            self.processor, prompt, negative_prompt, image, mask_image, (height, width), num_kept_scales, think,
            paste_back,
        )  # fmt: skip
        sampling = self._sampling(
            request.images is not None,
            guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale, guidance_ramp=guidance_ramp,
            num_unguided_scales=num_unguided_scales, temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip
        self.check_inputs(
            request, sampling, num_images_per_prompt, num_candidates, generator, output_type,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        check_options(
            think, max_thought_tokens, thought_temperature,
            {"paste_back": paste_back, "preview": preview, "return_dict": return_dict},
            candidate_scorer=candidate_scorer, callback_on_step_end=callback_on_step_end,
        )  # fmt: skip
        settings = self._diffusion_settings(decoder, decoder_steps, decoder_guidance_scale, request.schedules)
        if output_type == "latent" and (settings is not None or paste_back):
            given = "paste_back" if settings is None else "decoder"
            raise ValueError(f"output_type='latent' gives codes, which are not decoded; leave out {given}.")
        self.check_hooks()
        self._warn_of_request(request)
        if num_candidates > 1 and candidate_scorer is None:
            self._check_interleaves("To rank candidates without a candidate_scorer")
        request, seeds = request.repeat(num_images_per_prompt * num_candidates), seeds_of(generator)

        scale_previews = ScalePreviews() if preview else None
        with self._call():
            # 2. The scale loop
            with self.progress_bar(total=max(schedule.num_scales for schedule in request.schedules)) as progress_bar:
                after_scale = self._after_scale(
                    progress_bar, scale_previews, callback_on_step_end, callback_on_step_end_tensor_inputs, output_type
                )
                options = {"sampling": sampling, "generator": generator, "callback": after_scale}
                answer = self.processor.think_prefix if think else None
                inputs, thoughts = self._drawing_inputs(request, sampling, answer), None
                if think:
                    sampled, thoughts = self._think(request, inputs, max_thought_tokens, thought_temperature, options)
                else:
                    sampled = self.model.generate_images(**inputs, **options)

            # 3. The best candidates
            rows, scores = self._best_candidates(sampled, request, num_candidates, candidate_scorer)
            image_tokens, grids, request = sampled.image_tokens[rows], sampled.image_grids[rows], request.select(rows)
            thoughts = None if thoughts is None else [thoughts[index] for index in rows]
            if num_kept_scales is not None and not self.interrupt:
                self._warn_of_duplicates(request, image_tokens, num_images_per_prompt)

            # 4. Pixels
            images, flags = image_tokens, None
            if output_type != "latent":
                pixels = self._decoded(
                    image_tokens, grids, settings, generators_of_rows(generator, rows), request.prompts
                )
                if paste_back:
                    pixels = self._paste_back_pixels(request, pixels)
                pixels, flags = self._checked(pixels)
                images = self._images(pixels, output_type)
            if output_type == "pil":
                provenance = {"num_kept_scales": num_kept_scales} | decoder_provenance(settings)
                provenance["changed_rows"] = self._calls()[-1].changed_rows
                images = self._with_provenance(images, rows, seeds, sampling, image_tokens, grids, **provenance)
            previews = None if scale_previews is None else [scale_previews.rows[row] for row in rows]
            output = NextFlowPipelineOutput(images, image_tokens, thoughts, scores, flags, previews)
        # Annotated without the tuple, which few calls want, so that editors and type checkers know the fields.
        return output if return_dict else cast(NextFlowPipelineOutput, output.to_tuple())

    def _best_candidates(
        self, sampled: ImageGenerationOutput, request: ImageRequest, count: int, scorer: CandidateScorer | None
    ) -> tuple[list[int], torch.Tensor | None]:
        """For each group of `count` images the row of the best, and the scores (B, count) if they were asked for."""
        first = list(range(0, len(sampled.image_tokens), count))
        if count == 1 or self.interrupt:
            return first, None
        scores = (scorer or caption_scorer)(self, sampled.image_tokens, sampled.image_grids, request.prompts)
        scores = checked_scores(scores, len(sampled.image_tokens)).view(-1, count)
        return [start + best for start, best in zip(first, scores.argmax(1).tolist())], scores

    def _drawing_inputs(self, request: ImageRequest, sampling: ImageSampling, answer: str | None = None) -> dict:
        """Arguments of `generate_images`; or, with an `answer` that begins with text, of `generate_interleaved`."""
        device, patch_size = self.model.device, self.processor.image_processor.patch_size
        start = {} if answer is None else {"answer": answer}
        contexts = sampling.contexts([schedule.num_scales for schedule in request.schedules])
        inputs = self.processor.drawing_inputs(
            request.prompts, request.negative_prompts, request.images, contexts, request.schedules, **start
        )
        inputs = {name: value.to(device) for name, value in inputs.items()}
        inputs["image_sizes"] = [schedule.image_size(patch_size) for schedule in request.schedules]
        if "image_grids" in inputs and request.pixels is None:
            self._warn_of_images(self._images_of(inputs["pixel_values"], inputs["image_grids"]))
        if request.pixels is not None:
            pixels = [pixels.to(device) for pixels in request.pixels]
            if request.num_kept_scales is not None:
                codes = [
                    codes[: schedule.offsets[request.num_kept_scales]]
                    for codes, schedule in zip(self._own_codes(request), request.schedules)
                ]
                inputs["given_image_tokens"] = pad_codes(codes)
            self._warn_of_images(pixels)
            if request.regions is not None:
                regions = [region.to(device) for region in request.regions]
                inputs["region"] = KeptRegion(self.model.vq_model, pixels, regions)
        return inputs

    def _own_codes(self, request: ImageRequest) -> list[torch.Tensor]:
        """The codes (N,) of the images that are partly kept."""
        encode, device = self.model.vq_model.encode, self._execution_device
        return [encode(pixels[None].to(device)).image_tokens[0] for pixels in request.pixels]

    def _warn_of_duplicates(self, request: ImageRequest, image_tokens: torch.Tensor, count: int):
        """Warn of prompts whose `count` variations are all the same, or whose only one is the image itself."""
        first = image_tokens[::count] if count > 1 else self._own_codes(request)
        for number, (codes, other) in enumerate(zip(image_tokens.unflatten(0, (-1, count)), first)):
            if bool((codes[:, : len(other)] == other).all()):
                found = f"All {count} variations" if count > 1 else "The variation"
                same = "are the same image" if count > 1 else "is the image itself"
                warn_user(
                    f"{found} for prompt {number} {same}: the first {request.num_kept_scales} scales, which are kept, "
                    "leave little to chance. Keep fewer scales, give a higher temperature, or use another seed.",
                )

    def _think(
        self, request: ImageRequest, inputs: dict, max_thought_tokens: int, temperature: float, options: dict
    ) -> tuple[ImageGenerationOutput, list[str]]:
        """Write a thought, then draw an image, on one cache; returns the images and the thoughts."""
        output = self.model.generate_interleaved(
            **inputs, **options, min_images=1, max_images=1, max_new_tokens=max_thought_tokens, do_sample=True,
            temperature=temperature,
        )  # fmt: skip
        thoughts, images = [], []
        for ids, pieces in zip(output.input_ids, output.segments):
            number = next(index for index, piece in enumerate(pieces) if piece.image is not None)
            written = [token for piece in pieces[:number] for token in ids[piece.start : piece.stop].tolist()]
            thoughts.append(self.processor.decode(written, skip_special_tokens=True).strip())
            images.append(pieces[number].image)
        return ImageGenerationOutput(output.image_tokens[images], output.image_grids[images]), thoughts

    def _sampling(self, after_images: bool, **given) -> ImageSampling:
        given = {name: value for name, value in given.items() if value is not None}
        own = self.model.default_editing_sampling if after_images else self.model.default_image_sampling
        return replace(own, **given)
