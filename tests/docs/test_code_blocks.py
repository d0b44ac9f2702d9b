"""Every code block of every page runs, in order, in a clean folder; what cannot run is read, and the reason listed."""

import re
import subprocess

import pytest
from code_blocks import CLONED, DATA, ROOT, RUN, TEXT, Page, blocks_of


LIST = "docs/code_blocks.md"


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if "```" in (ROOT / name).read_text() and name != LIST]


@pytest.mark.parametrize("page", pages())
def test_the_code_blocks_of_a_page_run_in_order_from_a_clean_folder(page, tmp_path, monkeypatch):
    for name in CLONED:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    session = Page()
    for block in blocks_of(page, (ROOT / page).read_text()):
        try:
            session.take(block)
        except Exception as error:
            error.add_note(f"in the code block at {block.place}")
            raise


@pytest.mark.parametrize("page", pages())
def test_every_block_says_what_language_it_is_in(page):
    for block in blocks_of(page, (ROOT / page).read_text()):
        assert block.language in RUN + DATA + TEXT, f"{block.place} is in {block.language!r}"


def test_what_is_read_only_is_listed_in_one_place_with_its_reason():
    blocks = [block for page in pages() for block in blocks_of(page, (ROOT / page).read_text())]
    counts = {}
    for block in blocks:
        if block.reason is not None:
            counts[block.page, block.reason] = counts.get((block.page, block.reason), 0) + 1
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| (.+?) \|$", (ROOT / LIST).read_text(), re.MULTILINE)
    assert {(page, reason): int(count) for page, count, reason in rows} == counts
