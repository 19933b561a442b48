"""All implementations of a case timed by turns, once; each row then takes its own rounds."""

from __future__ import annotations

import statistics
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pagedattn.benchmarking.gpu_timing import DeviceClock
from pagedattn.benchmarking.rounds import StopRule, median_precision
from pagedattn.benchmarking.turns import time_by_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

TURN = 2  # rounds of one before the next has its turn
WARMUP = 3
THROTTLED_BELOW = 0.75  # of the case's usual clock
PATIENCE = 5
PAUSE = 0.02  # seconds; what draws too much power is throttled for some tens of milliseconds


class Timed(Protocol):
    """Work whose round measures itself, as the replay of a graph does."""

    def replay(self) -> float:
        """Do one round; return its seconds."""


class HostWork:
    """A call that is over when it returns, timed on the host.

    Args:
        call: what is timed.
        prepare: called before each round, not timed.

    """

    def __init__(
        self, call: Callable[[], object], prepare: Callable[[], object] | None = None
    ) -> None:
        self._call, self._prepare = call, prepare

    def replay(self) -> float:
        """Call once; return the seconds that it took."""
        if self._prepare is not None:
            self._prepare()
        begin = time.perf_counter()
        self._call()
        return time.perf_counter() - begin


@dataclass(frozen=True, slots=True)
class Rounds:
    """The rounds of one implementation that count.

    Attributes:
        seconds: of each round, in order.
        discarded: rounds that ran while the clock was below 75 % of the case's median.
        clock_hz: median of the clock in the rounds that count; None where it was not asked.

    """

    seconds: tuple[float, ...]
    discarded: int
    clock_hz: float | None

    @property
    def precision(self) -> float:
        """Half the width of the median's 95 % interval, over the median."""
        return median_precision(self.seconds)

    def columns(self) -> dict[str, float]:
        """Columns of a row about how it was timed."""
        row: dict[str, float] = {"discarded_rounds": self.discarded}
        if len(self.seconds) > 5:
            row["median_interval"] = self.precision
        if self.clock_hz is not None:
            row["sm_clock_mhz"] = self.clock_hz * 1e-6
        return row


class ThrottledError(RuntimeError):
    """The machine changes its clock too often to be measured; the message is one sentence."""


@dataclass
class _Contender:
    work: Timed
    own: DeviceClock
    probe: Callable[[], float] | None
    seconds: list[float] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)
    counts: bool = False
    patience: int = 0
    usual: float = 0.0

    def prepare(self) -> None:
        """Take the clock; while it is throttled, pause some times."""
        if self.probe is None:
            return
        clock = self.probe()
        for _ in range(self.patience):
            if clock >= THROTTLED_BELOW * self.usual:
                break
            time.sleep(PAUSE)
            clock = self.probe()
        if self.counts:
            self.clocks.append(clock)

    def run(self) -> None:
        self.own.advance(self.work.replay())

    def rounds(self, usual: float | None) -> Rounds:
        """The rounds that ran at the usual clock or near it."""
        if usual is None:
            return Rounds(tuple(self.seconds), 0, None)
        kept = [
            (seconds, clock)
            for seconds, clock in zip(self.seconds, self.clocks, strict=True)
            if clock >= THROTTLED_BELOW * usual
        ]
        clock = statistics.median(clock for _, clock in kept) if kept else None
        return Rounds(tuple(s for s, _ in kept), len(self.seconds) - len(kept), clock)


