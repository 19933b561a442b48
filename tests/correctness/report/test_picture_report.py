"""``tools/picture_report.py``: the pictures it takes, and what it refuses in one sentence."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
H100 = ROOT / "figures" / "h100" / "results.json"
TOOL = ROOT / "tools" / "picture_report.py"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool's module, in an empty folder."""
    spec = importlib.util.spec_from_file_location("picture_report", TOOL)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.chdir(tmp_path)
    return found


def refused(tool, capsys, *words):
    """Run the tool, which must fail with one sentence and write nothing; return it."""
    before = sorted(Path().rglob("*"))
    assert tool.main([*words, "--out", "new"]) == 2
    told = capsys.readouterr().err
    assert told.endswith(".\n")
    assert told.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return told


def test_what_is_no_results_file_is_told_in_one_sentence(tool, capsys):
    Path("broken.json").write_text('{"benchmarks": [')
    assert "are required: results" in refused(tool, capsys)
    assert "absent.json does not exist" in refused(tool, capsys, "absent.json")
    assert "broken.json is not valid JSON" in refused(tool, capsys, "broken.json")


def test_a_run_without_what_is_pictured_is_told_before_a_browser_starts(tool, capsys, monkeypatch):
    monkeypatch.setattr(tool, "_start", None)
    told = refused(tool, capsys, str(ROOT / "figures" / "cpu-peers" / "results.json"))
    assert "has not all that is pictured: its report is without roofline, latency, waste" in told


def test_a_missing_browser_and_a_missing_package_are_told(tool, capsys, monkeypatch):
    monkeypatch.setattr(tool.shutil, "which", lambda _: None)
    monkeypatch.setattr(tool, "_write_pages", lambda *_: None)
    monkeypatch.setattr(tool, "_require_sections", lambda *_: None)
    monkeypatch.setitem(sys.modules, "selenium", None)
    assert "need selenium" in refused(tool, capsys, str(H100))
    for name in ("selenium", "selenium.webdriver.chrome.service"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["selenium"].webdriver = sys.modules["selenium.webdriver.chrome.service"]
    sys.modules["selenium.webdriver.chrome.service"].Service = None
    assert "need Chromium and its chromedriver" in refused(tool, capsys, str(H100))


@pytest.mark.browser
def test_every_picture_is_taken(tool):
    content = json.loads(H100.read_text(encoding="utf-8"))
    names = ("decode-B", "prefill-8k")
    content["benchmarks"] = [r for r in content["benchmarks"] if any(n in r["name"] for n in names)]
    Path("run.json").write_text(json.dumps(content))
    assert tool.main(["run.json", "--out", "new"]) == 0
    pictures = {path.name: path.read_bytes() for path in Path("new").iterdir()}
    assert sorted(pictures) == sorted(f"{name}.png" for name, *_ in tool.PICTURES)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
