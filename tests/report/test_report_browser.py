"""The page in a real browser: no errors, curves that are seen, nothing wider than a phone.

Needs the package playwright and a Chromium: its own, or the system's.
"""

import os
import shutil
from pathlib import Path

import pytest
from logs import lines_of, whole_log

from mlx_edgelora.report.page import write_report

pytestmark = pytest.mark.slow

SIZES = {"desktop": (1280, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, [own, "chromium", "google-chrome"])), None)
        if path is None:
            pytest.skip("needs a Chromium: playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "run.html"
    write_report(lines_of(whole_log()), "log", target)
    return target


@pytest.fixture
def opened(browser, file):
    """opened(size, scheme) -> the page. At the end: no complaint, and nothing else loaded."""
    pages, wrong, requests = [], [], []

    def open_page(size, scheme="light", **more):
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        page = browser.new_page(viewport=viewport, color_scheme=scheme, **more)
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == [] and requests == [file.as_uri()] * len(pages)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_curves_are_seen(opened, size, scheme):
    page = opened(size, scheme)
    colours = set()
    for path in page.locator("path.line, path.dots, path.bars").all():
        box = path.bounding_box()
        assert path.is_visible() and box["width"] > 3 and box["height"] > 1
        style = path.evaluate("e => [getComputedStyle(e).stroke, getComputedStyle(e).fill]")
        colours |= {colour for colour in style if colour != "none"}
    assert len(colours) >= 6
    page_width = page.evaluate("document.documentElement.scrollWidth")
    assert page_width <= SIZES[size][0]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, background[4:-1].split(",")))
    assert (lightness > 600) == (scheme == "light")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{size}-{scheme}.png", full_page=True)


@pytest.mark.parametrize("size", SIZES)
def test_no_label_is_cut_off_or_on_another(opened, size):
    page = opened(size)
    labels = page.locator(".left span, .bottom span").all()
    boxes = [label.bounding_box() for label in labels]
    assert len(boxes) > 20
    for number, one in enumerate(boxes):
        assert one["x"] >= 0 and one["x"] + one["width"] <= SIZES[size][0]
        for other in boxes[number + 1 :]:
            apart = (
                one["x"] + one["width"] <= other["x"]
                or other["x"] + other["width"] <= one["x"]
                or one["y"] + one["height"] <= other["y"] + 2
                or other["y"] + other["height"] <= one["y"] + 2
            )
            assert apart, (one, other)


def test_the_pointer_shows_figures(opened):
    page = opened("desktop")
    area = page.locator(".area").first
    assert area.locator(".hint").evaluate("e => getComputedStyle(e).opacity") == "0"
    area.hover(position={"x": 10, "y": 50})
    hint = area.locator(".hint")
    assert hint.inner_text().startswith("step 0: validation 3.3")
    assert hint.evaluate("e => getComputedStyle(e).opacity") == "1"


def test_without_javascript_it_is_complete(opened):
    page = opened("desktop", java_script_enabled=False)
    assert page.locator("path.line").count() == 5
    assert page.locator(".hint").count() == 0
