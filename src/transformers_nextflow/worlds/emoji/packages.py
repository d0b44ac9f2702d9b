"""The npm packages with the drawings and their names: pinned, checked by hash, read without being unpacked."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tarfile
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...utils.atomic_files import atomic_write


REGISTRY = "https://registry.npmjs.org"
# The largest size of a member; no file of the packages is nearly as large.
MAX_MEMBER_BYTES = 100_000_000


@dataclass(frozen=True)
class Package:
    """A version of an npm package.

    Args:
        name, version: as in the registry.
        integrity: SHA-512 of the tarball in base64, as the registry and lock files state it.
        license, author, source: entries of the notice.
        style: name of the style of the package's drawings; `None` for packages with only names.
        words: names of the style in captions; answers have the first one.
    """

    name: str
    version: str
    integrity: str
    license: str
    author: str
    source: str
    style: str | None = None
    words: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def url(self) -> str:
        return f"{REGISTRY}/{self.name}/-/{self.file_name}"


ART = (
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "twemoji",
        ("twemoji", "twitter"),
    ),
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "noto",
        ("noto", "android"),
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "blob",
        ("blob", "old android"),
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "flat",
        ("flat", "fluent"),
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
        "Microsoft Corporation; packed by LobeHub",
        "https://github.com/microsoft/fluentui-emoji",
        "3d",
        ("3d", "rendered"),
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One; EmojiTwo",
        "https://github.com/EmojiTwo/emojitwo",
        "emojione",
        ("emojione", "emojitwo"),
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
        "firefox",
        ("firefox", "fxemoji"),
    ),
    Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "CC-BY-4.0",
        "Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
        "streamline",
        ("streamline", "webalys"),
    ),
)
NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "Miles Johnson",
    "https://github.com/milesj/emojibase",
)
KEYWORDS = Package(
    "emojilib",
    "4.0.3",
    "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
    "MIT",
    "Mu-An Chiou",
    "https://github.com/muan/emojilib",
)
PACKAGES = (*ART, NAMES, KEYWORDS)
STYLE_WORDS = {package.style: package.words for package in ART}


def check_integrity(package: Package, content: bytes):
    """Raises `ValueError` unless the tarball's content has the pinned hash."""
    found = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != package.integrity:
        raise ValueError(
            f"{package.file_name} has the SHA-512 {found}, not the pinned {package.integrity}: delete it and fetch it "
            f"again from {package.url}."
        )


def fetch(folder: Path | str, packages: tuple[Package, ...] = PACKAGES) -> list[Path]:
    """Download the tarballs that are missing in `folder`, 32 MB in all, and check all of them; returns their paths.

    Raises:
        ValueError: for a tarball that is not the pinned one.
        OSError: if the registry cannot be reached.
    """
    paths = []
    for package in packages:
        path = Path(folder) / package.file_name
        if not path.is_file():
            with urllib.request.urlopen(package.url, timeout=120) as response:
                content = response.read()
            check_integrity(package, content)
            with atomic_write(path) as partial:
                partial.write_bytes(content)
        else:
            check_integrity(package, path.read_bytes())
        paths.append(path)
    return paths


def read_members(tarball: Path, pattern: str) -> dict[str, bytes]:
    """The regular files of an npm tarball whose path under `package/` matches a regular expression, by that path.

    Nothing is written to disk, so no member can be written outside of a folder; links and devices are skipped.

    Raises:
        ValueError: for a member of more than `MAX_MEMBER_BYTES`.
    """
    found = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            path = member.name.removeprefix("package/")
            if not member.isreg() or not re.fullmatch(pattern, path):
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise ValueError(f"{path} in {tarball.name} claims {member.size} bytes, more than {MAX_MEMBER_BYTES}.")
            found[path] = archive.extractfile(member).read()
    return found


def read_json(tarball: Path, path: str) -> dict | list:
    """A JSON file of an npm tarball. Raises `ValueError` if it does not exist."""
    members = read_members(tarball, re.escape(path))
    if path not in members:
        raise ValueError(f"{tarball.name} has no file {path}.")
    return json.loads(members[path])


def packages_of(styles: Iterable[str]) -> tuple[Package, ...]:
    """The packages of some styles, and those of all names and keywords."""
    return tuple(package for package in PACKAGES if package.style is None or package.style in styles)


def notice(packages: tuple[Package, ...] = PACKAGES) -> str:
    """Attribution and licences of all art and names, for the art's archive and for model cards."""
    lines = [
        "The emoji world shows and names emoji from these packages. The drawings are scaled, recoloured, rotated and "
        "composed into scenes; nothing else about them is changed.",
        "",
    ]
    for package in packages:
        what = f'style "{package.style}"' if package.style else "names and keywords"
        lines.append(
            f"- {what}: {package.author}, {package.source}, {package.license}, from {package.name} {package.version}"
        )
    lines += ["", "CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/legalcode"]
    lines += ["Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0", "MIT: https://opensource.org/license/mit"]
    return "\n".join(lines) + "\n"
