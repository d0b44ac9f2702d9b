"""The site holds every page and every public name; `make docs` checks its links."""

import importlib
import re
import runpy

import yaml
from code_blocks import ROOT


DOCS = ROOT / "docs"
PACKAGES = ("", ".trainers", ".data", ".trainers.rl.rewards")


def test_every_page_stands_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    assert sorted(pages(settings["nav"])) == sorted(["index.md", *(path.name for path in DOCS.glob("*.md"))])


def test_every_public_name_stands_in_the_reference():
    named = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    for package in PACKAGES:
        module = importlib.import_module(f"transformers_nextflow{package}")
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_links_out_of_the_pages_lead_to_copies_in_the_site():
    hooks = runpy.run_path(str(DOCS / "site_hooks.py"))
    page = "see [data](data.md), `docs/rl.md` and ![edits](../checkpoints/nextflow-shapes/editing.png)\n"
    page += "```\n`docs/rl.md`\n```\n"
    assert hooks["for_site"](page, DOCS) == (
        "see [data](data.md), [rl](rl.md) and ![edits](repository/checkpoints/nextflow-shapes/editing.png)\n"
        "```\n`docs/rl.md`\n```\n"
    )
    assert hooks["for_site"]("[x](docs/data.md#check) [y](https://a.b)", ROOT) == "[x](data.md#check) [y](https://a.b)"
