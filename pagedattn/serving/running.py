"""Start an engine and run the tests on it, in this process or in one of its own."""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

from pagedattn.serving.benchmark import ServingResult, measure
from pagedattn.serving.load import LoadError
from pagedattn.serving.vllm_engine import EngineError, VllmEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedattn.serving.settings import LoadSettings, Policy, Scale

_BAR = 24


class Bar:
    """Shows on stderr how far a part is, in one changing line; plain lines if it is no terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._part = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` requests of a part named `what`."""
        if self._is_terminal:
            filled = _BAR * done // max(1, total)
            bar = "█" * filled + "░" * (_BAR - filled)
            sys.stderr.write(f"\r{what:<24} {bar} {done}/{total} requests")
            if done == total:
                sys.stderr.write("\n")
        elif what != self._part:
            sys.stderr.write(f"{what}: {total} requests\n")
        self._part = what
        sys.stderr.flush()


def run_here(
    policy: Policy, tests: Sequence[str], load: LoadSettings, scale: Scale, seed: int
) -> ServingResult:
    """Start the engine in this process, which then is not good for another; may raise LoadError."""
    bar = Bar()
    name = f" ({policy.name})" if policy.name else ""
    print(f"starting vLLM{name} ...", file=sys.stderr, flush=True)
    try:
        engine = VllmEngine(policy.settings)
        try:
            return measure(engine, policy.name, tests, load, scale, seed, bar)
        finally:
            engine.close()
    except EngineError as error:
        raise LoadError(str(error)) from error


def run_apart(
    policy: Policy, tests: Sequence[str], load: LoadSettings, scale: Scale, seed: int
) -> ServingResult | None:
    """Do the same in a process of its own; None if Ctrl-C ended it before anything was measured.

    Raises LoadError as `run_here` does, and if the process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, policy, tests, load, scale, seed))
    child.start()
    sender.close()
    answer: Any = None
    while True:
        try:
            answer = receiver.recv()
            break
        except EOFError:
            break
        except KeyboardInterrupt:
            # the child was interrupted too, and sends what it has
            continue
    child.join()
    if isinstance(answer, ServingResult):
        return answer
    if isinstance(answer, str):
        raise LoadError(f"{policy.name}: {answer}")
    if answer is None and child.exitcode not in (0, 130, -2):
        raise LoadError(f"{policy.name}: vLLM's process ended with code {child.exitcode}.")
    return None


def _child(
    sender: Any,
    policy: Policy,
    tests: Sequence[str],
    load: LoadSettings,
    scale: Scale,
    seed: int,
) -> None:
    try:
        sender.send(run_here(policy, tests, load, scale, seed))
    except LoadError as error:
        sender.send(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
