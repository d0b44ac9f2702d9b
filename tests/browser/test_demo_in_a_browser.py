"""The demo as its user starts it, in a headless browser; `make browser` runs this.

Screenshots are written to the folder that `SCREENSHOTS` names, else to a temporary one.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from playwright.sync_api import Page, expect, sync_playwright


BUNDLED = Path(__file__).parents[2] / "checkpoints" / "nextflow-shapes"
PROMPT = "a red circle and a blue square"
SECONDS = 120  # until it answers, on a machine that does other things too
expect.set_options(timeout=30_000)
PHONE = {"width": 360, "height": 740}
# What is seen of an image on the page: its width in pixels of the file, and the mean colour of its upper left quarter.
SEEN = """async image => {
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width / 2, canvas.height / 2).data;
    const sums = [0, 0, 0];
    pixels.forEach((value, index) => { if (index % 4 < 3) sums[index % 4] += 4 * value / pixels.length; });
    return [canvas.width, ...sums];
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    command = [sys.executable, "-m", "transformers_nextflow.cli", "demo", str(BUNDLED), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            for _ in range(SECONDS):
                assert process.poll() is None, log.read_text()
                try:
                    urlopen(url, timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser():
    # Debian's, where there is one; else the one that `playwright install chromium` has brought.
    options = {"executable_path": path} if (path := shutil.which("chromium")) else {}
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(args=["--no-sandbox"], **options)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, address):
    def opened(width: int = 1000, height: int = 900) -> Page:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(30_000)
        page.goto(address)
        expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
        return page

    return opened


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Screenshots are in {folder}.")
    return folder


def drawn(page: Page, gallery: str, caption: str = "seed 0"):
    """The first image of a gallery, once it is there with all of its scales."""
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_text("scale 8").wait_for()
    images = panel.locator(".gallery").filter(has_text=gallery)
    images.get_by_text(caption).first.wait_for()
    expect(page.locator(".generating")).to_have_count(0)  # Gradio's mark of what goes on
    return images.locator("img").first


def draw(page: Page, prompt: str = PROMPT):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Enter")
    return drawn(page, "Images")


def test_a_prompt_is_typed_and_enter_draws_it(open_page, screenshots):
    page = open_page()
    page.keyboard.type(PROMPT)  # the field has the focus
    page.keyboard.press("Enter")
    width, red, _, blue = drawn(page, "Images").evaluate(SEEN)
    assert width == 64 and red > 30 > blue  # the red circle is in the upper left quarter
    page.screenshot(path=screenshots / "demo_draw.png", full_page=True)


def test_the_keyboard_reaches_the_button_behind_the_prompt_and_all_tabs(open_page):
    page = open_page()
    page.keyboard.type("a green star")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_focused()
    page.keyboard.press("Space")
    drawn(page, "Images")
    page.get_by_role("tab", name="Draw").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_label("Instruction").wait_for()


def test_candidates_are_drawn_with_their_scores(open_page):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Candidates").fill("3")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.keyboard.press("Enter")
    page.get_by_text("score").nth(2).wait_for()


def test_a_mask_is_painted_and_the_edit_seen(open_page, screenshots):
    page = open_page()
    draw(page)
    page.get_by_role("button", name="Edit the chosen image").click()
    canvas = page.locator("canvas").first
    expect(page.get_by_text("56%")).to_be_visible()  # 512 pixels wide, as it fits
    box = canvas.bounding_box()
    middle, top, side = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, 0.56 * 512
    page.mouse.move(middle - 0.42 * side, top - 0.42 * side)
    page.mouse.down()
    for row in range(5):  # over the upper left quarter
        page.mouse.move(middle - (0.1 if row % 2 == 0 else 0.42) * side, top - (0.42 - 0.08 * row) * side, steps=3)
    page.mouse.up()
    page.get_by_label("Instruction").fill("make the red circle green")
    page.keyboard.press("Enter")
    _, red, green, _ = drawn(page, "Edited images").evaluate(SEEN)
    assert green > 20 > red
    page.screenshot(path=screenshots / "demo_edit.png", full_page=True)


def test_an_image_is_varied(open_page, screenshots):
    page = open_page()
    draw(page)
    page.get_by_role("button", name="Vary the chosen image").click()
    page.get_by_label("Prompt of the image as a whole").fill(PROMPT)
    page.keyboard.press("Enter")
    drawn(page, "Variations", "seed 3")
    page.screenshot(path=screenshots / "demo_vary.png", full_page=True)


def test_a_chat_draws_and_answers(open_page, screenshots):
    page = open_page()
    page.get_by_role("tab", name="Chat").click()
    message = page.get_by_placeholder("Enter sends")
    message.fill("draw a red circle.")
    message.press("Enter")
    page.locator(".bot img").first.wait_for()
    message.fill("make the background blue")
    message.press("Enter")
    page.locator(".bot img").nth(1).wait_for()
    page.screenshot(path=screenshots / "demo_chat.png", full_page=True)


def test_bad_input_is_a_message_on_the_page(open_page):
    page = open_page()
    page.keyboard.press("Enter")
    page.get_by_text("There is no prompt; say what is to be drawn.").wait_for()
    draw(page)  # and the page goes on


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page, screenshots):
    page = open_page(**PHONE)
    draw(page)
    page.screenshot(path=screenshots / "demo_phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.get_by_role("button", name="Edit the chosen image").click()
    page.get_by_label("Instruction").wait_for()
    for name in ("Edit", "Vary", "Chat", "Draw"):
        # Gradio has a hidden list of the tabs besides, by which it measures them.
        page.locator(".tab-container:not(.visually-hidden)").get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
