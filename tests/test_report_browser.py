"""The page in headless Chromium: silence, sorting, filtering, tabs, keyboard, dark, phone, print; screenshots to look at.

Needs the package playwright (no browser of its own) and a Chromium on the machine: `pip install playwright`, on Debian
`apt-get install --no-install-recommends chromium`, elsewhere ZSQ_CHROMIUM names it. Screenshots go to ZSQ_ARTEFACTS where that is set.
ZSQ_REQUIRE_BROWSER makes a missing piece a failure.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_support import make_tiny, one_thread
from report_support import HAST, make_hostile, make_runs, overlapping, quantize

from zsq_fast.analysis import ANALYSES
from zsq_fast.cli import analyze, main

CHROMIUM = os.environ.get("ZSQ_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def _missing() -> str:
    for library in ("playwright", "jinja2", "matplotlib"):
        try:
            __import__(library)
        except ImportError:
            return f"needs {library}: pip install {library}"
    return "" if CHROMIUM else "needs Chromium: apt-get install chromium, or ZSQ_CHROMIUM"


MISSING = _missing()
if MISSING and os.environ.get("ZSQ_REQUIRE_BROWSER"):
    raise RuntimeError(MISSING)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of one run, one of two, and one of a run full of markup."""
    from zsq_fast.report import write_report

    root = tmp_path_factory.mktemp("runs")
    ait, hast = make_runs(root)
    hostile = Path(shutil.copytree(ait, root / "hostile"))
    make_hostile(hostile)
    given = {"one": [ait], "two": [ait, hast], "hostile": [hostile, ait]}
    return {name: write_report(runs, root / f"{name}.html")[0] for name, runs in given.items()}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A page with everything that `zsq-fast analyze` made of a run, and the figures as they were drawn."""
    from matplotlib.figure import Figure

    from zsq_fast.report import write_report

    figures: list[Any] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            figures.append(self)

    root = tmp_path_factory.mktemp("analysed")
    tiny = make_tiny(root)
    run = quantize(
        tiny, root / "hast", "hast", *HAST, "--track-updates", "--track-cosine", "1", "--eval-data", tiny.images
    )
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(analyze, "figure_class", lambda: Kept)
        words = ["analyze", str(run), "--allow-import", "--what", *ANALYSES, "--images", "8", "--batch-size", "8"]
        assert main(words) == 0
    return write_report([run], root / "analysed.html")[0], dict(zip(ANALYSES, figures, strict=True))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("ZSQ_ARTEFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280, height: int = 900, **options: Any) -> Iterator[Any]:
    """The page; at the end nothing may have been said, asked for or shown as a dialog."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    heard: list[str] = []
    context.on("request", lambda request: heard.append(request.url))
    page = context.new_page()
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    try:
        page.goto(path.as_uri())
        yield page
        assert [text for text in heard if not text.startswith("data:")] == [path.as_uri()]
    finally:
        context.close()


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser, pages, artefacts, name, scheme):
    with opened(browser, pages[name], color_scheme=scheme) as page:
        page.screenshot(path=artefacts / f"{name}-{scheme}-first-screen.png")
        page.screenshot(path=artefacts / f"{name}-{scheme}.png", full_page=True)
        colours = page.evaluate("""() => {
            const of = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
            return { paper: of("body", "backgroundColor"), ink: of("h1", "color"), soft: of(".fine", "color"), link: of(".fine a", "color"),
                     tick: of(".panels svg text", "fill"), curve: of(".panels svg path[style*=--s0]", "stroke") };
        }""")
        paper = luminance(colours.pop("paper"))
        assert paper < 0.02 if scheme == "dark" else paper > 0.9
        for what, colour in colours.items():  # WCAG 2.2: 4.5 for text, 3 for graphics
            light, dark = sorted((luminance(colour), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= (3 if what == "curve" else 4.5), (what, colour)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_first_screen_answers(browser, pages, name):
    with opened(browser, pages[name]) as page:
        result = page.locator("#result")
        assert result.bounding_box()["y"] + result.bounding_box()["height"] < 900
        text = result.inner_text()
        for part in ("Last epoch", "Chosen epoch", "Float", "Published", "Packed", "Time"):
            assert part in text


@pytest.mark.parametrize("width", [320, 375, 800])
@pytest.mark.parametrize("name", ["one", "two", "hostile"])
def test_no_sideways_scrolling(browser, pages, artefacts, name, width):
    with opened(browser, pages[name], width, 812, has_touch=True) as page:
        for tab in [None, *page.get_by_role("tab").all()]:
            if tab is not None:
                tab.click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        for summary in page.locator("summary").all():
            summary.click()
        page.screenshot(path=artefacts / f"{name}-{width}.png", full_page=True)
        wide = "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && /auto|scroll/"
        assert (
            page.evaluate(
                wide + ".test(getComputedStyle(e).overflowX) && e.clientWidth).map(e => e.outerHTML.slice(0, 80))"
            )
            == []
        )


def column(page: Any, table: Any, title: str) -> list[str]:
    heads = [text.strip().split(" ↑")[0].split(" ↓")[0] for text in table.locator("thead th").all_inner_texts()]
    return [
        row.locator("th, td").nth(heads.index(title)).inner_text() for row in table.locator("tbody tr:visible").all()
    ]


def test_tables_sort_and_filter(browser, pages):
    with opened(browser, pages["one"]) as page:
        table = page.locator("#layers table")
        before = column(page, table, "SQNR, dB")
        assert len(before) == 20 and before != sorted(before, key=float)
        head = table.get_by_role("columnheader", name="SQNR, dB")
        for order, reverse in (("ascending", False), ("descending", True)):
            head.get_by_role("button").click()
            values = [float(text) for text in column(page, table, "SQNR, dB")]
            assert values == sorted(values, reverse=reverse) and head.get_attribute("aria-sort") == order
        table.get_by_role("columnheader", name="Layer").get_by_role("button").click()
        names = column(page, table, "Layer")
        assert names[:3] == ["0", "3", "8"] and names[-1] == "act16"  # as people count, not 0, 16, 3
        assert head.get_attribute("aria-sort") == "none"
        table.get_by_role("columnheader", name="Weights").get_by_role("button").click()
        assert column(page, table, "Weights")[:4] == ["32", "216", "288", "–"]  # what has no number comes last
        page.get_by_label("Filter").fill("ACT1 activation")
        assert column(page, table, "Layer") == ["act1", *(f"act{i}" for i in range(10, 17))]
        assert page.locator(".filter output").inner_text() == "8 of 20 rows"
        page.get_by_label("Filter").fill("nothing")
        assert column(page, table, "Layer") == []


def test_tabs_switch_with_mouse_and_keys(browser, pages):
    with opened(browser, pages["two"]) as page:
        tabs = page.get_by_role("tablist", name="Analyses").get_by_role("tab")
        assert tabs.all_inner_texts() == ["Forecast", "Layers", "mine"]
        panels = page.locator("#analyses [role=tabpanel]")
        visible = lambda: [panel.is_visible() for panel in panels.all()]  # noqa: E731
        assert visible() == [True, False, False]
        tabs.nth(1).click()
        assert visible() == [False, True, False] and tabs.nth(1).get_attribute("aria-selected") == "true"
        for key, shown in (("ArrowRight", 2), ("ArrowRight", 0), ("ArrowLeft", 2), ("Home", 0), ("End", 2)):
            page.keyboard.press(key)
            assert visible().index(True) == shown and visible().count(True) == 1
            assert page.evaluate("document.activeElement.textContent") == ["Forecast", "Layers", "mine"][shown]
        runs = page.get_by_role("tablist", name="Runs")
        assert runs.count() == 2  # layers and images
        runs.first.get_by_role("tab", name="hast").click()
        assert (
            "8×4×3×3" in page.locator("#layers").inner_text()
            and "SQNR" not in page.locator("#layers thead:visible").inner_text()
        )


@pytest.mark.parametrize("width", [1280, 375])
def test_real_analyses(browser, analysed, artefacts, width):
    with opened(browser, analysed[0], width) as page:
        tabs = page.locator("#analyses [role=tab]")
        assert tabs.count() == len(ANALYSES)
        for tab in tabs.all():
            tab.click()
            name = tab.inner_text().lower().replace(" ", "-")
            page.locator("#analyses").screenshot(path=artefacts / f"analysis-{name}-{width}.png")
            picture = page.locator("#analyses img:visible")
            assert picture.count() == 1 and picture.evaluate("e => e.complete && e.naturalWidth > 300")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            # A name has one line, however long its value.
            heights = page.locator("#analyses .numbers th:visible").evaluate_all("all => all.map(e => e.clientHeight)")
            assert heights and max(heights) < 40


@pytest.mark.parametrize("name", ANALYSES)
def test_no_text_of_a_picture_lies_on_another(analysed, name):
    assert overlapping(analysed[1][name]) == []


def test_everything_is_there_without_javascript(browser, pages):
    with opened(browser, pages["two"], java_script_enabled=False) as page:
        for heading in ("Forecast", "Layers", "mine"):
            assert page.locator("#analyses").get_by_role("heading", name=heading, exact=True).is_visible()
        assert page.locator("#layers table").count() == 2 == page.locator("#layers table:visible").count()
        assert page.locator("#images .sheet img:visible").count() >= 2
        assert page.locator("main button, main input").count() == 0


def test_keyboard(browser, pages):
    with opened(browser, pages["one"]) as page:
        page.keyboard.press("Tab")
        skip = page.locator(".skip")
        assert skip.evaluate("e => e === document.activeElement") and skip.bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        assert page.url.endswith("#result")
        seen = []
        for _ in range(200):
            page.keyboard.press("Tab")
            style, name, width = page.evaluate("""() => {
                const e = document.activeElement, style = getComputedStyle(e);
                return [style.outlineStyle, e.tagName + " " + (e.textContent || e.type), parseFloat(style.outlineWidth)];
            }""")
            if name.startswith("BODY"):
                break
            assert style == "solid" and width >= 2, name
            seen.append(name)
        wanted = (
            "A Papers",
            "A SVG",
            "BUTTON Forecast",
            "INPUT search",
            "BUTTON Weights",
            "SUMMARY All options",
            "A report_files",
        )
        assert [
            w for w in wanted[:-1] if w not in seen
        ] == [] and "BUTTON mine" not in seen  # a list of tabs is one stop
        page.locator("#layers").get_by_role("button", name="Weights").focus()
        page.keyboard.press("Enter")
        assert page.locator("#layers th[aria-sort=ascending]").inner_text().startswith("Weights")


def test_print(browser, pages, artefacts):
    with opened(browser, pages["two"]) as page:
        page.pdf(path=artefacts / "two.pdf", format="A4")
        assert (artefacts / "two.pdf").stat().st_size > 20_000
        page.emulate_media(media="print")
        page.screenshot(path=artefacts / "two-print.png", full_page=True)
        assert all(panel.is_visible() for panel in page.locator("[role=tabpanel]").all())
        assert (
            not page.locator("nav").is_visible()
            and page.locator("[role=tablist]:visible, .filter:visible").count() == 0
        )
        assert page.locator("#layers tbody tr:visible").count() == 23  # no part of a long table stays behind its edge
        assert page.locator(".long").evaluate("e => e.scrollHeight <= e.clientHeight + 1")
        assert page.locator(".options").first.is_visible()


def test_structure(browser, pages):
    with opened(browser, pages["two"]) as page:
        assert (
            page.get_by_role("main").count()
            == page.get_by_role("navigation").count()
            == page.locator("h1").count()
            == 1
        )
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
        doubled = "[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i)"
        assert page.evaluate(doubled) == []
        silent = "filter(e => !(e.alt || e.ariaLabel || e.labels?.length)).length"
        named = f"[...document.querySelectorAll('img, [role=img], [role=region], input')].{silent}"
        assert page.evaluate(named) == 0
        numbers = (
            "[...document.querySelectorAll('td.number')].filter(e => getComputedStyle(e).textAlign !== 'right').length"
        )
        assert page.evaluate(numbers) == 0
        assert "tabular-nums" in page.locator("#layers table").first.evaluate(
            "e => getComputedStyle(e).fontVariantNumeric"
        )


def test_markup_of_a_run_does_nothing(browser, pages, artefacts):
    with opened(browser, pages["hostile"]) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("script").count() == 1 and page.locator("img[src=x]").count() == 0
        page.get_by_role("tab", name="ait").first.click()
        page.locator("#layers").get_by_role("button", name="Bits").first.click()
        page.screenshot(path=artefacts / "hostile.png", full_page=True)
        assert page.evaluate("window.hacked") is None
