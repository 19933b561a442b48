"""The page in a real browser: it loads alone, and a keyboard is enough for everything."""

import base64
import io
import json

import pytest

from pagedattn.report import cli

matplotlib_image = pytest.importorskip("matplotlib.image")
pytestmark = [pytest.mark.browser, pytest.mark.undisturbed]

ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium that keeps its console and what it asks the network for."""
    import shutil

    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if found is not None:
        options.binary_location = found
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory):
    """A report of a whole run, and a comparison in which five rows are slower."""
    folder = tmp_path_factory.mktemp("pages")
    content = made.h100()
    path = made.write(folder / "run.json", content)
    assert cli.main([str(path), "--out", str(folder), "--formats", "png"]) == 0
    for row in content["benchmarks"][:5]:
        row["stats"] = made.benchmark("slower", 2 * row["stats"]["median"])["stats"]
    other = made.write(folder / "other.json", content)
    out = str(folder / "comparison.html")
    assert cli.main(["compare", str(path), str(other), "--html", out]) == 0
    return folder


@pytest.fixture
def report(browser, pages):
    show(browser, pages / "report.html")
    return browser


def show(browser, path, *, width=1200, scheme="light"):
    """Load a page as a screen of so many pixels and a system with this colour scheme does.

    One that differs from the page before in `#main` alone may still load when `get` returns.
    """
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    state = "return document.readyState + ' ' + location.href"
    loaded = f"complete {path.as_uri()}"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(state) == loaded)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def focus(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).focus()", selector)


def texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return browser.execute_script(script, selector)


def picture(browser):
    """The screen as an array of red, green and blue, from 0 to 1."""
    from selenium.common.exceptions import TimeoutException

    try:
        answer = browser.execute_cdp_cmd("Page.captureScreenshot", {})
    except TimeoutException:  # a busy machine draws no frame for so long; there is another
        answer = browser.execute_cdp_cmd("Page.captureScreenshot", {})
    return matplotlib_image.imread(io.BytesIO(base64.b64decode(answer["data"])))[..., :3]


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_loads_without_an_error_and_asks_for_nothing(browser, pages, name):
    path = pages / f"{name}.html"
    show(browser, path)
    assert browser.execute_script("return document.readyState") == "complete"
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked[0] == path.as_uri()
    assert {url for url in asked[1:] if not url.startswith("data:")} == set()


def test_the_policy_of_the_page_stops_a_request(report):
    report.execute_script(
        "const one = new Image(); one.src = 'http://127.0.0.1:9/x.png'; document.body.append(one)"
    )
    messages = [entry["message"] for entry in report.get_log("browser")]
    assert any("Content Security Policy" in message for message in messages)


def test_tab_reaches_every_control_in_the_order_of_the_page(report):
    from selenium.webdriver.common.keys import Keys

    count = report.execute_script(
        "window.controls = [...document.querySelectorAll('a, button, input, select, summary,"
        ' [tabindex="0"]\')].filter((e) => !e.disabled && e.checkVisibility());'
        "return window.controls.length"
    )
    assert count > 50
    order, seen = [], []
    for _ in range(count):
        press(report, Keys.TAB)
        place, outline = report.execute_script(
            "const e = document.activeElement;"
            "return [window.controls.indexOf(e), getComputedStyle(e).outlineStyle]"
        )
        order.append(place)
        seen.append(outline)
    assert order == list(range(count))
    assert set(seen) == {"solid"}


def test_the_skip_link_leads_to_the_report(report):
    from selenium.webdriver.common.keys import Keys

    press(report, Keys.TAB)
    place = report.execute_script("return document.activeElement.getBoundingClientRect().left")
    assert place >= 0
    press(report, Keys.ENTER)
    assert report.current_url.endswith("#main")


def test_a_table_is_sorted_by_the_keyboard_and_back(report):
    from selenium.webdriver.common.keys import Keys

    column = "#rows-table tbody td:nth-child(3)"
    before = texts(report, column)
    focus(report, "#rows-table thead th:nth-child(3) button")
    press(report, Keys.ENTER)
    head = "return document.querySelector('#rows-table th:nth-child(3)').getAttribute('aria-sort')"
    assert report.execute_script(head) == "ascending"
    rising = [float(text.replace(",", "")) for text in texts(report, column)]
    assert rising == sorted(rising)
    press(report, Keys.SPACE)
    assert report.execute_script(head) == "descending"
    falling = [float(text.replace(",", "")) for text in texts(report, column)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > rising[-1]  # all lines were sorted, not those of one page
    press(report, Keys.ENTER)
    assert report.execute_script(head) is None
    assert texts(report, column) == before


def test_times_are_sorted_by_their_length_and_missing_ones_are_last(report):
    from selenium.webdriver.common.keys import Keys

    units = {"ns": 1e-3, "µs": 1, "ms": 1e3, "s": 1e6}
    focus(report, "#headline-table thead th:nth-child(3) button")
    press(report, Keys.ENTER, Keys.ENTER)
    found = [text.split() for text in texts(report, "#headline-table tbody td:nth-child(3)")]
    times = [float(value) * units[unit] for value, unit in found]
    assert times == sorted(times, reverse=True)
    assert len({unit for _, unit in found}) > 1
    for _ in range(2):
        focus(report, "#headline-table thead th:nth-child(4) button")
        press(report, Keys.ENTER)
        assert texts(report, "#headline-table tbody td:nth-child(4)")[0] != "-"


def test_a_table_is_filtered_and_turned_page_by_page(report):
    from selenium.webdriver.common.keys import Keys

    first = texts(report, "#rows-table tbody th")
    said = texts(report, "#rows-table output")[0]
    assert said.startswith("1 to 25 of ")
    focus(report, "#rows-table .next")
    press(report, Keys.ENTER)
    assert texts(report, "#rows-table output")[0].startswith("26 to 50 of ")
    assert texts(report, "#rows-table tbody th") != first
    focus(report, "#rows-table input")
    press(report, "KV write", Keys.SPACE, "TRITON")
    assert set(texts(report, "#rows-table tbody td:nth-child(2)")) == {"triton"}
    assert texts(report, "#rows-table output")[0].startswith("1 to 2 of 2, filtered from ")
    press(report, "nothing has this")
    assert texts(report, "#rows-table output")[0].startswith("no line, filtered from ")
    assert texts(report, "#rows-table tbody tr") == []


def test_the_data_of_a_plot_opens_by_the_keyboard(report):
    from selenium.webdriver.common.keys import Keys

    opened = "return document.querySelector('#roofline details').open"
    assert report.execute_script(opened) is False
    focus(report, "#roofline summary")
    press(report, Keys.ENTER)
    assert report.execute_script(opened) is True
    shown = "return document.querySelector('#roofline details table').checkVisibility()"
    assert report.execute_script(shown) is True


def test_other_rows_rounds_are_drawn_when_they_are_chosen(report):
    from selenium.webdriver.common.keys import Keys

    lines = "return document.querySelectorAll('#ecdf-picture .curve').length"
    assert report.execute_script(lines) == 3
    label = "return document.querySelector('#ecdf-picture').getAttribute('aria-label')"
    before = report.execute_script(label)
    focus(report, "#ecdf-rows")
    press(report, Keys.END)
    name = report.execute_script("return document.querySelector('#ecdf-rows').value")
    assert report.execute_script(lines) == 1
    assert texts(report, "#ecdf .legend li") == [name]
    after = report.execute_script(label)
    assert after != before
    assert name in after
    assert name in texts(report, "#ecdf figcaption")[0]
    assert [entry["message"] for entry in report.get_log("browser")] == []


def test_the_first_drawing_is_the_one_that_choosing_the_same_rows_makes(report):
    points = (
        "return [...document.querySelectorAll('#ecdf-picture .curve')]"
        ".map((e) => e.getAttribute('points').split(/[ ,]/).map(Number))"
    )
    before = report.execute_script(points)
    report.execute_script("document.querySelector('#ecdf-rows').dispatchEvent(new Event('change'))")
    after = report.execute_script(points)
    assert len(before) == len(after) == 3
    for old, new in zip(before, after, strict=True):
        assert new == pytest.approx(old, abs=0.06)


def test_the_theme_is_switched_by_the_keyboard(report):
    from selenium.webdriver.common.keys import Keys

    paper = "return getComputedStyle(document.body).backgroundColor"
    assert report.execute_script(paper) == "rgb(255, 255, 255)"
    focus(report, "#theme")
    press(report, Keys.ENTER)
    assert texts(report, "#theme") == ["Theme: light"]
    press(report, Keys.ENTER)
    assert texts(report, "#theme") == ["Theme: dark"]
    assert report.execute_script(paper) == "rgb(20, 23, 26)"
    press(report, Keys.ENTER)
    assert texts(report, "#theme") == ["Theme: system"]
    assert report.execute_script(paper) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [1200, 360])
def test_light_and_dark_differ_and_neither_is_blank(browser, pages, name, width):
    seen = {}
    for scheme in ("light", "dark"):
        show(browser, pages / f"{name}.html", width=width, scheme=scheme)
        seen[scheme] = picture(browser)
        assert seen[scheme].std() > 0.05
        # no part of the page is wider than the screen; tables and plots scroll in themselves
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert seen["light"].mean() > 0.8
    assert seen["dark"].mean() < 0.3
    assert abs(seen["light"] - seen["dark"]).mean() > 0.5


def test_every_plot_is_drawn_and_no_label_leaves_its_picture(report):
    sizes = report.execute_script(
        "return [...document.querySelectorAll('svg[role=img]')].map((svg) => {"
        "  const all = svg.getBBox(), box = svg.viewBox.baseVal;"
        "  return [all.x, all.y, box.width - all.x - all.width, box.height - all.y - all.height,"
        "    svg.getBoundingClientRect().width]; })"
    )
    assert len(sizes) > 10
    for left, top, right, bottom, width in sizes:
        assert min(left, top, right, bottom) >= -1
        assert width > 200
