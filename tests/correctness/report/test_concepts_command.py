"""``tools/plot.py --concepts``: what it writes, and that a failure changes nothing."""

import functools
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from pagedattn.calculator import cli as calculator_cli
from pagedattn.calculator import concept as benchmark_results
from pagedattn.report import cli
from pagedattn.report.concepts import CONCEPTS, memory_comparison, performance_comparison
from pagedattn.report.concepts.drawing import write_concepts

CALCULATION = "--gpu", "8", "--model", "opt-125m"  # the smallest


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    memory = functools.partial(memory_comparison.scene, max_steps=300)
    monkeypatch.setattr(memory_comparison, "scene", memory)
    performance = functools.partial(performance_comparison.scene, rates=(1.0, 2.0), max_steps=300)
    monkeypatch.setattr(performance_comparison, "scene", performance)
    calculation = functools.partial(benchmark_results.scene, CALCULATION)
    monkeypatch.setattr(benchmark_results, "scene", calculation)


def _fails(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(".\n")
    assert captured.err.count("\n") == 1
    return captured.err


def test_all_seven_are_written_small_dateless_and_opaque(capsys):
    assert len(CONCEPTS) == 7
    assert cli.main(["--concepts"]) == 0
    names = sorted(f"{name}.{suffix}" for name in CONCEPTS for suffix in ("png", "svg"))
    assert sorted(os.listdir("figures")) == names
    assert capsys.readouterr().out == f"Written to figures: {', '.join(names)}\n"
    for name in CONCEPTS:
        svg = Path(f"figures/{name}.svg")
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        assert "dc:date" not in svg.read_text(encoding="utf-8")
        assert re.search(
            r'<g id="patch_1">\s*<path [^>]*style="fill: #ffffff"', svg.read_text(encoding="utf-8")
        )
        with Image.open(f"figures/{name}.png") as image:
            assert image.format == "PNG"
            assert 1400 <= image.width < 1800
            assert image.convert("RGBA").getextrema()[3] == (255, 255)
            assert image.convert("RGB").getpixel((3, 3)) == (255, 255, 255)
        for path in (svg, svg.with_suffix(".png")):
            assert path.stat().st_size < 300_000
            assert str(Path.cwd()).encode() not in path.read_bytes()


def test_the_calculators_own_command_draws_the_same(tmp_path, capsys):
    write_concepts(("benchmark_results",), tmp_path, ("svg",))
    assert calculator_cli.main([*CALCULATION, "--out", "own", "--formats", "svg"]) == 0
    capsys.readouterr()
    assert (
        Path("own/benchmark_results.svg").read_bytes()
        == (tmp_path / "benchmark_results.svg").read_bytes()
    )


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        Path(name).mkdir()
        names = "block_structure", "block_sharing", "attention_flow", "performance_comparison"
        write_concepts(names, tmp_path / name, ("png", "svg"))
    for path in sorted(Path("one").iterdir()):
        assert path.read_bytes() == (Path("two") / path.name).read_bytes()


def test_only_the_formats_asked_for_are_written_and_older_ones_go(monkeypatch, capsys):
    monkeypatch.setattr(cli, "CONCEPTS", ("block_sharing",))
    assert cli.main(["--concepts", "--out", "out"]) == 0
    Path("out/h100").mkdir()
    Path("out/mine.png").write_text("mine")
    assert cli.main(["--concepts", "--out", "out", "--formats", "svg"]) == 0
    assert sorted(os.listdir("out")) == ["block_sharing.svg", "h100", "mine.png"]
    assert "Removed, left from an earlier run: block_sharing.png" in capsys.readouterr().out


def test_what_only_results_take_is_refused(capsys):
    for arguments, what in (
        (["run.json"], "results files"),
        (["--baseline", "torch"], "--baseline"),
        (["--allow-different-machines"], "--allow-different-machines"),
    ):
        assert f"takes no {what}." in _fails(capsys, "--concepts", *arguments)
    assert os.listdir() == []


def test_a_failure_leaves_what_was_there(monkeypatch, capsys):
    monkeypatch.setattr(cli, "CONCEPTS", ("block_sharing", "block_structure"))
    Path("file").write_text("mine")
    assert "is a file" in _fails(capsys, "--concepts", "--out", "file")

    def out_of_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pagedattn.report.concepts.drawing.save", out_of_space)
    assert "No space left" in _fails(capsys, "--concepts", "--out", "new/out")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedattn.report.concepts.drawing.save", interrupt)
    assert cli.main(["--concepts", "--out", "new/out"]) == 130
    assert os.listdir() == ["file"]
