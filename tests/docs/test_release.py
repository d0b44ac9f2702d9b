"""What is written into a checkout that is released, and what the package then says of itself."""

import configparser
import re
import runpy

import pytest
from code_blocks import ROOT

import transformers_nextflow


RELEASE = runpy.run_path(str(ROOT / ".ci" / "for_release.py"))


def test_links_of_the_readme_are_whole_addresses_of_files_that_are_there():
    readme = RELEASE["absolute_links"]((ROOT / "README.md").read_text(), "owner/name", "v1.2.3")
    links = re.findall(r"\]\(([^)#\s]+)\)", readme)
    assert links and all(link.startswith("https://") for link in links)
    for kind, path in re.findall(r"https://github.com/owner/name/(raw|blob)/v1.2.3/([^)\s]+)\)", readme):
        assert (ROOT / path).is_file() and (kind == "raw") == path.endswith(".png")


def test_the_metadata_name_the_repository_and_still_parse():
    setup = configparser.ConfigParser()
    setup.read_string(RELEASE["project_urls"]((ROOT / "setup.cfg").read_text(), "owner/name"))
    urls = setup["metadata"]["project_urls"].split("\n")
    assert "Homepage = https://github.com/owner/name" in urls and any(url.startswith("Paper = ") for url in urls)
    assert not any(url.startswith("#") for url in urls)


def test_version_and_tag_are_one():
    setup = (ROOT / "setup.cfg").read_text()
    package = (ROOT / "src/transformers_nextflow/utils/version.py").read_text()
    RELEASE["check_version"](setup, package, f"v{transformers_nextflow.__version__}")
    with pytest.raises(ValueError, match="the tag is v9"):
        RELEASE["check_version"](setup, package, "v9")
