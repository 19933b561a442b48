"""Names come from files and are not trusted: every output shows them and obeys none."""

import csv
import html
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pagedattn.report import cli, load, read_csv
from pagedattn.report.data import write_tables
from pagedattn.report.document import make_document
from pagedattn.report.results import load_run
from pagedattn.report.summary import summarise
from pagedattn.report.tables import Table
from pagedattn.report.text import clean, escape

EXAMPLES = settings().max_examples
NASTY = [
    "a|b",
    "a\\|b",
    "a\\\\",
    "line\nbreak\r\n| cell |",
    "<script>alert(1)</script>",
    "<!-- -->",
    "&lt;b&gt; &amp;",
    "`code` ``two`` ```three",
    "\x1b[31mred\x1b[0m \x00\x07\x7f\x9b",
    "\u202eevil\u202c \u2066x\u2069 \u200b\u200d\ufeff\u2028\u2029",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f98a\U0001f468\u200d\U0001f469 \u6f22\u5b57 e\u0301",
    "$\\frac{1}{0}$ $x$ $",
    "\\begin{x} %s {0} {name}",
    "=1+1",
    '=HYPERLINK("http://x")',
    "+1",
    "-1",
    "@x",
    "'quoted",
    '"',
    "[link](http://x) ![image](x) <http://x>",
    "*bold* _it_ __x__ ~~no~~ # title",
    "---",
    "x" * 5000,
    "word " * 800,
    "\udfff\ud800 lone",
    "_hidden",
]
pieces = (
    st.sampled_from(NASTY) | st.text(max_size=12) | st.text("|\\`<>&$*_[]~\n\r\"'=", max_size=8)
)
names = st.lists(pieces, min_size=1, max_size=3).map("".join).filter(lambda name: name.strip())
FUZZ = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def rows_of(made, name, others=("plain",)):
    """Rows with the name everywhere that a name can stand, in every area."""
    return [
        made.benchmark(
            f"{name}{area}{implementation}",
            1e-3,
            area=area,
            implementation=implementation,
            workload=name,
            device=name,
            kind=name,
            operation=name,
            length_distribution=name,
            model=name,
            batch=3,
            context=100,
            bytes=10**9,
            num_users=2,
        )
        for area in ("attention", "block_manager", "serving", name)
        for implementation in (name, *others)
    ]


