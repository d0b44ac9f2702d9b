"""Provenance: images record in their files what has drawn them and how."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .image_files import open_image
from .version import __version__


SOFTWARE = f"transformers-nextflow {__version__}"
# The key of the text in PNG files. Other formats have their own fields.
KEY = "transformers-nextflow"
DESCRIPTION_TAG, SOFTWARE_TAG = 0x010E, 0x0131


class GeneratedImage(Image.Image):
    """An image whose files hold its `provenance`, a dict of plain values. Images derived from it (resized, cropped,
    converted) keep it. It equals any image with the same pixels.
    """

    provenance: dict | None = None

    @classmethod
    def of(cls, image: Image.Image, provenance: dict) -> GeneratedImage:
        """The image with its provenance."""
        generated = Image.Image.copy(image)
        generated.__class__ = cls
        generated.provenance = provenance
        return generated

    def _new(self, im):
        # PIL makes all derived images with this method, as plain images.
        derived = super()._new(im)
        derived.__class__ = type(self)
        derived.provenance = self.provenance
        return derived

    def __eq__(self, other):
        if not isinstance(other, Image.Image):
            return NotImplemented
        return self.mode == other.mode and self.size == other.size and self.tobytes() == other.tobytes()

    def save(self, fp, format: str | None = None, **params):
        """As `PIL.Image.Image.save`; PNG, JPEG, WebP and GIF hold the provenance, unless such a field is given."""
        if self.provenance is not None:
            name = fp if isinstance(fp, str | bytes | Path) else getattr(fp, "name", "")
            suffix = Path(name.decode() if isinstance(name, bytes) else str(name)).suffix.lower()
            kind = (format or Image.registered_extensions().get(suffix, "")).upper()
            params = _fields(kind, self.provenance) | params
        super().save(fp, format, **params)


def _fields(kind: str, provenance: dict) -> dict:
    text = json.dumps({"software": SOFTWARE} | provenance)
    if kind == "PNG":
        info = PngInfo()
        info.add_text(KEY, text)
        return {"pnginfo": info}
    if kind in ("JPEG", "WEBP"):
        exif = Image.Exif()
        exif[DESCRIPTION_TAG], exif[SOFTWARE_TAG] = text, SOFTWARE
        return {"exif": exif}
    return {"comment": text} if kind == "GIF" else {}


def read_provenance(path) -> dict | None:
    """The provenance in the file of an image; `None` if there is none.

    Args:
        path: the path of the file, or an open file.

    Raises:
        ValueError: for anything but the file of an image.
    """
    with open_image(path) as image:
        comment = image.info.get("comment", "")
        comment = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else comment
        text = image.info.get(KEY) or image.getexif().get(DESCRIPTION_TAG) or comment
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and str(found.get("software", "")).startswith(KEY) else None
