"""Timing several implementations by turns."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Contender(Protocol):
    """Work to be timed, a round at a time."""

    def prepare(self) -> None:
        """Get ready for one round; not timed."""

    def run(self) -> None:
        """Do one round."""


def time_by_turns(
    contenders: Mapping[str, Contender],
    rounds: int,
    *,
    turn: int,
    warmup: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time rounds of several contenders by turns, so that what slows the machine slows all.

    A machine that is shared changes its speed for seconds at a time. Were one contender timed
    after the other, one might have the slow seconds to itself. Here each does a few rounds, then
    the next; who begins changes from lap to lap. Within a turn the processor's caches are the
    contender's own from the second round on, as in a loop.

    Args:
        contenders: by name.
        rounds: rounds of each that count.
        turn: rounds of one before the next has its turn, at least 1.
        warmup: rounds of each that are not timed, before all others.
        clock: seconds.

    Returns:
        Seconds of each round, by name, in order.

    Raises:
        ValueError: `turn` is less than 1.

    """
    if turn < 1:
        raise ValueError(f"turn is {turn}; a turn has at least 1 round")
    for contender in contenders.values():
        for _ in range(warmup):
            contender.prepare()
            contender.run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for begin in range(0, rounds, turn):
        for name in order:
            prepare, run = contenders[name].prepare, contenders[name].run
            for _ in range(min(turn, rounds - begin)):
                prepare()
                start = clock()
                run()
                seconds[name].append(clock() - start)
        order = order[1:] + order[:1]
    return seconds
