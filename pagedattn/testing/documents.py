"""Run the code of a Markdown document as it stands there, and compare what it prints.

Python fences of one document run in order, in one namespace, as a reader would run them. A
``text`` fence that directly follows one is what it prints. A comment on the line before a fence
directs it: ``<!-- needs: vllm -->`` leaves it to runs that have vLLM, ``<!-- run -->`` has a shell
fence (``sh``, ``console``) executed, which are otherwise only shown.

    python -m pagedattn.testing.documents docs/QUICKSTART.md --needs vllm
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

SHELLS = ("sh", "console")
LANGUAGES = ("python", "text", "json", "toml", *SHELLS)

_DIRECTIVE = re.compile(r"<!-- (run|needs: ([a-z]+)) -->")


class DocumentError(Exception):
    """A document is not written as this module reads it, or does not do what it says."""


@dataclass(frozen=True)
class Fence:
    """One fenced block.

    Attributes:
        language: one of `LANGUAGES`.
        text: what stands between its fences.
        line: 1-based line of its first line of text.
        needs: what it cannot do without, as in ``vllm``; None for nothing.
        runs: whether it is executed.
        expected: the text that it must print, or None if the document does not say.

    """

    language: str
    text: str
    line: int
    needs: str | None
    runs: bool
    expected: str | None = None


def read_fences(markdown: str) -> list[Fence]:
    """Return the fences of a document, in order.

    Raises:
        DocumentError: a fence is indented, not closed, of an unknown language, or directed by a
            comment that is not understood.

    """
    lines = markdown.splitlines()
    fences: list[Fence] = []
    after_code = False  # only empty lines since the last fence, and that one runs
    place = 0
    while place < len(lines):
        line = lines[place]
        if not line.startswith("```"):
            if line.lstrip().startswith("```"):
                raise DocumentError(f"line {place + 1}: a fence must not be indented")
            after_code = after_code and not line.strip()
            place += 1
            continue
        language = line.removeprefix("```")
        if language not in LANGUAGES:
            raise DocumentError(
                f"line {place + 1}: a fence must be one of {', '.join(LANGUAGES)}, not {language!r}"
            )
        end = place + 1
        while end < len(lines) and lines[end] != "```":
            end += 1
        if end == len(lines):
            raise DocumentError(f"line {place + 1}: this fence is not closed")
        text = "".join(f"{each}\n" for each in lines[place + 1 : end])
        needs, run = _directives(lines, place)
        if language == "text" and after_code:
            fences[-1] = replace(fences[-1], expected=text)
        after_code = language == "python" or (run and language in SHELLS)
        fences.append(Fence(language, text, place + 2, needs, after_code))
        place = end + 1
    return fences


def _directives(lines: list[str], place: int) -> tuple[str | None, bool]:
    """Return what the comments right above line `place` say: what is needed, and `run`."""
    needs, run = None, False
    while place and lines[place - 1].startswith("<!--"):
        place -= 1
        match = _DIRECTIVE.fullmatch(lines[place].rstrip())
        if match is None:
            raise DocumentError(f"line {place + 1}: {lines[place]} directs nothing known")
        if match[1] == "run":
            run = True
        else:
            needs = match[2]
    return needs, run


class _Captured(io.StringIO):
    """What is printed; whoever asks for a file descriptor, as vLLM does, gets standard output's."""

    def fileno(self) -> int:
        """The descriptor of the process's standard output."""
        return sys.__stdout__.fileno() if sys.__stdout__ is not None else 1


def run_document(path: Path, needs: str | None = None, *, folder: Path | None = None) -> list[str]:
    """Run a document's fences in order: those that need nothing, and those that need `needs`.

    Args:
        path: the Markdown file.
        needs: what this machine has, as in ``vllm``.
        folder: where shell fences run; the current folder by default.

    Returns:
        What each fence printed.

    Raises:
        DocumentError: one printed something else than the document says, a shell fence failed, or
            a tensor named `out` holds NaN.
        Exception: whatever a Python fence raises; its traceback has the document's lines.

    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for fence in read_fences(path.read_text(encoding="utf-8")):
        if not fence.runs or fence.needs not in (None, needs):
            continue
        where = f"{path.name}, line {fence.line}"
        if fence.language == "python":
            printed.append(_run_python(fence, path, names))
            out = names.get("out")
            if isinstance(out, torch.Tensor) and bool(out.isnan().any()):
                raise DocumentError(f"{where}: `out` holds NaN")
        else:
            printed.append(_run_shell(fence, where, folder))
        if fence.expected is not None:
            _compare(fence.expected, printed[-1], where)
    return printed


def _run_python(fence: Fence, path: Path, names: dict[str, Any]) -> str:
    # empty lines before it, so that a traceback names the document's lines
    source = "\n" * (fence.line - 1) + fence.text
    with contextlib.redirect_stdout(_Captured()) as out:
        exec(compile(source, str(path), "exec"), names)
    return out.getvalue()


def _run_shell(fence: Fence, where: str, folder: Path | None) -> str:
    """Run a script; `console` has commands after ``$ ``, and what they print below them."""
    if fence.language == "sh":
        return _shell(fence.text, where, folder)
    printed = []
    for part in re.split(r"^\$ ", fence.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        while command.endswith("\\"):
            more, _, expected = expected.partition("\n")
            command = f"{command}\n{more}"
        printed.append(_shell(command, where, folder))
        if expected.strip():
            _compare(expected, printed[-1], where)
    return "".join(printed)


def _shell(script: str, where: str, folder: Path | None) -> str:
    # `python` is the one that runs this
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DocumentError(f"{where}: exit code {done.returncode}\n{done.stderr}{done.stdout}")
    return done.stdout


def _compare(expected: str, printed: str, where: str) -> None:
    """Raise unless the texts agree, trailing empty lines apart; `...` stands for anything."""
    expected, printed = (f"{text.rstrip()}\n" for text in (expected, printed))
    if not doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS):
        raise DocumentError(f"{where}: the document says\n{expected}but it prints\n{printed}")


def main() -> None:
    """Run a document from the command line and show what it prints."""
    parser = argparse.ArgumentParser(description="Run the code of a Markdown document.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--needs", help="run what needs this too, as in vllm")
    options = parser.parse_args()
    try:
        printed = run_document(options.path, options.needs)
    except (DocumentError, OSError) as error:
        parser.error(str(error))
    print("".join(printed), end="")


if __name__ == "__main__":
    main()
