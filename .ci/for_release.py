"""Writes into setup.cfg and README.md, of a checkout that is released, the addresses of the repository.

    python .ci/for_release.py OWNER/NAME v0.1.0

PyPI resolves no relative links, and shows what `project_urls` names; a clone needs neither.
"""

import re
import sys
from pathlib import Path


IMAGES = (".png", ".gif", ".jpg", ".svg")
LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def absolute_links(markdown: str, repository: str, tag: str) -> str:
    """The text with links to files of the repository at that tag in the place of relative ones."""

    def absolute(found: re.Match) -> str:
        mark, text, path = found.groups()
        kind = "raw" if Path(path.split("#")[0]).suffix in IMAGES else "blob"
        return f"{mark}[{text}](https://github.com/{repository}/{kind}/{tag}/{path})"

    return LINK.sub(absolute, markdown)


def project_urls(setup: str, repository: str) -> str:
    """The setup.cfg with the repository's addresses."""
    home = f"https://github.com/{repository}"
    pages = {"Homepage": home, "Changelog": f"{home}/blob/main/CHANGELOG.md", "Issues": f"{home}/issues"}
    lines = "".join(f"    {name} = {url}\n" for name, url in pages.items())
    return re.sub(r"(^project_urls =\n)(?: *#[^\n]*\n)?", lambda found: found[1] + lines, setup, flags=re.MULTILINE)


def check_version(setup: str, package: str, tag: str):
    """Raises `ValueError` if tag, setup.cfg and the package do not name one version."""
    named = re.search(r"^version = (\S+)$", setup, re.MULTILINE)[1]
    shown = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)[1]
    if not f"v{named}" == f"v{shown}" == tag:
        raise ValueError(f"setup.cfg has {named}, the package {shown}, the tag is {tag}; make them one.")


if __name__ == "__main__":
    repository, tag = sys.argv[1:]
    setup, readme = Path("setup.cfg"), Path("README.md")
    check_version(setup.read_text(), Path("src/transformers_nextflow/utils/version.py").read_text(), tag)
    setup.write_text(project_urls(setup.read_text(), repository))
    readme.write_text(absolute_links(readme.read_text(), repository, tag))
