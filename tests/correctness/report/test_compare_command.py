"""``tools/plot.py compare``: what it says, writes and refuses, and when it fails."""

import json
import re
from pathlib import Path

import pytest

from pagedattn.report import cli

from .compared_runs import measured, run_file


def command(tmp_path, *words, after=None, cpu="Xeon"):
    before = run_file(tmp_path / "a.json", measured(0))
    other = run_file(tmp_path / "b.json", measured(1) if after is None else after, cpu=cpu)
    return cli.main(["compare", str(before), str(other), *words])


def test_the_command_fails_on_a_regression_only(tmp_path, capsys):
    slow = measured(1, factors={"row17": 1.10})
    assert command(tmp_path, "--fail-on-regression", "5%") == 0
    assert "No row is slower by more than 5 %." in capsys.readouterr().out
    assert command(tmp_path, "--fail-on-regression", "5%", after=slow) == 1
    out = capsys.readouterr().out
    assert "1 slower" in out
    assert "Slower by more than 5 %: row17." in out
    assert command(tmp_path, "--fail-on-regression", "20%", after=slow) == 0
    assert command(tmp_path, after=slow) == 0


def test_the_command_writes_markdown_of_all_rows(tmp_path, capsys):
    target = tmp_path / "comparison.md"
    assert command(tmp_path, "--markdown", str(target)) == 0
    text = target.read_text()
    assert text.count("| row") == 41  # and the header
    assert "95 % bootstrap intervals" in text
    assert str(target) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fail-on-regression", "fast"], "must be a percentage"),
        (["--margin", "0"], "must be a percentage"),
        (["--margin", "nan"], "must be a percentage"),
        (["--margin", "1000%"], "a percentage above 0 and below 1000, as 5%, not '1000%'"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, words, sentence):
    assert command(tmp_path, *words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_runs_of_two_machines_are_compared_only_when_asked(tmp_path, capsys):
    assert command(tmp_path, cpu="Epyc") == 2
    assert "different machines" in capsys.readouterr().err
    assert command(tmp_path, "--allow-different-machines", cpu="Epyc") == 0


@pytest.mark.parametrize(
    "other",
    [{"gpu": "NVIDIA H200"}, {"gpu_uuid_sha256": "b"}, {"gpu": None, "gpu_uuid_sha256": None}],
)
def test_two_gpus_are_compared_only_when_asked(tmp_path, capsys, other):
    paths = []
    for name, changes in (("a", {}), ("b", other)):
        path = run_file(tmp_path / f"{name}.json", measured(0))
        content = json.loads(path.read_text())
        machine = {"cpu": "Xeon", "gpu": "NVIDIA H100", "gpu_uuid_sha256": "a"} | changes
        content["machine_info"]["pagedattn"]["machine"] = machine
        path.write_text(json.dumps(content))
        paths.append(str(path))
    target = tmp_path / "c.md"
    assert cli.main(["compare", *paths, "--markdown", str(target)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "--allow-different-machines" in captured.err
    named = captured.err.partition("machines (")[2].partition("): give")[0].split("; ")
    assert named[0] != named[1]
    assert not target.exists()
    assert cli.main(["compare", *paths, "--allow-different-machines"]) == 0
    assert cli.main(["compare", paths[0], paths[0]]) == 0


def test_a_missing_file_is_told_in_one_sentence(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path / "x.json"), str(tmp_path / "y.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_limit_below_the_margin_is_the_margin(tmp_path, capsys):
    slow = measured(1, noise=0.001, factors={"row17": 1.025})
    before = run_file(tmp_path / "a.json", measured(0, noise=0.001))
    after = run_file(tmp_path / "b.json", slow)
    words = ["compare", str(before), str(after), "--fail-on-regression"]
    assert cli.main([*words, "2%"]) == 1
    assert "Slower by more than 2 %: row17." in capsys.readouterr().out
    assert cli.main([*words, "5%"]) == 0


def test_rows_that_cannot_be_told_are_counted_where_no_regression_is_found(tmp_path, capsys):
    assert command(tmp_path, "--fail-on-regression", "5%", after=measured(1, rounds=3)) == 0
    out = capsys.readouterr().out
    assert "No row is slower by more than 5 %; 40 rows cannot be told." in out


def test_a_busy_machine_is_told_and_so_are_rows_that_all_moved_alike(tmp_path, capsys):
    slow = measured(1, factors={f"row{i}": 1.3 for i in range(40)})
    paths = [
        run_file(tmp_path / "before.json", measured(0)),
        run_file(tmp_path / "after.json", slow),
    ]
    content = json.loads(paths[1].read_text())
    page, text = tmp_path / "c.html", tmp_path / "c.md"
    words = ["compare", *map(str, paths), "--html", str(page), "--markdown", str(text)]
    for load, is_busy in ((2.0, False), (5.7, True)):
        content["machine_info"]["pagedattn"] |= {"num_cpus": 2, "cpu": {"load_1min": load}}
        paths[1].write_text(json.dumps(content))
        assert cli.main(words) == 0
        for said in (capsys.readouterr().out, page.read_text(), text.read_text()):
            assert ("after.json ended with 5.7 processes at a time on 2 cores" in said) is is_busy
            assert re.search(r"Half of the rows changed by \+(29|30)\.\d % or more", said)
    assert cli.main(["compare", str(paths[0]), str(paths[0])]) == 0
    assert "Half of the rows" not in capsys.readouterr().out


def test_settings_in_which_the_runs_differ_are_told_and_what_always_varies_is_not(tmp_path, capsys):
    paths = [run_file(tmp_path / f"{name}.json", measured(0)) for name in ("one", "two")]
    content = json.loads(paths[1].read_text())
    own = content["machine_info"]["pagedattn"]
    own |= {"num_threads": 2, "versions": {"torch": "2.13.0"}, "cpu": {"mhz": 2100, "load_1min": 1}}
    paths[0].write_text(json.dumps(content))
    own |= {"num_threads": 1, "versions": {"torch": "2.12.0"}, "cpu": {"mhz": 3000, "load_1min": 2}}
    paths[1].write_text(json.dumps(content))
    assert cli.main(["compare", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert "The runs differ in PyTorch's CPU threads (2; 1), torch (2.13.0; 2.12.0)." in said
    assert cli.main(["compare", str(paths[0]), str(paths[0])]) == 0
    assert "The runs differ" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare", "a.json", "b.json", "--html", "a.json"], "a.json is read"),
        (["compare", "a.json", "b.json", "--markdown", "link.json"], "link.json is read"),
        (["compare", "a.json", "b.json", "--markdown", "x", "--html", "./x"], "x cannot be two"),
        (["a.json", "--document", "a.json"], "a.json is read"),
    ],
)
def test_no_file_that_is_read_is_written_over(tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        run_file(Path(f"{name}.json"), measured(0))
    Path("link.json").symlink_to("b.json")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_rows_with_a_doubt_and_too_few_rows_are_told(tmp_path, capsys):
    paths = [run_file(tmp_path / f"{name}.json", measured(0, rows=9)) for name in ("one", "two")]
    content = json.loads(paths[1].read_text())
    for number, row in enumerate(content["benchmarks"]):
        row.pop("data", None)
        row["stats"].pop("data", None)
        if number < 2:
            times = row["stats"]
            low, high = 0.8 * times["median"], 1.2 * times["median"]
            times |= {"min": low, "q1": low, "q3": high, "max": high}
    paths[1].write_text(json.dumps(content))
    for after, is_bad in ((paths[0], False), (paths[1], True)):
        assert cli.main(["compare", str(paths[0]), str(after)]) == 0
        said = capsys.readouterr().out
        assert ("2 of 9 rows have a doubt in one of the runs, such as " in said) is is_bad
        assert "From 9 rows it cannot be told whether rows scatter between runs" in said
    many = run_file(tmp_path / "many.json", measured(0, rows=10))
    assert cli.main(["compare", str(many), str(many)]) == 0
    assert "it cannot be told" not in capsys.readouterr().out
