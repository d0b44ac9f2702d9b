"""How a notebook shows images, videos and an image after each scale."""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


# Small images are shown enlarged, pixel by pixel; more images than these are only counted.
SHOWN_WIDTH, MAX_SHOWN = 128, 64


def as_html(rows: Sequence[Sequence[Image.Image]]) -> str:
    """Rows of images as HTML."""
    parts, left = [], MAX_SHOWN
    for row in rows:
        parts.append(f"<div>{''.join(_tag(_png(image), image.width) for image in row[:left])}</div>")
        left = max(0, left - len(row))
    count = sum(map(len, rows))
    return "".join(parts) + (f"<div>… {count} images in all</div>" if count > MAX_SHOWN else "")


def video_as_html(frames: Sequence[Image.Image], text: str) -> str:
    """A video that plays, with its text, as HTML."""
    file = io.BytesIO()
    Image.Image.save(frames[0], file, "GIF", save_all=True, append_images=frames[1:], duration=500, loop=0)
    caption = f"<div>{html.escape(text)}</div>" if text else ""
    return f"<div>{_tag(file.getvalue(), frames[0].width, 'gif')}{caption}</div>"


def to_pil(images) -> list[Image.Image] | None:
    """Images of any output type as PIL images; `None` for codes."""
    if isinstance(images, list):
        return images
    if torch.is_tensor(images):
        if not images.is_floating_point():
            return None
        images = images.float().cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]


class ScalePreviews:
    """The images after each scale, shown in a notebook while they are drawn."""

    def __init__(self):
        self.scales: list[list[Image.Image]] = []
        self._display = None

    @property
    def rows(self) -> list[list[Image.Image]]:
        """For each image its previews after each scale."""
        return [list(row) for row in zip(*self.scales)]

    def add(self, images: list[Image.Image]):
        """Add the images after one more scale."""
        self.scales.append(images)
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        if shell is not None:
            from IPython.display import HTML, display  # pyrefly: ignore[missing-import]

            shown = HTML(as_html(self.rows))
            if self._display is None:
                self._display = display(shown, display_id=True)
            else:
                self._display.update(shown)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _tag(data: bytes, width: int, kind: str = "png") -> str:
    style = f"image-rendering:pixelated;margin:2px;width:{max(width, SHOWN_WIDTH)}px;max-width:100%"
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" style="{style}">'
