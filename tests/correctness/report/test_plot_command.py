"""``tools/plot.py``: what it writes and prints, and that a failure changes nothing."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pagedattn.report import cli, load
from pagedattn.report.results import COLUMNS

TOOL = Path(__file__).parents[3] / "tools" / "plot.py"
PLOTS = ("latency", "bandwidth", "speedup", "bookkeeping")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def drawn(made, tmp_path_factory):
    """A report of the whole H100 run and its folder, drawn once."""
    folder = tmp_path_factory.mktemp("drawn")
    path = made.write(folder / "run.json", made.h100())
    assert cli.main([str(path), "--out", str(folder / "out")]) == 0
    return folder / "out"


def _contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _fails(capsys, *arguments):
    """Run the command, which must fail with one sentence; return it."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(".\n")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_whole_run_is_drawn_as_four_plots_with_report_and_table(drawn):
    names = {f"{plot}.{suffix}" for plot in PLOTS for suffix in ("png", "svg")}
    assert {path.name for path in drawn.iterdir()} == names | {
        "report.md",
        "report.html",
        "rows.csv",
        "rows.parquet",
    }
    for plot in PLOTS:
        assert (drawn / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(drawn / f"{plot}.svg").getroot().tag.endswith("svg")
        assert (drawn / f"{plot}.png").stat().st_size < 1 << 20


def test_no_plot_has_a_date_or_a_transparent_ground(drawn):
    for plot in PLOTS:
        svg = (drawn / f"{plot}.svg").read_text(encoding="utf-8")
        assert "dc:date" not in svg
        assert re.search(r'<g id="patch_1">\s*<path [^>]*style="fill: #ffffff"', svg)
        assert b"Software" not in (drawn / f"{plot}.png").read_bytes()


def test_the_same_input_gives_the_same_bytes(made, tmp_path, drawn):
    path = made.write(tmp_path / "run.json", made.h100())
    command = [sys.executable, TOOL, path, "--out", tmp_path / "again"]
    subprocess.run(
        command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert _contents(tmp_path / "again") == _contents(drawn)


def test_raw_samples_change_nothing_that_is_drawn(made, tmp_path):
    for name, with_data in (("a", True), ("b", False)):
        made.write(tmp_path / name / "run.json", made.cpu(with_data=with_data))
        os.chdir(tmp_path / name)
        assert cli.main(["run.json", "--out", "out"]) == 0
    first, second = (_contents(tmp_path / name / "out") for name in ("a", "b"))
    # the Parquet file has the samples themselves, and the page draws them
    for name in ("rows.parquet", "report.html"):
        assert first.pop(name) != second.pop(name)
    assert first == second


def test_the_table_is_the_one_that_load_returns(made, tmp_path, drawn):
    with (drawn / "rows.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    table = load(made.write(tmp_path / "run.json", made.h100()))
    assert tuple(lines[0]) == COLUMNS
    assert [float(line["median_us"]) for line in lines] == table.median_us.tolist()
    assert lines[0]["batch"] == "1"


def test_the_report_names_machine_headline_plots_and_command(made, tmp_path, capsys):
    path = made.write(tmp_path / "run.json", made.small())
    assert cli.main([str(path), "--out", "out", "--baseline", "triton"]) == 0
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert "| GPU | NVIDIA H100 80GB HBM3 |" in report
    assert "| torch | 2.13.0 |" in report
    assert "| measured read bandwidth | 3,087 GB/s |" in report
    assert "4 rows of run.json, by pytest-benchmark. The baseline is triton." in report
    assert "| decode-B1-4k | triton | 80.00 | 61 % | 1.00x | 100.0 | 80.00 |" in report
    # 400 µs over 300 µs
    assert "| decode-B8-4k | sdpa_contiguous | 300.0 | 16 % | 1.33x | 300.0 | 400.0 |" in report
    assert re.search(r"!\[Latency [^\]]+\]\(latency\.png\)", report)
    assert "0.001 / 0.004 | 21.50 |" in report
    assert "Left out: no row is of the block manager or the page table." in report
    assert "python tools/plot.py run.json --baseline triton\n" in report
    assert str(tmp_path) not in report
    printed = capsys.readouterr().out
    assert "decode-B8-4k  sdpa_contiguous      300.0           16 %             1.33x" in printed
    assert "Left out bookkeeping" in printed
    assert "Written to out: bandwidth.png, bandwidth.svg, latency.png" in printed


def test_names_with_markup_are_shown_and_not_obeyed(made, tmp_path, capsys):
    name = "a|b\n<script>alert(1)</script> $\\frac$ \x1b[31m _\u6f22 \ud800"
    rows = [
        made.benchmark(
            f"{name}{area}{i}",
            1e-3 * (i + 1),
            area=area,
            implementation=implementation,
            workload=name * 9,
            device=name,
            kind=name,
            batch=3,
            context=100,
            bytes=10**9,
            operation="free|" * 20,
        )
        for area in ("attention", "page_table", "<b>")
        for i, implementation in enumerate((name, "_hidden"))
    ]
    content = made.file(rows, cpu="x|y\n# title")
    made.write(tmp_path / "run.json", content)
    assert cli.main(["run.json", "--out", "out"]) == 0
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert "a\\|b &lt;script&gt;alert(1)&lt;/script&gt; \\$\\\\frac\\$" in report
    assert "<script" not in report
    assert "| CPU | x\\|y # title |" in report
    assert "\x1b" not in report + capsys.readouterr().out
    tables = re.findall(r"(?:^\|.*\n)+", report, flags=re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    for plot in PLOTS:
        ElementTree.parse(f"out/{plot}.svg")


def test_only_the_formats_asked_for_are_written(made, tmp_path, capsys):
    path = str(made.write(tmp_path / "run.json", made.small()))
    assert cli.main([path, "--out", "out", "--formats", "svg"]) == 0
    assert sorted(os.listdir("out")) == [
        "bandwidth.svg",
        "latency.svg",
        "report.html",
        "report.md",
        "rows.csv",
        "rows.parquet",
        "speedup.svg",
    ]
    assert "](latency.svg)" in Path("out/report.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main([path, "--formats", "png,jpg"]) == 2
    shown = capsys.readouterr()
    assert "must be png, svg or png,svg, not 'png,jpg'" in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_plots_of_an_earlier_run_go_and_other_files_stay(made, tmp_path, capsys):
    made.write(tmp_path / "cpu.json", made.cpu())
    made.write(tmp_path / "small.json", made.small())
    assert cli.main(["cpu.json", "--out", "out"]) == 0
    Path("out/mine.txt").write_text("mine")
    assert cli.main(["small.json", "--out", "out"]) == 0
    assert Path("out/mine.txt").read_text() == "mine"
    assert not Path("out/bookkeeping.png").exists()
    assert "Removed, left from an earlier run: bookkeeping.png" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["cpu.json", "out", "small.json"]


def test_the_newest_saved_run_is_drawn_by_default(made, tmp_path, capsys):
    storage = tmp_path / ".benchmarks" / "Linux-CPython-3.11-64bit"
    made.write(storage / "0002_old.json", made.h100())
    os.utime(storage / "0002_old.json", (1, 1))
    made.write(storage / "0001_new.json", made.small())
    assert cli.main([]) == 0
    assert "0001_new.json" in capsys.readouterr().out
    assert Path("figures/local/report.md").is_file()


def test_without_a_saved_run_the_command_that_makes_one_is_named(capsys):
    assert "`tox -e bench`" in _fails(capsys)


def test_files_of_different_machines_are_joined_only_on_request(made, tmp_path, capsys):
    one = made.small()
    other = made.file(made.cpu()["benchmarks"], uuid="bb")
    made.write(tmp_path / "one.json", one)
    made.write(tmp_path / "other.json", other)
    message = _fails(capsys, "one.json", "other.json", "--out", "out")
    assert "one.json and other.json come from different machines" in message
    assert not Path("out").exists()
    arguments = ["one.json", "other.json", "--out", "out", "--allow-different-machines"]
    assert cli.main(arguments) == 0
    assert "The files come from different machines" in Path("out/report.md").read_text("utf-8")


def test_a_busy_machine_and_rows_with_a_doubt_are_told_in_both_reports(made, tmp_path, capsys):
    content = made.small()
    content["machine_info"]["pagedattn"] |= {"num_cpus": 2, "cpu": {"load_1min": 2.0}}
    wide = content["benchmarks"][0]["stats"]
    for is_bad in (False, True):
        if is_bad:
            content["machine_info"]["pagedattn"]["cpu"] = {"load_1min": 5.7}
            low, high = 0.8 * wide["median"], 1.2 * wide["median"]
            wide |= {"min": low, "q1": low, "q3": high, "max": high}
        made.write(tmp_path / "run.json", content)
        assert cli.main(["run.json", "--out", "out"]) == 0
        said = capsys.readouterr().out
        report, page = (Path(f"out/report.{kind}").read_text("utf-8") for kind in ("md", "html"))
        assert ("? marks a median with a doubt: A row gets" in said) is is_bad
        for text in (said, report, page):
            assert ("ended with 5.7 processes at a time on 2 cores" in text) is is_bad
        assert ("1 of 4 rows has a doubt, marked with ?." in report) is is_bad
        assert ("0 of 4 rows have a doubt. A row gets" in report) is not is_bad
        assert (" ? |" in report) is is_bad
        assert ("spread 40 %" in page) is is_bad


def test_replaced_and_skipped_rows_are_told(made, tmp_path, capsys):
    content = made.small()
    made.write(tmp_path / "one.json", content)
    content["benchmarks"].append(made.benchmark("foreign", 1e-3))
    made.write(tmp_path / "two.json", content)
    assert cli.main(["one.json", "two.json", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "4 rows of earlier files replaced by a later file's" in printed
    assert "1 benchmark of other suites skipped" in printed
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert "4 rows of earlier files gave way" in report
    assert "1 benchmark without" in report


def test_a_failure_leaves_what_was_there(made, tmp_path, capsys, monkeypatch):
    made.write(tmp_path / "run.json", made.small())
    assert cli.main(["run.json", "--out", "out"]) == 0
    capsys.readouterr()
    before = _contents(tmp_path / "out")
    Path("broken.json").write_text('{"benchmarks": [')
    _fails(capsys, "broken.json", "--out", "out")
    _fails(capsys, "absent.json", "--out", "out")
    _fails(capsys, ".", "--out", "out")
    assert "one of sdpa_contiguous, triton" in _fails(
        capsys, "run.json", "--out", "out", "--baseline", "x"
    )

    def out_of_space(*_):
        raise OSError(28, "No space left on device")

    made.write(tmp_path / "other.json", made.cpu())
    monkeypatch.setattr("pagedattn.report.markdown.make_report", out_of_space)
    assert "No space left" in _fails(capsys, "other.json", "--out", "out")
    assert "No space left" in _fails(capsys, "other.json", "--out", "new/folder/out")
    assert _contents(tmp_path / "out") == before
    assert sorted(os.listdir()) == ["broken.json", "other.json", "out", "run.json"]


@pytest.mark.parametrize(
    "name", ["latency.svg", "speedup.png", "report.md", "report.html", "rows.csv", "rows.parquet"]
)
def test_a_results_file_is_not_drawn_over(made, capsys, name):
    source = made.write(Path("own") / name, made.small())
    before = source.read_bytes()
    message = _fails(capsys, source, "--out", "own", "--formats", "svg")
    assert message == f"own/{name} is read: what is written needs another name.\n"
    assert _contents(Path("own")) == {name: before}
    assert cli.main([str(source), "--out", "other", "--formats", "svg"]) == 0


def test_an_output_folder_that_is_a_file_or_below_one_is_refused(made, tmp_path, capsys):
    made.write(tmp_path / "run.json", made.small())
    Path("file").write_text("mine")
    assert "is a file" in _fails(capsys, "run.json", "--out", "file")
    assert "cannot be written" in _fails(capsys, "run.json", "--out", "file/below")
    Path("out/latency.png").mkdir(parents=True)
    assert "is a folder where" in _fails(capsys, "run.json", "--out", "out")
    assert os.listdir("out") == ["latency.png"]
    assert Path("file").read_text() == "mine"


def test_an_interrupt_ends_without_a_traceback_and_without_leftovers(
    made, tmp_path, capsys, monkeypatch
):
    made.write(tmp_path / "run.json", made.small())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedattn.report.plots.save", interrupt)
    assert cli.main(["run.json", "--out", "new/out"]) == 130
    assert capsys.readouterr().err == ""
    assert os.listdir() == ["run.json"]


def test_help_has_examples_and_loads_no_heavy_package():
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['plot.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print({'torch', 'pandas', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:\n  python tools/plot.py\n" in done.stdout
    assert done.stdout.endswith("set()\n")
    assert done.stderr == ""


@pytest.mark.parametrize("broken", [False, True])
def test_the_tool_runs_from_any_folder_and_in_any_encoding(made, tmp_path, broken):
    path = made.write(tmp_path / "run.json", made.small())
    if broken:
        path.write_text("{")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONIOENCODING"] = "ascii"
    done = subprocess.run(
        [sys.executable, TOOL, "run.json", "--formats", "svg"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == (2 if broken else 0)
    assert "Traceback" not in done.stderr
    assert Path("figures/local/report.md").exists() is not broken


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("compares", [False, True])
def test_a_stdout_that_takes_nothing_is_told_in_one_sentence(made, tmp_path, compares):
    path = made.write(tmp_path / "run.json", made.small())
    words = ["compare", path, path] if compares else [path, "--formats", "svg"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, TOOL, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "The output cannot be written: No space left" in done.stderr
