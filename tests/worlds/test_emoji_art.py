"""The drawings of the emoji world: fetched packages are the pinned ones, and each drawing has its right name."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from tiny_emoji import SIDE, SOURCES, key, pack, packed_packages, tiny_art

from transformers_nextflow.worlds.emoji import packages
from transformers_nextflow.worlds.emoji.art import Art, make_art
from transformers_nextflow.worlds.emoji.coloring import HUES, recolor, ruling_paint, to_hsv, to_rgb
from transformers_nextflow.worlds.emoji.concepts import key_of, match_icons, plain, read_concepts
from transformers_nextflow.worlds.emoji.packages import PACKAGES, fetch, notice, read_json, read_members
from transformers_nextflow.worlds.emoji.synonyms import SYNONYMS


# --- Packages --------------------------------------------------------------------------------------------------------


def serve(monkeypatch, contents):
    """Answers to downloads by address; returns the list of addresses that are asked for."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(contents[url])

    monkeypatch.setattr(packages.urllib.request, "urlopen", urlopen)
    return asked


def test_what_is_fetched_is_checked_and_kept(tmp_path, monkeypatch):
    (tmp_path / "registry").mkdir()
    wanted = packed_packages(tmp_path / "registry")
    asked = serve(monkeypatch, {p.url: (tmp_path / "registry" / p.file_name).read_bytes() for p in wanted})
    first = fetch(tmp_path / "cache", wanted)
    assert len(asked) == len(wanted) and all(path.is_file() for path in first)
    assert fetch(tmp_path / "cache", wanted) == first and len(asked) == len(wanted)


def test_another_tarball_than_the_pinned_one_is_refused_and_not_kept(tmp_path, monkeypatch):
    package = PACKAGES[0]
    serve(monkeypatch, {package.url: b"not what was pinned"})
    with pytest.raises(ValueError, match=rf"{package.file_name}.*fetch it again"):
        fetch(tmp_path, [package])
    assert not list(tmp_path.iterdir())
    (tmp_path / package.file_name).write_bytes(b"changed afterwards")
    with pytest.raises(ValueError, match="delete it"):
        fetch(tmp_path, [package])


def test_pinned_packages_have_addresses_of_the_registry_and_whole_hashes():
    for package in PACKAGES:
        assert package.url.startswith("https://registry.npmjs.org/") and package.url.endswith(f"-{package.version}.tgz")
        assert len(package.integrity) == 88 and package.integrity.endswith("==")
    assert len({package.style for package in PACKAGES if package.style}) == 8


def test_of_a_tarball_only_regular_files_under_its_folder_are_read_and_none_is_written(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "icons.json").write_text("{}")
    link, outside = tarfile.TarInfo("package/link.json"), tarfile.TarInfo("../outside.json")
    link.type, outside.size = tarfile.SYMTYPE, 2
    pack(tmp_path / "files", tmp_path / "a.tgz", [(link, b""), (outside, b"{}")])
    assert list(read_members(tmp_path / "a.tgz", r"[^/]*\.json")) == ["icons.json"]
    assert not (tmp_path.parent / "outside.json").exists()
    with pytest.raises(ValueError, match="has no file info.json"):
        read_json(tmp_path / "a.tgz", "info.json")


def test_a_member_that_claims_too_much_is_refused(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "icons.json").write_text("[1, 2, 3]")
    pack(tmp_path / "files", tmp_path / "a.tgz")
    monkeypatch.setattr(packages, "MAX_MEMBER_BYTES", 5)
    with pytest.raises(ValueError, match="claims 9 bytes"):
        read_json(tmp_path / "a.tgz", "icons.json")


def test_the_notice_names_every_package_with_author_and_licence():
    text = notice()
    for package in PACKAGES:
        assert package.name in text and package.author in text and package.license in text
    assert tiny_art().notice == notice((*SOURCES, packages.NAMES, packages.KEYWORDS))


# --- Concepts --------------------------------------------------------------------------------------------------------


def test_icons_are_matched_by_code_points_or_else_by_their_slugs():
    assert match_icons(["dog", "cat"], {"1F415-FE0F": "dog", "1f6b2": "bicycle"}, {}) == {"1f415": "dog"}
    by_slug = {"dog": "1f415", "kitchenknife": "1f52a", "flagitaly": "1f1ee-1f1f9", "beer": "1f37a"}
    icons = ["dog-2", "dog-1", "kitchen-knife", "italy", "flag-for-flag-italy", "unknown"]
    assert match_icons(icons, {}, by_slug) == {
        "1f415": "dog-1", "1f52a": "kitchen-knife", "1f1ee-1f1f9": "flag-for-flag-italy"
    }  # fmt: skip


def test_keys_have_no_variation_selectors_and_slugs_no_signs():
    assert key_of("2764-FE0F") == "2764" and key_of("1F3C3-1F3FB-200D-2640-FE0F") == "1f3c3-1f3fb-200d-2640"
    assert plain("Piñata") == plain("pinata") and plain("t-shirt") == "tshirt"


