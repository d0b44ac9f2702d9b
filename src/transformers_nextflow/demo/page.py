"""The page of the demo, in Gradio."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from . import actions
from .actions import DrawingState


try:
    import gradio as gr  # pyrefly: ignore[missing-import]
except ImportError as error:
    raise ImportError("The demo needs gradio: pip install transformers-nextflow[demo]") from error

if TYPE_CHECKING:
    from ..pipeline_nextflow import NextFlowPipeline

TITLE = "NextFlow"
# Images with shorter sides are shown with sharp pixels, not blurred.
SMALL_SIDE = 256
PIXELATED = ".gallery img, .image img {image-rendering: pixelated}"
# Gradio's columns are at least 100 pixels wide each, which is too wide for a phone.
COLUMNS = ".gallery .grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important}"
# One drawing at a time, since all requests share the model.
QUEUE = {"concurrency_limit": 1, "concurrency_id": "model"}


def make_page(pipe: NextFlowPipeline) -> gr.Blocks:
    """The page for a pipeline, to be launched with `launch`: drawing, and editing, varying and chatting if it can."""
    reads = hasattr(pipe.processor, "caption_request")
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\nImages scale by scale.")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                drawn_images, to_edit, to_vary = _draw_tab(pipe)
            if not reads:
                to_edit.visible = to_vary.visible = False
                return page
            with gr.Tab("Edit", id="edit"):
                painted = _edit_tab(pipe)
            with gr.Tab("Vary", id="vary"):
                varied = _vary_tab(pipe)
            with gr.Tab("Chat", id="chat"):
                _chat_tab(pipe)
        chosen = gr.State(0)
        drawn_images.change(lambda: 0, outputs=chosen, show_progress="hidden")
        drawn_images.select(_index, outputs=chosen, show_progress="hidden")
        to_edit.click(_send_to_tab("edit", _as_painted), [drawn_images, chosen], [painted, tabs])
        to_vary.click(_send_to_tab("vary", lambda image: image), [drawn_images, chosen], [varied, tabs])
    return page


def launch(pipe: NextFlowPipeline, **options):
    """Serve the page until the process ends.

    Args:
        options: options of Gradio's `launch`, such as `server_name`, `server_port` and `share`.
    """
    side = max(pipe.processor.image_processor.scale_schedules.resolutions)
    css = COLUMNS + (PIXELATED if side < SMALL_SIDE else "")
    return make_page(pipe).queue().launch(**({"css": css, "footer_links": []} | options))


def shows_errors(function: Callable) -> Callable:
    """An event handler whose errors become messages on the page."""

    @functools.wraps(function)
    def event(*values) -> Iterator:
        try:
            yield from function(*values)
        except Exception as error:
            raise gr.Error(actions.explain(error), print_exception=False) from error

    return event


def _draw_tab(pipe):
    prompt = gr.Textbox(label="Prompt", placeholder="Enter draws", lines=1, max_lines=1, autofocus=True)
    button = gr.Button("Draw", variant="primary")
    with gr.Accordion("Settings", open=False), gr.Row():
        count, seed, guidance = _settings("Candidates")
        size = gr.Dropdown(actions.sizes(pipe), value=actions.DEFAULT_SIZE, label="Size", min_width=120)
    images, growth = _shown("Images")
    with gr.Row():
        to_edit = gr.Button("Edit the chosen image", min_width=120)
        to_vary = gr.Button("Vary the chosen image", min_width=120)

    @shows_errors
    def draw(prompt, size, count, seed, guidance):
        yield from map(_outputs, actions.draw(pipe, prompt, size, count, seed, guidance))

    _on_enter(draw, prompt, button, [prompt, size, count, seed, guidance], [images, growth])
    return images, to_edit, to_vary


def _edit_tab(pipe):
    painted = gr.ImageEditor(
        label="Image: paint over what is to change",
        type="pil", format="png", layers=False, transforms=(), sources=("upload", "clipboard"),
        brush=gr.Brush(default_size=48, colors=["#ff00ff"], color_mode="fixed"),
    )  # fmt: skip
    prompt = gr.Textbox(label="Instruction", placeholder="Enter edits", lines=1, max_lines=1)
    button = gr.Button("Edit", variant="primary")
    with gr.Accordion("Settings", open=False), gr.Row():
        count, seed, guidance = _settings("Images")
    images, growth = _shown("Edited images")

    @shows_errors
    def edit(prompt, painted, count, seed, guidance):
        yield from map(_outputs, actions.edit(pipe, prompt, painted, count, seed, guidance))

    _on_enter(edit, prompt, button, [prompt, painted, count, seed, guidance], [images, growth])
    return painted


def _vary_tab(pipe):
    schedules = pipe.processor.image_processor.scale_schedules
    image = gr.Image(label="Image", type="pil", format="png", sources=["upload", "clipboard"], elem_classes="image")
    prompt = gr.Textbox(
        label="Prompt of the image as a whole", placeholder="Enter draws variations", lines=1, max_lines=1
    )
    button = gr.Button("Vary", variant="primary")
    most = schedules.build().num_scales
    kept = gr.Slider(1, most, value=min(2, most), step=1, label="Scales that are kept: fewer vary more")
    with gr.Accordion("Settings", open=False), gr.Row():
        count, seed, _ = _settings("Variations", of=4, has_guidance=False)
    images, growth = _shown("Variations")

    @shows_errors
    def vary(prompt, image, kept, count, seed):
        yield from map(_outputs, actions.vary(pipe, prompt, image, kept, count, seed))

    _on_enter(vary, prompt, button, [prompt, image, kept, count, seed], [images, growth])
    return image


def _chat_tab(pipe):
    conversation = gr.State([])
    seen = gr.Chatbot(label="Conversation", elem_classes="image", buttons=[])
    message = gr.MultimodalTextbox(
        label="Message, with images if there are any", placeholder="Enter sends", file_types=["image"],
        file_count="multiple", sources=["upload"],
    )  # fmt: skip
    # Text that transformers writes takes no seed.
    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, visible=pipe.interleaves)

    @shows_errors
    def send(conversation, message, seed):
        images = [Image.open(path) for path in message["files"]]
        conversation = actions.chat(pipe, conversation, message["text"], images, seed)
        yield conversation, _bubbles(conversation), None

    message.submit(send, [conversation, message, seed], [conversation, seen, message], **QUEUE)
    seen.clear(list, outputs=conversation, show_progress="hidden")


def _settings(label: str, of: int = 1, has_guidance: bool = True):
    count = gr.Number(label=label, value=of, precision=0, minimum=1, min_width=120)
    seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120)
    guidance = None
    if has_guidance:
        guidance = gr.Number(label="Guidance, 1 is none; empty: the model's own", value=None, min_width=120)
    return count, seed, guidance


def _shown(label: str):
    look = {"format": "png", "object_fit": "contain", "interactive": False, "elem_classes": "gallery"}
    images = gr.Gallery(
        label=label, type="pil", columns=2, fit_columns=False, height="auto", buttons=["download", "fullscreen"], **look
    )
    growth = gr.Gallery(label="Growth by scales", columns=4, height="auto", allow_preview=False, buttons=[], **look)
    return images, growth


def _on_enter(function: Callable, prompt, button, inputs: list, outputs: list):
    """Register an event handler for the button, and for Enter in the prompt."""
    gr.on([prompt.submit, button.click], function, inputs, outputs, show_progress="minimal", **QUEUE)


def _outputs(shown: DrawingState):
    for warning in shown.warnings:
        gr.Warning(warning)
    return _files(shown.images), _files(shown.growth)


def _files(images: list[tuple[Image.Image, str]]) -> list[tuple[str, str]]:
    """Images as files, each written once: Gradio itself would write a file again while a browser still reads it.

    The files of finished images record what drew them, as all images of the pipeline do.
    """
    found = []
    for image, caption in images:
        # Equal pixels may have been drawn in different ways, and previews record none.
        content = image.tobytes() + repr(getattr(image, "provenance", None)).encode()
        path = Path(_folder().name, f"{hashlib.sha256(content).hexdigest()}.png")
        if not path.exists():
            image.save(path)
        found.append((str(path), caption))
    return found


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """The folder for drawn images, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="nextflow-demo-")


def _index(event: gr.SelectData) -> int:
    return event.index


def _send_to_tab(tab: str, convert: Callable) -> Callable:
    """An event handler that puts the chosen image into another tab and opens that tab."""

    @shows_errors
    def take(images, index):
        if not images:
            raise ValueError("Nothing was drawn yet; draw an image first.")
        yield convert(images[min(index, len(images) - 1)][0]), gr.Tabs(selected=tab)

    return take


def _as_painted(image: Image.Image) -> dict:
    return {"background": actions.enlarged(image), "layers": [], "composite": None}


def _bubbles(conversation: list[dict]) -> list[dict]:
    """A conversation in Gradio's format: each part of a message is a separate entry."""
    return [
        {"role": message["role"], "content": part["text"] if part["type"] == "text" else gr.Image(part["image"])}
        for message in conversation
        for part in message["content"]
    ]
