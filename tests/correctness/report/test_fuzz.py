"""Whatever lies in a results file, a command reports it or refuses it in one sentence.

Real files are changed at any place and cut at any byte, and go through the real command line: the
exit code is 0 with nothing on stderr, or 2 with exactly one sentence there, nothing on stdout and
nothing written.
"""

import contextlib
import copy
import io
import json
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from hypothesis import strategies as st

from pagedattn.report import cli, results

ROOT = Path(__file__).parents[3]
EXAMPLES = settings().max_examples
FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}
OUTPUTS = ("out", "new.md")
WRITTEN = (Path("out/report.md"), Path("out/report.html"), Path("new.md"))


def short(name):
    """A real results file with a few of its rows, from both ends and the middle."""
    content = json.loads((ROOT / "figures" / name / "results.json").read_text(encoding="utf-8"))
    rows = content["benchmarks"]
    middle = len(rows) // 2
    content["benchmarks"] = [*rows[:3], *rows[middle : middle + 2], *rows[-2:]]
    return content


REAL = {path.parent.name: short(path.parent.name) for path in ROOT.glob("figures/*/results.json")}

COMMANDS = {
    "plots": ["a.json", "--out", "out", "--formats", "svg"],
    "joined": ["a.json", "b.json", "--out", "out", "--allow-different-machines"],
    "document": ["a.json", "b.json", "--document", "new.md"],
    "before": ["compare", "a.json", "b.json", "--markdown", "new.md"],
    "after": ["compare", "b.json", "a.json", "--all", "--fail-on-regression", "5%"],
}
COMMANDS["joined"] += ["--formats", "svg"]
COMMANDS["after"].append("--allow-different-machines")