def time_interleaved(
    works: Mapping[str, Timed],
    rule: StopRule,
    probe: Callable[[], float] | None = None,
    *,
    turn: int = TURN,
    settle: int = 0,
    patience: int = PATIENCE,
) -> dict[str, Rounds]:
    """Time works by turns until the median of each is known well enough.

    Args:
        works: by name; each replays once a round.
        rule: when the rounds of a work will do; all go on until the last one's do, so that each
            has as many and they saw the same machine. But one that is so slow that it has taken
            the rule's seconds ends there, as it would keep the others waiting for most of theirs.
        probe: asked for the processor's clock in Hz before each round; None where it is not known.
        turn: rounds of one that count before the next has its turn.
        settle: rounds before them that do not, for works that find caches full of others' data.
        patience: pauses of 20 ms before a round while the clock is throttled; a round that begins
            below 75 % of the usual clock nevertheless does not count.

    Returns:
        The rounds of each work that count, by name.

    Raises:
        ThrottledError: of a work more than half of the most rounds had to be discarded.

    """
    clock = DeviceClock()
    contenders = {name: _Contender(work, clock, probe) for name, work in works.items()}
    if contenders:
        time_by_turns(contenders, 0, turn=1, warmup=WARMUP, clock=clock)
    for contender in contenders.values():
        contender.counts, contender.patience = True, patience
    order = list(contenders)
    found: dict[str, Rounds] = {}
    spent: set[str] = set()
    while contenders:
        lap = time_by_turns(
            {name: contenders[name] for name in order if name not in spent},
            settle + turn,
            turn=settle + turn,
            clock=clock,
        )
        order = order[1:] + order[:1]
        for name, seconds in lap.items():
            contenders[name].seconds += seconds[settle:]
            del contenders[name].clocks[-turn - settle : -turn]
        clocks = [clock for contender in contenders.values() for clock in contender.clocks]
        usual = statistics.median(clocks) if clocks else None
        for contender in contenders.values():
            contender.usual = usual or 0.0
        found = {name: contender.rounds(usual) for name, contender in contenders.items()}
        for name, rounds in found.items():
            if rounds.discarded > rule.most / 2:
                raise ThrottledError(
                    f"{rounds.discarded} of {len(contenders[name].seconds)} rounds of {name} ran "
                    f"below {THROTTLED_BELOW:.0%} of the usual clock: let the machine cool down, "
                    f"or lock its clocks"
                )
        if all(rule.enough(rounds.seconds) for rounds in found.values()):
            break
        spent = {name for name, rounds in found.items() if rule.spent(rounds.seconds)}
    return found


class CaseTiming:
    """The implementations of one case: made ready, checked and timed together at the first ask.

    Args:
        names: implementations whose rows are asked for.
        make: makes an implementation's work ready and checks its result; what it raises is the
            failure of that implementation's row alone.
        rule: when there are rounds enough.
        probe: see `time_interleaved`.
        turn: see `time_interleaved`.
        settle: see `time_interleaved`.

    """

    def __init__(
        self,
        names: Iterable[str],
        make: Callable[[str], Timed],
        rule: StopRule,
        probe: Callable[[], float] | None = None,
        *,
        turn: int = TURN,
        settle: int = 0,
    ) -> None:
        self._turn, self._settle = turn, settle
        self._names = list(dict.fromkeys(names))
        self._make, self._rule, self._probe = make, rule, probe
        self._rounds: dict[str, Rounds] | None = None
        self._failures: dict[str, BaseException] = {}
        self._broken: Exception | None = None

    def of(self, name: str) -> Rounds:
        """The rounds of an implementation; the first call times all of them.

        Raises:
            ThrottledError: as `time_interleaved` does; then for all implementations.
            BaseException: what `make` raised for this implementation.

        """
        if self._broken is not None:
            raise self._broken
        if self._rounds is None:
            works: dict[str, Timed] = {}
            for each in dict.fromkeys([*self._names, name]):
                try:
                    works[each] = self._make(each)
                except BaseException as failure:  # a skip is one; its row raises it
                    if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                        raise
                    traceback.clear_frames(failure.__traceback__)  # they hold memory
                    self._failures[each] = failure
            try:
                self._rounds = time_interleaved(
                    works, self._rule, self._probe, turn=self._turn, settle=self._settle
                )
            except Exception as failure:
                self._broken = failure
                raise
        if name in self._failures:
            raise self._failures[name]
        return self._rounds[name]
