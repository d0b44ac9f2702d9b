"""What the pipeline does over several pictures: films and conversations, each on one cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from .drawing_request import DrawingRequest, ImageInput, pixels_of_size, requested_schedule
from .generation_nextflow import InterleavedGenerationOutput
from .interleaved_generation import InterleavedStreamer
from .likelihood import score_answers, score_pictures
from .processing_nextflow import check_prompts
from .sampling_nextflow import ImageSampling, PerScale
from .scale_drawing import Drawing
from .sequence_writer import Prompts


@dataclass
class NextFlowFilmOutput:
    """Films.

    Args:
        frames: of each film its pictures, all of one size; a given first one is among them as the model read it.
        transitions: of each film the texts between its frames.
    """

    frames: list[list[Image.Image]]
    transitions: list[list[str]]


@dataclass(frozen=True)
class NextFlowScores:
    """How well pictures and prompts fit, (B,) each, in nats over all tokens.

    Args:
        image_given_text: log-likelihood of the picture's codes after the prompt.
        text_given_image: log-likelihood of the prompt as the description of the picture.
    """

    image_given_text: torch.Tensor
    text_given_image: torch.Tensor


class ConversationMixin:
    """`film`, `chat` and `score` of [`NextFlowPipeline`]."""

    @torch.no_grad()
    def film(
        self,
        prompt: str | list[str] | list[list[str]],
        image: ImageInput | list[ImageInput] | None = None,
        num_frames: int | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        max_transition_tokens: int = 32,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **sampling: PerScale | None,
    ) -> NextFlowFilmOutput:
        """Draw films, frame by frame, each after all earlier ones and a text of what changes (paper, section 5.4).

        Args:
            prompt: of a film, or a list of them. The model writes the texts between the frames then. Or of each film a
                list: its prompt, then what changes before the second frame, the third, and so on.
            image: the first frame, which keeps its size; or a list with one for each prompt of a list. Default: drawn
                too.
            num_frames: frames of a film, a given first one included; default: as many as a list of texts has.
            negative_prompt: what guidance leads away from at every frame.
            height, width: pixels where no first frame is given; default: the square of the model's largest level.
            max_transition_tokens: how long the texts between frames are at most: `num_frames` times so many tokens in
                a film.
            generator: one for all films, or one for each.
            sampling: values of [`ImageSampling`] that differ from the checkpoint's own for edits.

        Raises:
            ValueError: for texts that are not as many as the frames, films mixed with lists of texts, and what
                `__call__` refuses.
        """
        self._check_reads("film")
        scripts = _scripts(prompt, num_frames)
        is_scripted = not isinstance(prompt, str) and isinstance(prompt[0], list | tuple)
        prompts = [script[0] for script in scripts]
        if image is not None and len(prompts) == 1 and not isinstance(image, list | tuple):
            image = [image]
        if image is None and sampling.get("image_guidance_scale") is None:
            sampling["image_guidance_scale"] = 1.0  # there is no picture to be guided towards, whatever edits have
        # All frames but the first are drawn after others.
        sampling, size = self._sampling(True, **sampling), (height, width)
        request = DrawingRequest.build(self.processor, prompts, negative_prompt, image, None, size, None, False, False)
        self.check_inputs(request, sampling, 1, 1, generator, "pil", ())
        with self._call():
            inputs = self._drawing_inputs(request, sampling)
            given = 0 if image is None else 1
            if given:
                firsts = _first_frames(self.processor, request)
                # The answer begins with what changes after the first frame.
                inputs |= self.processor.apply_image_prompt(prompts, request.images, answer="").to(self.model.device)
            if is_scripted:
                finished = self._draw_script(scripts, given, inputs, request, sampling, generator)
            else:
                count = num_frames - given
                finished = self.model.generate_interleaved(
                    **inputs, min_images=count, max_images=count, max_new_tokens=max_transition_tokens * num_frames,
                    sampling=sampling, generator=generator,
                )  # fmt: skip
            drawn = self.model.decode_image_tokens(finished.image_tokens, finished.image_grids)
            pictures = iter(self.processor.post_process_images(drawn))
            films = [[next(pictures) for _ in range(num_frames or len(script))] for script in scripts]
            if given:
                films = [[first, *film[1:]] for first, film in zip(firsts, films)]
            transitions = [script[1:] for script in scripts] if is_scripted else self._texts_between(finished, given)
        return NextFlowFilmOutput(films, transitions)

    def _draw_script(self, scripts, given: int, inputs: dict, request, sampling, generator) -> Prompts:
        """Frames with given texts between them."""
        tokenizer, boi = self.processor.tokenizer, self.processor.boi_token_id
        inputs.pop("image_sizes")
        writer = self.model.sequence_writer(**inputs, schedules=request.schedules, sampling=sampling)
        rows = range(len(scripts))
        for frame in range(given, len(scripts[0])):
            if frame > 0:
                texts = [tokenizer(script[frame], add_special_tokens=False)["input_ids"] for script in scripts]
                writer.append([[*text, boi] for text in texts])
            writer.draw(Drawing(self.unwrapped_model, request.schedules, sampling, generator), rows)
        return writer.finished()

    def _texts_between(self, output: InterleavedGenerationOutput, given: int) -> list[list[str]]:
        """Of each row the texts before its pictures, without what stands before a film's first."""
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
        max_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        streamer: InterleavedStreamer | None = None,
        sampling: ImageSampling | None = None,
        **kwargs,
    ) -> dict | list[dict]:
        """Answer a conversation, or a batch of them, with text, pictures or both.

        >>> message = pipe.chat([{"role": "user", "content": [{"type": "text", "text": "draw a red circle."}]}])
        >>> message["content"]
        [{"type": "image", "image": <PIL.Image.Image …>}]

        Args:
            messages: in chat format; the parts of a message are of type "text", "image" or "video" (a film, read frame
                by frame). What this method returns can be appended.
            max_new_tokens, min_images, max_images, generator, streamer, kwargs: as in `generate_interleaved`.
            height, width: pixels of what is drawn; default: as `generate_interleaved` has it, and of one side alone the
                square's.
            sampling: of pictures, without an `image_guidance_scale`; default: the checkpoint's own.

        Returns:
            The assistant's message, or a list of them.

        Raises:
            ValueError: for messages that the chat template refuses, and what `generate_interleaved` refuses.
        """
        self._check_reads("chat")
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"messages must be a list of messages, or a list of such lists, got {messages!r}.")
        # Guidance compares with nothing said and shown at once.
        if sampling is None:
            sampling = replace(self.model.default_image_sampling, image_guidance_scale=1.0)
        elif sampling.image_guidance_scale != 1:
            raise ValueError("chat has no image_guidance_scale; leave it at 1, or edit by calling the pipeline.")
        is_batch = isinstance(messages[0], list | tuple)
        conversations = messages if is_batch else [messages]
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
        with self._call():
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            output = self.model.generate_interleaved(
                **inputs, **sizes, max_new_tokens=max_new_tokens, min_images=min_images, max_images=max_images,
                sampling=sampling, generator=generator, streamer=streamer, tokenizer=self.processor.tokenizer,
                **kwargs,
            )  # fmt: skip
            answers = [self._message(output, row) for row in range(len(conversations))]
        return answers if is_batch else answers[0]

    def _message(self, output: InterleavedGenerationOutput, row: int) -> dict:
        content = []
        for piece in output.segments[row]:
            if piece.image is None:
                ids = output.input_ids[row, piece.start : piece.stop]
                text = self.processor.decode(ids, skip_special_tokens=True)
                if text:
                    content.append({"type": "text", "text": text})
            else:
                chosen = [piece.image]
                pixels = self.model.decode_image_tokens(output.image_tokens[chosen], output.image_grids[chosen])
                content.append({"type": "image", "image": self.processor.post_process_images(pixels)[0]})
        return {"role": "assistant", "content": content}

    @torch.no_grad()
    def score(self, images: Sequence[ImageInput], prompts: Sequence[str]) -> NextFlowScores:
        """How well pictures and prompts fit, judged by the model itself.

        Args:
            images: pictures (B) of any kind that the processor takes.
            prompts: (B) texts.

        Raises:
            ValueError: if they differ in number, and for what the processor refuses.
        """
        self._check_reads("score")
        if not isinstance(images, list | tuple) or not isinstance(prompts, list | tuple):
            raise ValueError("score takes lists: pictures, and a prompt for each.")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; give one for each.")
        prompts = check_prompts(prompts)
        inputs = self.processor.image_processor(list(images), return_tensors="pt")
        requests = [self.processor.caption_request] * len(prompts)
        with self._call():
            inputs = inputs.to(self.model.device)
            codes = self.model.get_image_tokens(inputs["pixel_values"], inputs["image_grids"])
            pictures = (self.unwrapped_model, self.processor, codes, inputs["image_grids"])
            return NextFlowScores(
                image_given_text=score_pictures(*pictures, prompts).image,
                text_given_image=score_answers(*pictures, requests, prompts).text,
            )