def cells_of(line):
    """The cells of a line of a markdown table, as a reader sees them."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    cells = _split(line)
    return [html.unescape(re.sub(r"\\(\W|_)", r"\1", cell.strip())) for cell in cells]


def _split(line):
    """Split where a | has no backslash of its own before it."""
    cells, cell, place = [], "", 1
    while place < len(line):
        if line[place] == "\\":
            cell += line[place : place + 2]
            place += 2
            continue
        if line[place] == "|":
            cells.append(cell)
            cell = ""
        else:
            cell += line[place]
        place += 1
    return cells


@settings(max_examples=EXAMPLES, **FUZZ)
@given(title=names, cells=st.lists(names, min_size=1, max_size=3))
@example(title="|", cells=NASTY)
def test_a_markdown_table_shows_each_name_in_its_cell(title, cells):
    table = Table(title, cells, [cells, cells], len(cells))
    lines = table.as_markdown().split("\n")
    assert len(lines) == 4
    for line in (lines[0], *lines[2:]):
        assert cells_of(line) == [clean(cell) for cell in cells]
        assert not re.search(r"<|(?<!\\)`|(?<!\\)\$|(?<!\\)\[", line)
        assert all(letter.isprintable() for letter in line)


@settings(max_examples=EXAMPLES, **FUZZ)
@given(title=names, cells=st.lists(names, min_size=1, max_size=3))
def test_a_terminal_gets_one_line_a_row_and_nothing_to_obey(title, cells):
    text = Table(title, cells, [cells, cells], 1).as_text()
    assert text.count("\n") == 3
    assert all(letter.isprintable() or letter == "\n" for letter in text)


@settings(max_examples=EXAMPLES // 6, **FUZZ)
@given(name=names)
def test_reports_and_tables_hold_any_name(made, tmp_path, name):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(made.file(rows_of(made, name), cpu=name)), encoding="utf-8")
    run = load_run([path])
    text = make_document([(path, run, summarise(run.rows))], tmp_path / "x.md", blank=False)
    _check_markdown(text, name)
    write_tables(run, tmp_path)
    loaded = load(path)
    assert set(loaded.workload) == {clean(name)}
    pd.testing.assert_frame_equal(read_csv(tmp_path / "rows.csv"), loaded)
    samples = pd.read_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(samples.drop(columns="samples_us"), loaded)
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def _check_markdown(text, name):
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(_split(line)) for line in table.splitlines()}) == 1
    assert "<" not in re.sub(r"```sh\n.*\n```", "", text)
    for line in re.findall(r"^(?:\||#).*", text, flags=re.MULTILINE):
        assert not re.search(r"(?<!\\)`", line)
    assert escape(name) in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)


@settings(max_examples=EXAMPLES // 6, **FUZZ)
@given(name=names, other=names)
def test_a_comparison_holds_any_name(made, tmp_path, name, other):
    paths = []
    for place, full in enumerate((name, other)):
        row = made.benchmark("x", 1e-3, area="attention", implementation="a", workload="w")
        rows = [row | {"fullname": "common"}, row | {"fullname": full}]
        rows.append({"fullname": full, "extra_info": {}, "stats": {}})
        path = tmp_path / f"{place}.json"
        path.write_text(json.dumps(made.file(rows)), encoding="utf-8")
        paths.append(str(path))
    target, out, err = tmp_path / "c.md", io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert cli.main(["compare", *paths, "--all", "--markdown", str(target)]) == 0
    assert err.getvalue() == ""
    text = target.read_text(encoding="utf-8")
    assert all(letter.isprintable() or letter == "\n" for letter in text + out.getvalue())
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(_split(line)) for line in table.splitlines()}) == 1
    assert "<" not in text


@pytest.mark.parametrize("place", range(len(NASTY)))
def test_plots_show_any_name_and_obey_none(made, tmp_path, place):
    name = NASTY[place]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(made.file(rows_of(made, name), cpu=name)), encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    formats = "png,svg" if place % 9 == 6 else "svg"
    with redirect_stdout(out), redirect_stderr(err):
        assert cli.main([str(path), "--out", str(tmp_path / "out"), "--formats", formats]) == 0
    assert err.getvalue() == ""
    drawn = sorted((tmp_path / "out").glob("*.svg"))
    assert len(drawn) >= 4
    for file in drawn:
        root = ElementTree.parse(file).getroot()
        width, height = (float(root.get(side).removesuffix("pt")) for side in ("width", "height"))
        assert width < 3000
        assert height < 3000
        assert not any(part.tag.endswith("script") for part in root.iter())
    _check_markdown((tmp_path / "out" / "report.md").read_text(encoding="utf-8"), name)
    assert max(map(len, out.getvalue().splitlines())) < 2000
    assert Path(tmp_path / "out" / "rows.parquet").is_file()


@pytest.mark.parametrize("name", ["a b", "a)b(c", "a|b", "<b>", "#1", "=1+1", "`x`", "*x*", "$y$"])
def test_a_results_file_may_have_any_name(made, tmp_path, monkeypatch, name):
    path = tmp_path / name / f"{name}.json"
    made.write(path, made.small())
    monkeypatch.chdir(tmp_path)
    words = [str(path.relative_to(tmp_path)), "--document", "x.md"]
    with redirect_stdout(io.StringIO()):
        assert cli.main(words) == 0
        assert cli.main([words[0], "--out", "out", "--formats", "svg"]) == 0
        assert cli.main(["compare", words[0], words[0], "--markdown", "c.md"]) == 0
    text = Path("x.md").read_text(encoding="utf-8")
    (link,) = re.findall(r"\[results\]\(([^() |<>]*)\)", text)
    assert Path(unquote(link)) == path.relative_to(tmp_path)
    _check_markdown(text, name)
    _check_markdown(Path("out/report.md").read_text(encoding="utf-8"), name)
