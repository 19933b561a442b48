"""Where the calculator writes, and what it leaves as it was."""

import json
from pathlib import Path

import pytest

from pagedattn.calculator import cli
from tests.correctness.calculator.command import CONFIG, SMALL, fails


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_output_that_cannot_be_written_is_told_before_anything_is_calculated(
    capsys, monkeypatch
):
    Path("file").write_text("mine")
    calculated = []
    monkeypatch.setattr(cli.Calculation, "of", calculated.append)
    assert "--out must be a folder" in fails(capsys, *SMALL, "--out", "file")
    assert "--out must be a folder" in fails(capsys, *SMALL, "--out", "file/below")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "--out must be a folder" in fails(capsys, *SMALL, "--out", "new")
    assert "--json must be a file" in fails(capsys, *SMALL, "--no-plot", "--json", "new.json")
    assert calculated == []
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["--trace", "t.csv", "--json", "t.csv"], "t.csv"),
        (["--trace", "t.csv", "--json", "link.csv"], "link.csv"),
        (["--trace", "benchmark_results.svg", "--out", "."], "benchmark_results.svg"),
        (["--model", "m/config.json", "--json", "m/config.json"], "m/config.json"),
        (["--model", "m", "--json", "m/config.json"], "m/config.json"),
    ],
    ids=["trace", "a link to it", "plot", "config", "folder"],
)
def test_what_is_read_is_not_written_over(capsys, monkeypatch, words, target):
    rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,3\n"
    for name in ("t.csv", "benchmark_results.svg"):
        Path(name).write_text(rows)
    Path("link.csv").symlink_to("t.csv")
    Path("m").mkdir()
    Path("m/config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(cli.Calculation, "of", None)  # nothing is calculated before
    message = fails(capsys, *SMALL, *words)
    assert message == f"{target} is read: what is written needs another name.\n"


def test_the_numbers_are_not_written_over_the_plot(capsys):
    name = "plots/benchmark_results.svg"
    message = fails(capsys, *SMALL, "--out", "plots", "--json", name)
    assert message == f"{name} cannot be two files that are written.\n"


def test_a_disk_that_fills_up_leaves_nothing_behind(capsys, monkeypatch):
    Path("benchmark_results.svg").write_text("an older one")
    copied = []

    def copy_once(source, target):
        if copied:
            raise OSError(28, "No space left on device", str(target))
        copied.append(Path(target).write_bytes(Path(source).read_bytes()))

    monkeypatch.setattr("shutil.copyfile", copy_once)
    assert "No space left on device" in fails(capsys, *SMALL, "--out", "new/folder")
    copied.clear()
    assert "No space left on device" in fails(capsys, *SMALL, "--out", ".")
    assert Path("benchmark_results.svg").read_text() == "an older one"


def test_a_device_or_a_link_is_not_replaced_by_the_results(tmp_path, capsys):
    assert cli.main(["--no-plot", "--json", "/dev/full"]) == 2
    assert "--json must be a file" in capsys.readouterr().err
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("{}")
    link.symlink_to(target)
    assert cli.main(["--no-plot", "--json", str(link)]) == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["schema"]
