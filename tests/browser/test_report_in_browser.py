"""The page as people see it, in a real Chromium: pictures load, nothing sticks out, nothing is fetched or run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_powerflow.report.page import build_report
from megatron_powerflow.report.pictures import WIDTH
from megatron_powerflow.report.plot_style import STYLE
from tests.headless_chromium import Browser, why_not
from tests.report_folders import HOSTILE, make_evaluation, make_run, spoil

pytestmark = [pytest.mark.browser, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

WIDTHS = (1280, 800)
SIZES = [value for name, value in STYLE.items() if name.endswith(("size", "labelsize")) and "marker" not in name]
# Elements that end right of the window, other than inside what scrolls on its own; and text cut by its own box.
STICKING_OUT = """
const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > wide + 0.5 && !e.parentElement.closest(".scroll"))
  .map(e => e.tagName + ": " + e.textContent.slice(0, 60));
"""
CUT = """
const texts = [...document.querySelectorAll("pre, p, dd, li, figcaption")];
return texts.filter(e => e.scrollWidth > e.clientWidth + 1).length;
"""
PICTURES = """
document.querySelectorAll("details").forEach(e => e.open = true);
return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Nine arms, three of them with seeds, one from a folder that means harm."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for seed in range(3):
        for preset in ("la_tb", "rl_token", "tb_traj"):
            made.append(make_run(root / f"{preset}_{seed}", seed=seed, preset=preset, trap=preset == "la_tb"))
    made += [make_run(root / f"alpha_{alpha}", seed=0, preset="tb_token", alpha=alpha) for alpha in (0.5, 1.0, 2.0)]
    made.append(make_run(root / "hostile", seed=0))
    spoil(made[-1])
    make_evaluation(made[-1] / "evaluation", accuracy=0.5, model=HOSTILE, data=HOSTILE * 3, tasks=(HOSTILE, "b"))
    made.append(make_evaluation(root / "base", accuracy=0.41, diversity={"distinct_2": 0.62, "self_bleu": 0.4}))
    made.append(make_evaluation(root / "cold", accuracy=0.97, temperature=0.25, quality=0.7))
    return build_report(made, root / "report", "powerflow report " + "runs/with_a_long_name " * 20)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_loads_and_is_large_enough_to_read(browser, page, width):
    browser.open(page, width=width)
    pictures = browser.run(PICTURES)
    assert len(pictures) == 7
    for complete, natural_width, shown_width in pictures:
        assert complete
        assert natural_width == 1650
        assert min(SIZES) * shown_width / 96 / WIDTH >= 9  # points of the smallest letters, as shown


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_of_the_window(browser, page, width):
    browser.open(page, width=width)
    browser.run(PICTURES)  # opens what is folded
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(STICKING_OUT) == []
    assert browser.run(CUT) == 0


def test_the_table_of_arms_needs_no_scrolling_on_a_wide_window(browser, page):
    browser.open(page, width=1280)
    inner, outer = browser.run('const t = document.querySelector(".scroll"); return [t.scrollWidth, t.clientWidth]')
    assert inner <= outer


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_fetched_run_or_complained_about(browser, page, width):
    browser.open(page, width=width)
    browser.run(PICTURES)
    assert browser.console() == []
    asked = browser.requests()
    assert page.resolve().as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert browser.run("return document.scripts.length") == 0


def test_these_checks_see_a_page_that_is_wrong(browser, tmp_path):
    """The control: an image from elsewhere, something too wide, a script that fails."""
    page = tmp_path / "wrong.html"
    page.write_text(
        "<!doctype html><p>a</p><div style='width:3000px'>b</div><img src='http://192.0.2.1/x.png'>"
        "<pre style='width:20px;overflow:hidden'>too long for it</pre><script>missing()</script>"
    )
    browser.open(page, width=800)
    assert browser.run("return document.documentElement.scrollWidth") > 800
    assert any(found.startswith("DIV") for found in browser.run(STICKING_OUT))
    assert browser.run(CUT) == 1
    assert browser.run(PICTURES)[0][1] == 0
    assert any("missing is not defined" in line for line in browser.console())
    assert "http://192.0.2.1/x.png" in browser.requests()
