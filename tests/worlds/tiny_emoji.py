"""Two dozen emoji in four styles, stored with their licences, and small worlds of them; every test shares these."""

import base64
import hashlib
import io
import tarfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from transformers_nextflow.worlds.emoji import Art, World
from transformers_nextflow.worlds.emoji.packages import ART, KEYWORDS, NAMES


FIXTURES = Path(__file__).parents[1] / "fixtures" / "emoji"
STYLES = ("twemoji", "flat", "3d", "streamline")
SIDE = 48
SOURCES = tuple(package for package in ART if package.style in STYLES)


@lru_cache
def tiny_art() -> Art:
    """The stored drawings, of 48 pixels."""
    return Art(FIXTURES / "art.zip")


@lru_cache
def tiny_world(side: int = 32, ratios=((16, 16),), plain: bool = False, styles=STYLES) -> World:
    """Scenes of all of them; cells of the tokenizer's last grid have four pixels."""
    return World(tiny_art(), side, 4, ratios, styles=styles, plain=plain)


def key(name: str) -> str:
    """The key of a concept by its name."""
    return next(key for key, concept in tiny_art().concepts.items() if name in concept.names)


def pack(folder: Path, output: Path, extra=()) -> bytes:
    """A tarball as npm makes them of the files in a folder, written to `output`; `extra` are (TarInfo, bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.add(path, f"package/{path.relative_to(folder)}")
        for member, content in extra:
            archive.addfile(member, io.BytesIO(content))
    output.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def packed_packages(folder: Path):
    """The stored parts of the packages as tarballs in a folder; the same packages with these tarballs' hashes."""
    packages = []
    for package in (*SOURCES, NAMES, KEYWORDS):
        content = pack(FIXTURES / "packages" / package.file_name.removesuffix(".tgz"), folder / package.file_name)
        packages.append(replace(package, integrity=base64.b64encode(hashlib.sha512(content).digest()).decode()))
    return packages
