"""Videos, conversations and scores of the pipeline; a video or a conversation runs on one cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from PIL import Image
from transformers import GenerationConfig

from ..diffusion_decoder.settings import DiffusionSettings
from ..generation.cached_sequences import Prompts
from ..generation.interleaved import InterleavedStreamer
from ..generation.likelihood import score_answers, score_images
from ..generation.sampling import Generators, ImageSampling, PerScale, check_generators
from ..generation.scale_loop import ImageCodes, ScaleCallback, ScaleState, check_drawing
from ..generation_nextflow import TEXT_TYPES, InterleavedGenerationOutput
from ..processing_nextflow import check_prompts
from ..sequence.chat_encoding import encode_text
from ..sequence.messages import check_conversation
from ..utils.evaluation_mode import evaluation_mode
from ..utils.known_names import check_names, checks_names
from ..utils.short_repr import short_repr
from ..utils.typed_values import check_types, is_of_type
from .decoding import Seeds, decoder_provenance, generators_of_rows, resized_like, seeds_of
from .notebook_display import video_as_html
from .out_of_domain_warnings import texts_of_messages
from .requests import ImageInput, ImageRequest, pixels_of_size, requested_schedule


@dataclass
class NextFlowVideoOutput:
    """Videos.

    Args:
        frames: for each video its images, all of one size; a given first frame is included, as the model read it. If
            the call was interrupted, there are fewer, and the last one has only its first scales.
        transitions: for each video the texts between its frames.
    """

    frames: list[list[Image.Image]]
    transitions: list[list[str]]

    def _repr_html_(self) -> str:
        pairs = zip(self.frames, self.transitions)
        return "".join(video_as_html(frames, "; ".join(texts)) for frames, texts in pairs)


@dataclass(frozen=True)
class NextFlowScores:
    """How well images and prompts fit, (B,) each, in nats over all tokens.

    Args:
        image_given_text: log-likelihood of the image's codes after the prompt.
        text_given_image: log-likelihood of the prompt as the description of the image.
    """

    image_given_text: torch.Tensor
    text_given_image: torch.Tensor


MAX_FRAMES = 1024
# The settings that `video` takes.
SAMPLING_NAMES = [f.name for f in fields(ImageSampling)]
VIDEO_NAMES = (
    "prompt", "image", "num_frames", "negative_prompt", "height", "width", "generator", "decoder", "decoder_steps",
    "decoder_guidance_scale",
)  # fmt: skip


class ConversationMixin:
    """`video`, `chat` and `score` of [`NextFlowPipeline`]."""

    @torch.no_grad()
    def video(
        self,
        prompt: str | list[str] | list[list[str]],
        image: ImageInput | list[ImageInput] | None = None,
        num_frames: int | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        max_transition_tokens: int = 32,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoder: str = "pixel",
        decoder_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        **sampling: PerScale | None,
    ) -> NextFlowVideoOutput:
        """Draw videos frame by frame, each after all earlier frames and a text of what changes (paper, section 5.4).

        Args:
            prompt: a prompt, or a list with one for each video; the model then writes the texts between frames. Or a
                list for each video: its prompt, then what changes before the second frame, the third, and so on.
            image: the first frame, which keeps its size; or a list with one for each prompt of a list. Default: the
                first frame is drawn too.
            num_frames: number of frames of a video, with a given first frame; default: the length of a list of texts.
            negative_prompt: what guidance steers away from at every frame.
            height, width: size in pixels if no first frame is given; default: the square of the model's largest level.
            max_transition_tokens: the largest length of a text between frames; a video has at most `num_frames` times
                as many tokens of text.
            generator: one for all videos, or one for each.
            decoder, decoder_steps, decoder_guidance_scale: as in `__call__`. A given first frame is enlarged to the
                size of the others.
            sampling: values of [`ImageSampling`] in place of the checkpoint's own for edits.

        Raises:
            ValueError: if the number of texts differs from that of the frames, if prompts and lists of texts are mixed,
                and for all that `__call__` refuses.
        """
        self._check_interleaves("video")
        check_names(sampling, [*VIDEO_NAMES, *SAMPLING_NAMES], "NextFlowPipeline.video")
        check_types({"max_transition_tokens": max_transition_tokens}, {"max_transition_tokens": int}, "video")
        if max_transition_tokens < 0:
            raise ValueError(f"max_transition_tokens must be at least 0, got {max_transition_tokens}.")
        scripts = _scripts(prompt, num_frames)
        is_scripted = not isinstance(prompt, str) and isinstance(prompt[0], list | tuple)
        prompts = [script[0] for script in scripts]
        if image is not None and len(prompts) == 1 and not isinstance(image, list | tuple):
            image = [image]
        if image is None and sampling.get("image_guidance_scale") is None:
            sampling["image_guidance_scale"] = 1.0  # there is no input image, so the setting for edits does not apply
        # All frames but the first are drawn after others.
        sampling, size = self._sampling(True, **sampling), (height, width)
        request = ImageRequest.build(self.processor, prompts, negative_prompt, image, None, size, None, False, False)
        self.check_inputs(request, sampling, 1, 1, generator, "pil", ())
        settings = self._diffusion_settings(decoder, decoder_steps, decoder_guidance_scale, request.schedules)
        self.check_hooks()
        self._warn_of_request(request)
        self._warn_of_texts([text for script in scripts for text in script])
        seeds = seeds_of(generator)
        with self._call():
            given = 0 if image is None else 1
            if given:
                firsts = _first_frames(self.processor, request)
            # After a given frame the answer begins with the text of what changes.
            inputs = self._drawing_inputs(request, sampling, "" if given else None)
            length = num_frames or len(scripts[0])
            scales = max(schedule.num_scales for schedule in request.schedules)
            with self.progress_bar(total=(length - given) * scales) as progress_bar:

                def after_scale(model, scale: int, state: ScaleState) -> bool:
                    progress_bar.update()
                    return not self.interrupt

                options = {"sampling": sampling, "generator": generator, "callback": after_scale}
                if is_scripted:
                    finished = self._draw_script(scripts, given, inputs, request, **options)
                else:
                    finished = self.model.generate_interleaved(
                        **inputs, **options, min_images=length - given, max_images=length - given,
                        max_new_tokens=max_transition_tokens * num_frames,
                    )  # fmt: skip
            length = len(finished.image_grids) // len(scripts)  # fewer if the call was interrupted
            rows = [row for row in range(len(scripts)) for _ in range(length)]
            noise, texts = generators_of_rows(generator, rows), [prompts[row] for row in rows]
            pixels = self._decoded(finished.image_tokens, finished.image_grids, settings, noise, texts)
            images = self.processor.post_process_images(self._checked(pixels)[0])
            drawn = (finished.image_tokens, finished.image_grids)
            images = iter(self._with_provenance(images, rows, seeds, sampling, *drawn, **decoder_provenance(settings)))
            videos = [[next(images) for _ in range(length)] for _ in scripts]
            if given:
                videos = [[resized_like(first, video[1]), *video[1:]] for first, video in zip(firsts, videos)]
            written = [script[1:length] for script in scripts]
            transitions = written if is_scripted else self._texts_between(finished, given)
        return NextFlowVideoOutput(videos, transitions)

    def _draw_script(self, scripts, given: int, inputs: dict, request, sampling, generator, callback) -> Prompts:
        """Frames with given texts between them."""
        tokenizer, boi = self.processor.tokenizer, self.processor.boi_token_id
        read_last = self.processor.read_last_scale
        texts = [[encode_text(tokenizer, text) for text in script[1:]] for script in scripts]
        # The prompts of videos without a first frame end with its <boi>.
        max_new_positions = [
            sum(len(text) for text in row) + schedule.num_positions(read_last) * (len(row) + 1 - given) - 1 + given
            for row, schedule in zip(texts, request.schedules)
        ]
        with evaluation_mode(self.model):
            writer = self.model.sequence_writer(
                *(Prompts.from_inputs(inputs, prefix) for prefix in ("", "negative_", "unconditional_")),
                schedules=request.schedules,
                sampling=sampling,
                max_new_positions=max_new_positions,
                pixel_values=inputs.get("pixel_values"),
            )
            for frame in range(given, len(scripts[0])):
                if frame > 0:
                    writer.append([[*row[frame - 1], boi] for row in texts])
                drawing = ImageCodes(self.unwrapped_model, request.schedules, sampling, generator)
                writer.draw(drawing, range(len(scripts)), callback)
                if self.interrupt:
                    break
        return writer.finished()

    def _texts_between(self, output: InterleavedGenerationOutput, given: int) -> list[list[str]]:
        """For each row the texts before its images, without the text before the first frame of a video."""
        texts = []
        for ids, pieces in zip(output.input_ids, output.segments):
            row, text = [], ""
            for piece in pieces:
                if piece.image is None:
                    text = self.processor.decode(ids[piece.start : piece.stop], skip_special_tokens=True).strip()
                else:
                    row.append(text)
                    text = ""
            texts.append(row if given else row[1:])
        return texts

    @torch.no_grad()
    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        max_new_tokens: int | None = None,
        min_images: int = 0,
        max_images: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        streamer: InterleavedStreamer | None = None,
        sampling: ImageSampling | None = None,
        decoder: str = "pixel",
        decoder_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        return_finish_reasons: bool = False,
        **kwargs,
    ) -> dict | list[dict]:
        """Answer a conversation, or a batch of them, with text, images or both.

        >>> message = pipe.chat([{"role": "user", "content": [{"type": "text", "text": "draw a red circle."}]}])
        >>> message["content"]
        [{"type": "image", "image": <PIL.Image.Image …>}]

        Args:
            messages: messages in chat format; the parts of a message have the type "text", "image" or "video" (read
                frame by frame). The message that this method returns can be appended.
            max_new_tokens, min_images, max_images, generator, streamer, kwargs: as in `generate_interleaved`; the
                default of `max_images` is 1. A model without that method, such as OneCAT, answers with text:
                `max_new_tokens`, `streamer` and `kwargs` are then those of transformers' `generate`, and nothing else
                is taken.
            height, width: size in pixels of drawn images; default: as in `generate_interleaved`; if only one is given,
                the other is that of the largest square.
            sampling: settings of images, without an `image_guidance_scale`; default: the checkpoint's own.
            decoder, decoder_steps, decoder_guidance_scale: as in `__call__`.
            return_finish_reasons: also return why each answer ended: "stop" at its own end or at a stop string,
                "length" at `max_new_tokens`, or "interrupted".

        Returns:
            The assistant's message, or a list of them; with `return_finish_reasons` a pair of it and its reason, or of
            both lists.

        Raises:
            ValueError: for messages that the chat template refuses, and for all that `generate_interleaved` refuses.
        """
        self._check_reads("chat")
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(
                f"messages must be a list of messages, or a list of such lists, got {short_repr(messages)}."
            )
        check_types({"return_finish_reasons": return_finish_reasons}, {"return_finish_reasons": bool}, "chat")
        if not self.interleaves:
            drawing = {"min_images": min_images or None, "max_images": max_images or None, "height": height}
            drawing |= {"width": width, "generator": generator, "sampling": sampling}
            if given := [name for name, value in drawing.items() if value is not None]:
                raise ValueError(
                    f"{type(self.unwrapped_model).__name__} answers with text, and does not take {', '.join(given)} in "
                    "a chat; call the pipeline to draw or edit."
                )
            max_images = 0
        max_images = 1 if max_images is None else max_images
        if not is_of_type(max_images, int) or not is_of_type(min_images, int):
            raise ValueError(f"min_images and max_images must be whole numbers, got {min_images!r} and {max_images!r}.")
        # Guidance compares with a prompt without text and without images.
        if sampling is not None and not isinstance(sampling, ImageSampling):
            raise ValueError(f"sampling must be an ImageSampling, got {short_repr(sampling)}.")
        if sampling is None:
            sampling = replace(self.model.default_image_sampling, image_guidance_scale=1.0)
        elif sampling.image_guidance_scale != 1:
            raise ValueError("chat has no image_guidance_scale; leave it at 1, or edit by calling the pipeline.")
        settings = self._diffusion_settings(decoder, decoder_steps, decoder_guidance_scale)
        self.check_hooks()
        is_batch = isinstance(messages[0], list | tuple)
        conversations = messages if is_batch else [messages]
        for number, conversation in enumerate(conversations):
            check_conversation(conversation, f"messages[{number}]" if is_batch else "messages")
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        inputs, sizes = dict(inputs), {}
        if max_images > 0:
            negative = self.processor.apply_image_prompt([""] * len(conversations), allow_empty=True)
            inputs |= {f"negative_{name}": value for name, value in negative.items()}
        if height is not None or width is not None:
            schedule = requested_schedule(self.processor, (height, width), None)
            size = schedule.image_size(self.processor.image_processor.patch_size)
            sizes = {"image_sizes": [size] * len(conversations)}
        texts = [text for conversation in conversations for text in texts_of_messages(conversation)]
        self._warn_of_texts(texts, sizes.get("image_sizes", ()))
        with self._call():
            check_generators(generator, len(conversations))
            seeds = seeds_of(generator)
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            if not self.interleaves:
                answers, reasons = self._generate_text(inputs, max_new_tokens, streamer, kwargs)
            else:
                if "pixel_values" in inputs:
                    self._warn_of_images(self._images_of(inputs["pixel_values"], inputs["image_grids"]))
                output = self.model.generate_interleaved(
                    **inputs, **sizes, max_new_tokens=max_new_tokens, min_images=min_images, max_images=max_images,
                    sampling=sampling, generator=generator, streamer=streamer, tokenizer=self.processor.tokenizer,
                    callback=self._unless_interrupted(kwargs.pop("callback", None)), **kwargs,
                )  # fmt: skip
                rows, reasons = range(len(conversations)), output.finish_reasons
                answers = [self._message(output, row, settings, generator, seeds, sampling) for row in rows]
        if not is_batch:
            [answers], [reasons] = answers, reasons
        # Annotated without the tuple, which few calls want.
        return cast(dict, (answers, reasons)) if return_finish_reasons else answers

    def _unless_interrupted(self, callback: ScaleCallback | None) -> ScaleCallback:
        """A callback that also ends the drawing if the call is asked to stop."""
        check_drawing(None, callback)

        def after_scale(model, scale: int, state: ScaleState) -> bool:
            return (callback is None or callback(model, scale, state) is not False) and not self.interrupt

        return after_scale

    def _generate_text(
        self, inputs: dict, max_new_tokens: int | None, streamer: InterleavedStreamer | None, options: dict
    ) -> tuple[list[dict], list[str]]:
        """The assistant's messages of a model that answers only with text, and why they ended."""
        options = options if max_new_tokens is None else options | {"max_new_tokens": max_new_tokens}
        _check_text_options(options, inputs)
        if streamer is not None:
            streamer.skip_prompt = True  # `generate` passes the prompt to it as well
            options = options | {"streamer": streamer}
        written = self.model.generate(**inputs, **options, tokenizer=self.processor.tokenizer)
        written = written[:, inputs["input_ids"].shape[1] :]
        configs = (options.get("generation_config"), self.unwrapped_model.generation_config)

        def setting(name: str) -> list:
            given = (options.get(name), *(getattr(config, name, None) for config in configs))
            value = next((value for value in given if value is not None), [])
            return list(value) if isinstance(value, list | tuple) else [value]

        ends, stops, answers, reasons = setting("eos_token_id"), setting("stop_strings"), [], []
        for ids in written:
            text = self.processor.decode(ids, skip_special_tokens=True)
            is_ended = any(token in ends for token in ids.tolist()) or any(stop in text for stop in stops)
            answers.append({"role": "assistant", "content": [{"type": "text", "text": text.strip()}]})
            reasons.append("stop" if is_ended else "length")
        return answers, reasons

    def _message(
        self,
        output: InterleavedGenerationOutput,
        row: int,
        settings: DiffusionSettings | None,
        generator: Generators,
        seeds: Seeds,
        sampling: ImageSampling,
    ) -> dict:
        content = []
        for piece in output.segments[row]:
            if piece.image is None:
                ids = output.input_ids[row, piece.start : piece.stop]
                text = self.processor.decode(ids, skip_special_tokens=True)
                if text:
                    content.append({"type": "text", "text": text})
            else:
                chosen = [piece.image]
                tokens_and_grids = output.image_tokens[chosen], output.image_grids[chosen]
                pixels = self._decoded(*tokens_and_grids, settings, generators_of_rows(generator, [row]))
                images = self.processor.post_process_images(self._checked(pixels)[0])
                [image] = self._with_provenance(
                    images, [row], seeds, sampling, *tokens_and_grids, **decoder_provenance(settings)
                )
                content.append({"type": "image", "image": image})
        # A message without parts could not be appended to the conversation.
        return {"role": "assistant", "content": content or [{"type": "text", "text": ""}]}

    @checks_names
    @torch.no_grad()
    def score(self, images: Sequence[ImageInput], prompts: Sequence[str]) -> NextFlowScores:
        """How well images and prompts fit, judged by the model itself.

        Args:
            images: images (B) of any kind that the processor takes.
            prompts: (B) texts.

        Raises:
            ValueError: if the numbers of images and prompts differ, and for inputs that the processor refuses.
        """
        self._check_interleaves("score")
        if not isinstance(images, list | tuple) or not isinstance(prompts, list | tuple):
            raise ValueError("score takes lists: images, and a prompt for each.")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; give one for each.")
        prompts = check_prompts(prompts)
        inputs = self.processor.image_processor(list(images), return_tensors="pt")
        if (count := len(inputs["image_grids"])) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {count} images in lists; give one image for each.")
        requests = [self.processor.caption_request] * len(prompts)
        self._warn_of_texts(prompts)
        with self._call():
            inputs = inputs.to(self.model.device)
            self._warn_of_images(self._images_of(inputs["pixel_values"], inputs["image_grids"]))
            codes = self.model.get_image_tokens(inputs["pixel_values"], inputs["image_grids"])
            scored = (self.unwrapped_model, self.processor, codes, inputs["image_grids"])
            return NextFlowScores(
                image_given_text=score_images(*scored, prompts).image,
                text_given_image=score_answers(*scored, requests, prompts).text,
            )


