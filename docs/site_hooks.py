"""Hooks of mkdocs: the README is the first page, and links out of `docs/` lead to copies in the site.

Run by `mkdocs build`, see `mkdocs.yml`; the pages themselves read the same in a clone.
"""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
# A link to a file of the repository: from the README, or by `../` from a page.
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")
NAMED_PAGE = re.compile(r"`(?:docs/)?(\w+)\.md`")
COPIES = "repository"


def target_of(link: str, folder: Path) -> Path | None:
    """The file of the repository that a link from `folder` means, if it lies outside of `docs/`."""
    path = (folder / link).resolve()
    inside = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs")
    return path.relative_to(ROOT) if inside and path.is_file() else None


def for_site(markdown: str, folder: Path) -> str:
    """The text of a page that lies in `folder` of the repository, with the links that it has in the site."""

    def link(found: re.Match) -> str:
        target, anchor = target_of(found[1], folder), found[2] or ""
        if target is not None:
            return f"]({COPIES}/{target}{anchor})"
        path = (folder / found[1]).resolve()
        is_page = path.is_relative_to(ROOT / "docs")
        return f"]({path.relative_to(ROOT / 'docs')}{anchor})" if is_page else found[0]

    def page(found: re.Match) -> str:
        return f"[{found[1]}]({found[1]}.md)" if (ROOT / "docs" / f"{found[1]}.md").is_file() else found[0]

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else NAMED_PAGE.sub(page, LINK.sub(link, part)) for part in parts)


def on_files(files, config):
    """The README as `index.md`, and a copy of each file of the repository that a page links to."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=for_site((ROOT / "README.md").read_text(), ROOT)))
    pages = [(ROOT / "README.md", ROOT)] + [(path, ROOT / "docs") for path in (ROOT / "docs").glob("*.md")]
    linked = {target_of(found[1], folder) for path, folder in pages for found in LINK.finditer(path.read_text())}
    for target in sorted(linked - {None}):
        files.append(File.generated(config, f"{COPIES}/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The links of a page, as they are in the site."""
    return markdown if page.file.src_uri == "index.md" else for_site(markdown, ROOT / "docs")