def test_regional_indicators_and_bare_skin_tones_are_no_concepts():
    assert len(tiny_art().concepts) == 24
    assert not {"regional indicator a", "light skin tone"} & {c.name for c in tiny_art().concepts.values()}


def test_concepts_have_further_names_keywords_and_tones():
    concept = tiny_art().concepts[key("car")]
    assert concept.names == ("automobile", "car") and concept.group == "travel" and "vehicle" in concept.keywords
    assert len(tiny_art().concepts[key("thumbs up")].tones) == 5
    assert tiny_art().concepts[key("flag of italy")].group == "flags"


def test_a_synonym_that_names_two_things_names_neither():
    def entry(hexcode, label):
        return {"hexcode": hexcode, "label": label, "emoji": chr(int(hexcode, 16)), "group": 3}

    entries = [entry("1F408", "cat"), entry("1F431", "cat face"), entry("1F9F6", "kitty")]
    names = [concept.names for concept in read_concepts(entries, {})]
    assert "kitty" in SYNONYMS["cat face"] and "kitty" not in names[1] and names[2] == ("kitty",)


# --- Drawings --------------------------------------------------------------------------------------------------------


def test_packages_become_the_stored_archive(tmp_path):
    pytest.importorskip("resvg_py", reason="needs the extra `emoji`")
    packed_packages(tmp_path)
    counts = make_art(tmp_path, tmp_path / "art.zip", SIDE, SOURCES, least_styles=2)
    made = Art(tmp_path / "art.zip")
    assert made.drawings.keys() == tiny_art().drawings.keys() and made.concepts == tiny_art().concepts
    assert sum(counts.values()) == 100
    for concept, style in made.drawings:
        difference = np.abs(made.sprite(concept, style).astype(int) - tiny_art().sprite(concept, style))
        assert difference.mean() < 2, (concept, style)


def test_icons_that_are_not_square_are_padded_and_touch_an_edge():
    # The watermelon of twemoji is wider than high.
    opacity = tiny_art().sprite(key("watermelon"), "twemoji")[..., 3] > 128
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    assert opacity.shape == (SIDE, SIDE) and np.ptp(columns) > SIDE - 3 > np.ptp(rows)
    assert abs(rows.mean() - (SIDE - 1) / 2) < 2


def test_drawings_are_kept_read_only_and_travel_to_other_processes_as_a_path():
    sprite = tiny_art().sprite(key("banana"), "3d")
    with pytest.raises(ValueError, match="read-only"):
        sprite[0, 0] = 0
    again = pickle.loads(pickle.dumps(tiny_art()))
    assert again.path == tiny_art().path and np.array_equal(again.sprite(key("banana"), "3d"), sprite)


def test_what_there_is_not_is_said_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="make_art.py"):
        Art(tmp_path / "art.zip")
    with pytest.raises(ValueError, match="no drawing streamline"):
        tiny_art().sprite(key("banana"), "streamline")


# --- Colours ---------------------------------------------------------------------------------------------------------


def test_hsv_and_back_gives_the_same_colours():
    rgb = np.random.default_rng(0).random((50, 3))
    np.testing.assert_allclose(to_rgb(to_hsv(rgb)), rgb, atol=1e-12)
    np.testing.assert_allclose(to_hsv(np.array([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 1], [0.2, 0.2, 0.2]])),
                               [[0, 1, 1], [120, 1, 0.5], [240, 1, 1], [0, 0, 0.2]], atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("color", HUES)
def test_a_plain_disc_is_named_by_its_colour_and_becomes_any_other(color):
    sprite = np.zeros((20, 20, 4), np.uint8)
    sprite[4:16, 4:16] = (*np.uint8(255 * to_rgb(np.array([HUES[color], 0.9, 0.95]))), 255)
    sprite[8:10, 8:10] = (250, 250, 250, 255)
    paint = ruling_paint(sprite)
    assert paint.name == color and abs((paint.hue - HUES[color] + 180) % 360 - 180) < 2
    for other in HUES:
        painted = recolor(sprite, paint, other)
        assert ruling_paint(painted).name == other
        assert np.array_equal(painted[8:10, 8:10], sprite[8:10, 8:10])
        assert np.array_equal(painted[..., 3], sprite[..., 3])


def test_brown_grey_and_many_coloured_drawings_have_no_ruling_colour():
    for color in ((110, 60, 20), (120, 120, 120), (20, 20, 20)):
        sprite = np.zeros((10, 10, 4), np.uint8)
        sprite[:] = (*color, 255)
        assert ruling_paint(sprite) is None
    sprite[:5] = (220, 20, 20, 255)
    sprite[5:] = (20, 200, 20, 255)
    assert ruling_paint(sprite) is None and ruling_paint(np.zeros((4, 4, 4), np.uint8)) is None