def run(words):
    """Run a command here; check what holds of all, and return its exit code and its sentence."""
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    said, told = out.getvalue(), err.getvalue()
    if currently_in_test_context():
        event(f"exit code {code}")
    assert all(letter.isprintable() or letter == "\n" for letter in said + told)
    if code == 2:
        assert said == ""
        assert told.count("\n") == 1
        assert told.endswith(".\n")
        assert len(told) < 700
        assert {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")} == before
    else:
        assert code in ((0, 1) if "--fail-on-regression" in words else (0,))
        assert told == ""
        assert said
        for text in (said, *(path.read_text() for path in WRITTEN if path.exists())):
            assert not re.search(r"\b(inf|nan)\b", text)
        for name in OUTPUTS:
            assert Path(name).exists() == (name in words)
    return code, told


def run_on(words, first, second):
    """Run a command in an empty folder with these bytes as a.json and b.json."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("a.json").write_bytes(first)
        Path("b.json").write_bytes(second)
        return run(words)


def encoded(content):
    return json.dumps(content).encode()


_NUMBERS = (0, -1, -1e-9, 1, 3.5, 5e-324, 1e-300, 1e17, 1e18, 1e300, 10**30, 10**400)
_NO_NUMBERS = (None, True, False, float("nan"), float("inf"), -float("inf"))
_HEAPS = ([], {}, [1], [None], [[1, 2, 3]], {"a": 1})
_TEXTS = (
    "",
    "x",
    "=1+1",
    "a|b\n<script>",
    "$\\frac",
    "\x1b[31m",
    "\u202eabc",
    "\ud800",
    "y" * 3000,
)
_odd = st.sampled_from([*_NUMBERS, *_NO_NUMBERS, *_HEAPS, *_TEXTS])
_values = st.one_of(
    _odd,
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.recursive(_odd, lambda inner: st.lists(inner, max_size=3), max_leaves=4),
)


@st.composite
def mutated(draw):
    """A real file with values replaced, taken away or copied elsewhere, at up to four places."""
    name = draw(st.sampled_from(sorted(REAL)))
    content = copy.deepcopy(REAL[name])
    for _ in range(draw(st.integers(1, 4))):
        _mutate(draw, content)
    return encoded(content), encoded(REAL[name])


def _mutate(draw, content):
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        child = content[key]
        if isinstance(child, dict | list) and child and draw(st.integers(0, 5)):
            content = child
            continue
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "copy"]))
        if action == "replace":
            content[key] = copy.deepcopy(draw(_values))  # the next place may lie in it
        elif action == "remove":
            del content[key]
        else:
            content[draw(st.sampled_from(keys))] = copy.deepcopy(child)
        return


@settings(max_examples=EXAMPLES // 3, **FUZZ)
@given(files=mutated(), command=st.sampled_from(["document", "before", "after"]))
def test_a_file_that_is_wrong_somewhere_is_compared_or_refused(files, command):
    run_on(COMMANDS[command], *files)


@settings(max_examples=EXAMPLES // 12, **FUZZ)
@given(files=mutated(), command=st.sampled_from(["plots", "joined"]))
def test_a_file_that_is_wrong_somewhere_is_drawn_or_refused(files, command):
    run_on(COMMANDS[command], *files)


def _places_of_numbers(content, place=()):
    """Where a file has numbers, of lists of numbers only the first."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, dict | list):
            yield from _places_of_numbers(value, (*place, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*place, key)
            if isinstance(content, list):
                return


def _one_place_of_each_number():
    """By what a number is called, a file that has it and the place."""
    found = {}
    for name in sorted(REAL, key=lambda name: name != "h100"):  # which says most of its machine
        for place in _places_of_numbers(REAL[name]):
            keys = tuple(key for key in place if isinstance(key, str))
            found.setdefault(".".join(keys), (name, place))
    return found


NUMBERS = _one_place_of_each_number()


@pytest.mark.parametrize(
    "value", [5e-324, 1e-300, 1e17, 10**400], ids=["5e-324", "1e-300", "1e17", "10**400"]
)
def test_a_number_that_is_odd_by_itself_is_reported_or_refused(value, monkeypatch):
    monkeypatch.setattr("pagedattn.report.plots.write_plots", lambda *_: [])  # they take longest
    for name, place in NUMBERS.values():
        content = copy.deepcopy(REAL[name])
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        run_on(COMMANDS["plots"], encoded(content), b"")


@settings(max_examples=EXAMPLES // 3, **FUZZ)
@given(data=st.data(), name=st.sampled_from(sorted(REAL)))
def test_a_file_cut_at_any_byte_is_refused_by_every_command(data, name):
    whole = encoded(REAL[name])
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    words = COMMANDS[data.draw(st.sampled_from(sorted(COMMANDS)))]
    assert run_on(words, cut, whole)[0] == 2
    if "b.json" in words:
        assert run_on(words, whole, cut)[0] == 2


@settings(max_examples=EXAMPLES // 3, **FUZZ)
@given(data=st.data(), name=st.sampled_from(sorted(REAL)))
def test_bytes_changed_anywhere_are_read_or_refused(data, name):
    whole = encoded(REAL[name])
    place = data.draw(st.integers(0, len(whole) - 1))
    taken = data.draw(st.integers(0, 40))
    changed = whole[:place] + data.draw(st.binary(max_size=4)) + whole[place + taken :]
    run_on(COMMANDS[data.draw(st.sampled_from(["document", "before", "after"]))], changed, whole)


def with_place(name, value):
    """A real file with a JSON text at two places that are read, and at one that none looks at."""
    for place in ("machine_info", "extra_info", "ignored"):
        content = copy.deepcopy(REAL[name])
        if place == "machine_info":
            content[place] = "HERE"
        elif place == "extra_info":
            content["benchmarks"][0]["extra_info"]["bytes"] = "HERE"
        else:
            content["benchmarks"][0]["ignored"] = "HERE"
        yield json.dumps(content).replace('"HERE"', value).encode()


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize(
    "value",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * 100_000,
        "9" * 10_000,
        '{"a": 1, "a": 2}',
        "NaN",
        "-Infinity",
    ],
    ids=["lists", "objects", "open lists", "digits", "twins", "nan", "infinity"],
)
def test_what_json_must_not_hold_is_refused_wherever_it_stands(command, value):
    for content in with_place("h100", value):
        assert run_on(COMMANDS[command], content, encoded(REAL["h100"]))[0] == 2


@pytest.mark.parametrize("name", sorted(REAL))
@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "crlf", "indented"])
def test_a_byte_order_mark_another_encoding_and_line_ends_change_nothing(name, form, tmp_path):
    text = json.dumps(REAL[name], indent=2, ensure_ascii=False)
    whole = text.replace("\n", "\r\n").encode() if form == "crlf" else text.encode()
    if form not in ("crlf", "indented"):
        whole = text.encode(form)
    for path, content in ((tmp_path / "1" / "a", whole), (tmp_path / "2" / "a", text.encode())):
        path.parent.mkdir()
        path.write_bytes(content)
    first, second = (results.load_run([tmp_path / place / "a"]).rows for place in "12")
    assert first == second
    assert run_on(COMMANDS["document"], whole, encoded(REAL[name]))[0] == 0
    assert run_on(COMMANDS["before"], whole, encoded(REAL[name]))[0] == 0


FOREIGN = {
    "npm": {"name": "x", "version": "1.0.0", "dependencies": {"left-pad": "^1"}},
    "google benchmark": {"context": {"num_cpus": 8}, "benchmarks": [{"name": "BM", "cpu_time": 1}]},
    "notebook": {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5},
    "hyperfine": {"results": [{"command": "ls", "mean": 0.1, "times": [0.1]}]},
    "another suite": {
        "machine_info": {},
        "benchmarks": [{"fullname": "x", "stats": {"median": 1}, "extra_info": {}}],
    },
    "lines": "a,b\n1,2\n",
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("kind", [*FOREIGN, "empty", "blank", "png", "zip", "yaml"])
def test_a_file_of_something_else_is_refused(command, kind):
    others = {"empty": b"", "blank": b" \r\n\t", "png": b"\x89PNG\r\n\x1a\n\0", "zip": b"PK\3\4\0"}
    others["yaml"] = b"benchmarks:\n  - 1\n"
    whole = others[kind] if kind in others else encoded(FOREIGN[kind])
    # a suite's file without one of our rows adds none to those of another file
    expected = 0 if (kind, command) == ("another suite", "joined") else 2
    assert run_on(COMMANDS[command], whole, encoded(REAL["h100"]))[0] == expected


@pytest.fixture
def _two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        Path(name).write_bytes(encoded(REAL["h100"]))


@pytest.mark.usefixtures("_two_files")
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_missing_file_a_folder_a_huge_and_an_unreadable_one_are_refused(command, monkeypatch):
    for name in ("a.json", "b.json"):
        words = COMMANDS[command]
        if name not in words:
            continue
        for other in (".", "absent.json", "a.json/below", "x" * 300):
            assert run([other if word == name else word for word in words])[0] == 2
        with monkeypatch.context() as patch:
            patch.setattr(results, "LARGEST_FILE", Path(name).stat().st_size - 1)
            assert "more than" in run(words)[1]
        if os.geteuid() != 0:
            Path(name).chmod(0)
            assert "cannot be read" in run(words)[1]
            Path(name).chmod(0o600)


@pytest.mark.usefixtures("_two_files")
def test_a_file_of_gigabytes_is_refused_without_being_read_whole():
    with Path("a.json").open("wb") as file:
        file.truncate(2 << 30)  # no block of it is on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(results.ResultsError, match="more than 256 MiB"):
        results.load_run([Path("a.json")])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10


@pytest.mark.usefixtures("_two_files")
@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("there", [False, True], ids=["new", "there before"])
def test_a_write_that_fails_at_any_step_leaves_what_was_there(command, there, monkeypatch):
    words = COMMANDS[command]
    if there:
        assert cli.main(words) in (0, 1)
        Path("a.json").write_bytes(encoded(REAL["cpu-peers"]))
        Path("b.json").write_bytes(encoded(REAL["cpu-peers"]))
    write_text = Path.write_text
    for step in range(100):
        left = [step]

        def fails_at_last(real, left=left):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] == -1:
                    if real is write_text:
                        path, text = arguments
                        write_text(path, text[: len(text) // 2], **options)
                    raise OSError(28, "No space left on device")
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "move", fails_at_last(shutil.move))
            patch.setattr(os, "fdopen", fails_at_last(os.fdopen))
            for name in ("write_text", "replace"):
                patch.setattr(Path, name, fails_at_last(getattr(Path, name)))
            broke = _refused(words)
        if not broke:
            break
    assert step >= {"plots": 7, "joined": 7, "document": 2, "before": 2, "after": 0}[command]


def _refused(words):
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = cli.main(words)
    if code != 2:
        return False
    assert err.getvalue().count("\n") == 1
    assert "No space left" in err.getvalue()
    assert {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")} == before
    return True