def _check_text_options(options: dict, inputs: dict):
    """Raises `ValueError` for settings of transformers' `generate` that are of another type or out of range, and for
    those with which a chat would not be answered by one text.
    """
    known = TEXT_TYPES | {"max_new_tokens": int, "num_beams": int, "generation_config": GenerationConfig | None}
    check_types(options, known, "chat")
    for name in ("max_new_tokens", "num_beams"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, got {options[name]}.")
    ImageSampling(**{name: options[name] for name in ("temperature", "top_p") if options.get(name) is not None})
    given = options.keys() & (inputs.keys() | {"return_dict_in_generate"})
    if odd := sorted(name for name in given if options[name] is not False):
        raise ValueError(f"chat answers each conversation with one message; leave out {', '.join(odd)}.")


def _scripts(prompt, num_frames: int | None) -> list[list[str]]:
    """Of each video its prompt, and the texts between its frames where they are given."""
    if num_frames is not None and (not is_of_type(num_frames, int) or num_frames > MAX_FRAMES):
        raise ValueError(
            f"num_frames must be a whole number from 2 to {MAX_FRAMES}, since every frame is drawn after all earlier "
            f"ones; got {short_repr(num_frames)}."
        )
    if not isinstance(prompt, str) and not (isinstance(prompt, list | tuple) and prompt):
        raise ValueError(
            f"prompt must be a video's text, its frames' texts, or a list of either, got {short_repr(prompt)}."
        )
    videos = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    for script in videos:
        check_prompts(script if isinstance(script, list | tuple) else [script])
    given = [isinstance(video, list | tuple) for video in videos]
    if any(given) and not all(given):
        raise ValueError("A batch holds either prompts of videos or lists of texts, not both; call video twice.")
    scripts = [list(video) if isinstance(video, list | tuple) else [video] for video in videos]
    if videos and all(given):
        lengths = {len(script) for script in scripts} | ({num_frames} if num_frames is not None else set())
        if len(lengths) > 1:
            raise ValueError(
                f"All videos of a batch have one text for each of num_frames frames, got {sorted(lengths)}."
            )
    elif num_frames is None:
        raise ValueError("Say how long the video is: num_frames, or a text for each frame.")
    length = len(scripts[0]) if num_frames is None else num_frames
    if length < 2:
        raise ValueError(f"A video has at least 2 frames, got {length}; call the pipeline for one.")
    return scripts


def _first_frames(processor, request: ImageRequest) -> list[Image.Image]:
    """The given first frames as the model reads them."""
    for row in request.images:
        if len(row) != 1:
            raise ValueError(f"A video continues from one first frame, got {len(row)}; call the pipeline for several.")
    pixels = pixels_of_size(processor, [row[0] for row in request.images], request.schedules)
    return processor.post_process_images(pixels)
