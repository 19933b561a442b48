"""The HTML page: what it loads, names and escapes, for people and for a screen reader."""

import json
import re
import sys
from importlib.resources import files

import pytest

from pagedattn.report import cli
from pagedattn.report.html.figure import MOST_STATIC
from pagedattn.report.html.page import make_page
from pagedattn.report.results import load_run
from pagedattn.report.summary import summarise
from pagedattn.testing.pages import parse_page, table_lines

HOSTILE = "a|b\n<script>alert(1)</script>\"'</script><!-- &amp; {{ 7 * 7 }} \u202e"
SHOWN = "a|b <script>alert(1)</script>\"'</script><!-- &amp; {{ 7 * 7 }} \ufffd"


def page_text(*paths, baseline=None):
    run = load_run(list(paths))
    return make_page(run, summarise(run.rows, baseline), "python tools/plot.py run.json")


@pytest.fixture(scope="module", params=["h100", "cpu", "peers", "small"])
def text(request, made, tmp_path_factory):
    """The page of each kind of run."""
    folder = tmp_path_factory.mktemp("page")
    return page_text(made.write(folder / "run.json", getattr(made, request.param)()))


@pytest.fixture
def page(text):
    return parse_page(text)


def test_nothing_is_loaded_from_anywhere(text, page):
    for element in page.all():
        assert "src" not in element.attributes
        assert not any(name.startswith("on") for name in element.attributes)
        target = element.attributes.get("href", "#")
        assert target.startswith("#") or target == "data:,"
    assert not page.all("img", "iframe", "object", "embed", "form", "base", "image", "use")
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy.startswith("default-src 'none';")
    addresses = set(re.findall(r"https?://[^\"'\s<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name space, which nothing loads


def test_every_plot_says_in_numbers_what_is_seen_and_has_its_data(page):
    figures = page.all("figure")
    assert figures
    for figure in figures:
        pictures = figure.all("svg", role="img")
        assert pictures
        for picture in pictures:
            assert re.search(r"\d", picture.attributes["aria-label"])
            assert len(picture.attributes["aria-label"]) > 40
        assert re.search(r"\d", figure.one("figcaption").text)
        details = figure.one("details")
        assert details.one("summary").text.startswith("The data behind")
        tables = details.all("table")
        assert tables
        for table in tables:
            assert len(table.one("tbody").all("tr")) >= 1
            assert len(table.one("thead").all("th")) == len(table.all("tr")[1].inside)
    for svg in page.all("svg"):
        assert svg.attributes.get("role") == "img" or svg.attributes["aria-hidden"] == "true"


def test_ids_are_unique_and_everything_that_is_pointed_at_is_there(page):
    identities = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(identities) == len(set(identities))
    assert all(re.fullmatch(r"[a-z0-9-]+", identity) for identity in identities)
    for element in page.all():
        for name in ("for", "aria-labelledby", "aria-controls"):
            assert element.attributes.get(name, identities[0]) in identities
        if element.attributes.get("href", "").startswith("#"):
            assert element.attributes["href"][1:] in identities


def test_the_keyboard_meets_things_in_the_order_of_the_page(page):
    places = {e.attributes["tabindex"] for e in page.all() if "tabindex" in e.attributes}
    assert places <= {"0", "-1"}
    assert page.all("a")[0].attributes["class"] == "skip"
    for table in page.all("table"):
        assert table.all("th", scope="col")
    for element in page.all("input", "select"):
        assert "aria-controls" in element.attributes or "id" in element.attributes
    assert page.one("html").attributes["lang"] == "en"
    assert len(page.all("h1")) == 1


def test_the_first_lines_of_a_long_table_are_in_the_page_and_all_are_in_its_script(page):
    for table in (one for one in page.all("div", class_="table") if one.all("script")):
        lines = json.loads(table.one("script").text)["lines"]
        shown = [[c.text for c in line.all("th", "td")] for line in table.one("tbody").all("tr")]
        assert shown == lines[:MOST_STATIC]


def hostile_run(made):
    """A run in which every name is hostile."""
    content = made.h100()
    content["benchmarks"] = content["benchmarks"][:6] + content["benchmarks"][-12:]
    for place, row in enumerate(content["benchmarks"]):
        extra = row["extra_info"]
        extra["workload"] = f"{HOSTILE}{place // 4}"
        extra["device"] = HOSTILE
        extra["implementation"] = f"{HOSTILE}{place % 4}"
        row["fullname"] = f"x::{HOSTILE}{place}"
        for name in ("operation", "kind", "model"):
            if name in extra:
                extra[name] = HOSTILE
    own = content["machine_info"]["pagedattn"]
    own["gpu"]["name"] = own["machine"]["cpu"] = HOSTILE
    own["versions"][HOSTILE] = HOSTILE
    content["commit_info"]["id"] = HOSTILE
    return content


def test_names_of_any_kind_are_shown_as_they_are_and_run_nothing(made, tmp_path):
    path = made.write(tmp_path / "run.json", hostile_run(made))
    text = page_text(path, path)
    page = parse_page(text)
    kinds = {"lines", "choices", None}
    assert {script.attributes.get("class") for script in page.all("script")} <= kinds
    (own,) = [script for script in page.all("script") if not script.attributes]
    assert "alert(" not in own.text
    assert "alert(1)</script" not in text
    assert table_lines(page, "headline-table")[0][0].startswith(SHOWN)
    machine = {line[0]: line[1] for line in table_lines(page, "environment-table")}
    assert machine["GPU"] == machine["commit"] == SHOWN
    assert SHOWN in machine
    choices = json.loads(page.one("script", class_="choices").text)
    assert choices["names"][0].startswith(SHOWN)
    assert not page.all("alert")
    assert "49" not in table_lines(page, "headline-table")[0][0]
    assert not re.search(r"\u202e|\\u202e", text)  # it would turn the text after it round


def test_hostile_names_of_a_comparison_run_nothing_either(made, tmp_path, capsys):
    path = made.write(tmp_path / "run.json", hostile_run(made))
    out = tmp_path / "page.html"
    assert cli.main(["compare", str(path), str(path), "--html", str(out)]) == 0
    text = out.read_text("utf-8")
    parse_page(text)
    assert "alert(1)</script" not in text
    assert not re.search(r"\u202e|\\u202e", text)
    assert f"Written: {out}" in capsys.readouterr().out


def test_a_file_name_that_is_markup_is_text(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = made.write(tmp_path / "<b>&run.json", made.small())
    page = parse_page(page_text(path))
    assert "4 rows of <b>&run.json" in page.one("header").text
    assert not page.all("b")


def colours(theme):
    """The page's colours as numbers from 0 to 1, of the light theme or the dark one."""
    css = (files("pagedattn.report.html") / "assets" / "page.css").read_text("utf-8")
    start = ":root {" if theme == "light" else ':root[data-theme="dark"] {'
    block = css[css.index(start) :].partition("}")[0]
    found = {}
    for name, value in re.findall(r"--([\w]+): (#\w{6}|\d+, \d+, \d+)", block):
        parts = (
            value.split(",")
            if "," in value
            else [str(int(value[i : i + 2], 16)) for i in (1, 3, 5)]
        )
        found[name] = tuple(int(part) / 255 for part in parts)
    levels = {
        f"{name}{level}": (name, float(alpha))
        for name, level, alpha in re.findall(
            r"\.(up|down)(\d) \{ fill: rgba\([^.]*?, (\.\d+)\)", css
        )
    }
    return found, levels


def contrast(one, other):
    """The ratio that WCAG 2.2 defines, from 1 to 21."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_and_lines_are_seen(theme):
    found, levels = colours(theme)
    for ground in ("paper", "card", "grid"):
        for text in ("ink", "soft"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for text in ("link", "slower", "faster", "unclear", "same"):
        assert contrast(found[text], found["paper"]) >= 4.5, text
    for mark in (*(f"c{place}" for place in range(8)), "line", "focus", "token"):
        assert contrast(found[mark], found["paper"]) >= 3, mark
    assert len(levels) == 10
    for name, (hue, alpha) in levels.items():
        mixed = [
            alpha * a + (1 - alpha) * b for a, b in zip(found[hue], found["paper"], strict=True)
        ]
        assert contrast(found["ink"], mixed) >= 4.5, name


def test_both_ways_to_a_dark_page_have_the_same_colours():
    css = (files("pagedattn.report.html") / "assets" / "page.css").read_text("utf-8")
    chosen = css[css.index(':root[data-theme="dark"] {') :].partition("{")[2].partition("}")[0]
    system = css[css.index(':root:not([data-theme="light"]) {') :].partition("{")[2]
    assert chosen.split() == system.partition("}")[0].split()


def test_without_jinja2_one_sentence_says_what_to_install(made, tmp_path, capsys, monkeypatch):
    path = made.write(tmp_path / "run.json", made.small())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "pagedattn.report.html.page", raising=False)
    out = tmp_path / "out"
    for words in (
        [str(path), "--out", str(out)],
        ["compare", *[str(path)] * 2, "--html", str(out)],
    ):
        assert cli.main(words) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "pip install 'pagedattn[plot]'" in message
    assert not out.exists()
