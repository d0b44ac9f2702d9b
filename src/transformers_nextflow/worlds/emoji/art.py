"""The drawings: they are rendered once from the packages into one archive, and read from it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ...utils.atomic_files import atomic_write
from .coloring import Paint, ruling_paint
from .concepts import TONES, Concept, key_of, keys_by_slug, match_icons, read_concepts
from .packages import ART, KEYWORDS, NAMES, Package, notice, read_json, read_members


SIDE = 104  # side of a drawing in the archive: that of the largest place in a scene of 128 pixels
QUALITY = 90
MIN_STYLES = 4
INDEX, NOTICE = "art.json", "NOTICE"


@dataclass(frozen=True)
class Drawing:
    """A concept in a style, as in the index: its ruling colour, if there is one, and its skin tones."""

    paint: Paint | None = None
    tones: tuple[str, ...] = ()


class Art:
    """The drawings of an archive.

    Args:
        path: path of the archive that `make_art` wrote.

    Attributes:
        concepts: key → [`Concept`], in the order of emojibase.
        styles: names of the styles.
        drawings: (key, style) → [`Drawing`].
    """

    def __init__(self, path: Path | str):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no archive of drawings {path}; make it: python examples/emoji/make_art.py.")
        self.path = path
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read(INDEX))
            self.notice = archive.read(NOTICE).decode()
            self._files = {name: archive.read(name) for name in archive.namelist() if name.endswith(".webp")}
        self.styles = tuple(index["styles"])
        self.concepts: dict[str, Concept] = {}
        self.drawings: dict[tuple[str, str], Drawing] = {}
        for entry in index["concepts"]:
            drawings = entry.pop("drawings")
            lists = {name: tuple(entry[name]) for name in ("names", "keywords")}
            self.concepts[entry["key"]] = Concept(**(entry | lists))
            for style, drawing in drawings.items():
                paint = Paint(*drawing["paint"]) if drawing["paint"] else None
                self.drawings[entry["key"], style] = Drawing(paint, tuple(drawing["tones"]))
        self.sprite = lru_cache(maxsize=8192)(self._sprite)

    def __reduce__(self):
        # The cache is not sent to other processes, which read the archive anew.
        return Art, (self.path,)

    def styles_of(self, concept: str) -> tuple[str, ...]:
        """The styles in which a concept is drawn."""
        return tuple(style for style in self.styles if (concept, style) in self.drawings)

    def _sprite(self, concept: str, style: str, tone: str | None = None) -> np.ndarray:
        """A drawing on transparent ground, (side, side, 4) uint8, read-only.

        Raises:
            ValueError: for a drawing that does not exist.
        """
        name = _file_name(style, concept, tone)
        if name not in self._files:
            raise ValueError(f"There is no drawing {name} in {self.path}.")
        with Image.open(io.BytesIO(self._files[name])) as image:
            sprite = np.array(image.convert("RGBA"))
        sprite.setflags(write=False)
        return sprite


def _file_name(style: str, concept: str, tone: str | None) -> str:
    return f"{style}/{concept}{'-' + tone.replace(' ', '-') if tone else ''}.webp"


# --- Making the archive --------------------------------------------------------------------------------------------


def make_art(
    packages: Path | str,
    output: Path | str,
    side: int = SIDE,
    sources: Sequence[Package] = ART,
    least_styles: int = MIN_STYLES,
) -> dict[str, int]:
    """Render the drawings of the fetched packages into an archive; returns how many there are, by style.

    Needs resvg (`pip install transformers-nextflow[emoji]`).

    Args:
        packages: folder of the tarballs (`fetch`).
        output: the archive.
        side: pixels of a drawing.
        sources: the sets.
        least_styles: concepts in fewer styles are left out.
    """
    folder = Path(packages)
    entries = read_json(folder / NAMES.file_name, "en/data.json")
    concepts = read_concepts(entries, read_json(folder / KEYWORDS.file_name, "dist/emoji-en-US.json"))
    sets = [_Set(folder, source, entries) for source in sources]
    kept = [c for c in concepts if sum(c.key in one.icons for one in sets) >= least_styles]
    counts = {source.style: 0 for source in sources}
    index = []
    with atomic_write(output) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for concept in tqdm(kept, desc="drawings"):
            drawings = {}
            for one in sets:
                if concept.key not in one.icons:
                    continue
                style = one.source.style
                sprite = _write(archive, _file_name(style, concept.key, None), one, concept.key, side)
                tones = [tone for tone in TONES.values() if concept.tones.get(tone) in one.icons]
                for tone in tones:
                    _write(archive, _file_name(style, concept.key, tone), one, concept.tones[tone], side)
                # The meaning of symbols depends on their colours.
                paint = None if concept.group in ("symbols", "flags") or concept.tones else ruling_paint(sprite)
                drawings[style] = {"paint": paint, "tones": tones}
                counts[style] += 1 + len(tones)
            index.append(asdict(concept) | {"drawings": drawings})
        archive.writestr(INDEX, json.dumps({"styles": list(counts), "concepts": index}))
        archive.writestr(NOTICE, notice((*sources, NAMES, KEYWORDS)))
    return counts


class _Set:
    """One package of drawings: which icon stands for which key, and its image."""

    def __init__(self, folder: Path, source: Package, entries: list[dict]):
        self.source, tarball = source, folder / source.file_name
        self.images = read_members(tarball, r"assets/[^/]*\.webp")
        if self.images:
            self.icons = {key_of(Path(path).stem): path for path in self.images}
            return
        self.data = read_json(tarball, "icons.json")
        aliases = self.data.get("aliases", {})
        # An alias may be a mirror image: only the plain ones are further names.
        plain = {name: alias["parent"] for name, alias in aliases.items() if set(alias) <= {"parent"}}
        self.parents = plain | {name: name for name in self.data["icons"]}
        characters = read_json(tarball, "chars.json")
        self.icons = match_icons(self.parents, characters, keys_by_slug(entries))

    def draw(self, key: str, side: int) -> Image.Image:
        """The icon of a key, (side, side) RGBA, in the middle of a square."""
        icon = self.icons[key]
        if self.images:
            with Image.open(io.BytesIO(self.images[icon])) as image:
                drawn = image.convert("RGBA")
            factor = side / max(drawn.size)
            drawn = drawn.resize([max(1, round(length * factor)) for length in drawn.size], Image.Resampling.LANCZOS)
        else:
            drawn = render_svg(self.data, self.parents[icon], side)
        square = Image.new("RGBA", (side, side))
        square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        return square


def render_svg(data: dict, icon: str, side: int) -> Image.Image:
    """An icon of an iconify set, its longer side `side` pixels, RGBA."""
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("Rendering SVGs needs resvg: pip install transformers-nextflow[emoji].") from error
    body = data["icons"][icon]
    left, top = (body.get(name, data.get(name, 0)) for name in ("left", "top"))
    width, height = (body.get(name, data.get(name, 16)) for name in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body["body"]}</svg>'
    )
    factor = side / max(width, height)
    sizes = {"width": max(1, round(width * factor)), "height": max(1, round(height * factor))}
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **sizes)
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGBA")


def _write(archive: zipfile.ZipFile, name: str, one: _Set, key: str, side: int) -> np.ndarray:
    buffer = io.BytesIO()
    image = one.draw(key, side)
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    archive.writestr(name, buffer.getvalue())
    return np.asarray(image)