def _scripts(prompt, num_frames: int | None) -> list[list[str]]:
    """Of each film its prompt, and the texts between its frames where they are given."""
    if num_frames is not None and not isinstance(num_frames, int):
        raise ValueError(f"num_frames must be a whole number from 2, got {num_frames!r}.")
    if not isinstance(prompt, str) and not (isinstance(prompt, list | tuple) and prompt):
        raise ValueError(f"prompt must be a film's text, its frames' texts, or a list of either, got {prompt!r}.")
    films = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    given = [isinstance(film, list | tuple) for film in films]
    if any(given) and not all(given):
        raise ValueError("A batch holds either prompts of films or lists of texts, not both; call film twice.")
    scripts = [list(film) if isinstance(film, list | tuple) else [film] for film in films]
    if films and all(given):
        lengths = {len(script) for script in scripts} | ({num_frames} if num_frames is not None else set())
        if len(lengths) > 1:
            raise ValueError(
                f"All films of a batch have one text for each of num_frames frames, got {sorted(lengths)}."
            )
    elif num_frames is None:
        raise ValueError("Say how long the film is: num_frames, or a text for each frame.")
    length = len(scripts[0]) if num_frames is None else num_frames
    if length < 2:
        raise ValueError(f"A film has at least 2 frames, got {length}; call the pipeline for one.")
    return scripts


def _first_frames(processor, request: DrawingRequest) -> list[Image.Image]:
    """The given first frames as the model reads them."""
    for row in request.images:
        if len(row) != 1:
            raise ValueError(f"A film goes on from one first frame, got {len(row)}; call the pipeline for several.")
    pixels = pixels_of_size(processor, [row[0] for row in request.images], request.schedules)
    return processor.post_process_images(pixels)
