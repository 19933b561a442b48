"""How much longer the kernels' chosen way takes than the fastest one, batch by batch.

What `cuda` chooses follows estimates, and estimates constants. Here the ways of a batch are timed
beside each other, cold, by turns, and what other constants would choose is among them.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from pagedattn.benchmarking.attention_rows import AttentionCase
from pagedattn.benchmarking.gpu_timing import LaunchGraph
from pagedattn.benchmarking.interleaved import time_interleaved
from pagedattn.benchmarking.rounds import StopRule
from pagedattn.report.tables import Table
from pagedattn.report.text import number
from pagedattn.testing import make_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    import pandas as pd

    from pagedattn.attention import AttentionCall
    from pagedattn.workloads import AttentionShape

AS_IT_IS = "as it is"
"""The label of the constants of the code."""
MODULES = (
    *("mixed", "decode_calls", "decode_division", "decode_config", "prefill_choice"),
    "prefill_estimate",
)
FACTS = frozenset(
    {
        *("NUM_PROGRAMS", "MOST_PARTS", "MIN_TILE", "WHOLE_TOKENS", "WHOLE_ROW_BYTES", "NO_LIMIT"),
        *("WARPS", "MAX_TILE", "MAX_STAGES", "GATHERERS", "MAX_BOXES", "SHARED_BYTES"),
        *("MAX_COLUMNS", "MAX_ACCUMULATORS", "MOST_KEYS", "MOST_SHARES", "MOST_KEPT"),
        *("MOST_ALIGNED", "FEW_CUT"),
    }
)
"""Numbers that a kernel is written for, or that others were computed from: they cannot be tried."""
LEAST_LOSS = 0.01
"""What a way that is as fast as another may seem to take longer, by chance."""
MUCH = 0.03
"""From which loss on a batch is listed."""
RULE = StopRule(precision=0.005, least=10, most=60, seconds=0.1)


@dataclass(frozen=True)
class Constants:
    """Other values for constants by which the kernels choose.

    Attributes:
        values: by "module.NAME", of `pagedattn.attention.cuda`.

    """

    values: tuple[tuple[str, float], ...] = ()

    @property
    def label(self) -> str:
        """For example ``prefill_estimate.UNEVEN=0.25 mixed.DECODE_SECONDS=3e-06``."""
        each = (f"{name}={repr(value).removesuffix('.0')}" for name, value in self.values)
        return " ".join(each) or AS_IT_IS

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Have the kernels choose by them inside the `with`."""
        with contextlib.ExitStack() as restored:
            restored.callback(_forget)
            for name, value in self.values:
                for module, constant in _where(name):
                    restored.callback(setattr, module, constant, getattr(module, constant))
                    setattr(module, constant, value)
            _forget()
            yield


def grid_of(words: Sequence[str]) -> list[Constants]:
    """Return all combinations of values, those of the code first.

    Args:
        words: each for example ``prefill_estimate.UNEVEN=0,0.25``: a constant, and values to try.

    Raises:
        ValueError: there is no such constant, or a value is no finite number of its type, 0 or
            more.

    """
    each = []
    for word in words:
        name, _, values = word.partition("=")
        constant = getattr(*_found(name))
        try:
            numbers = [type(constant)(value) for value in values.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError(
                f"{word!r} has a value that is no {type(constant).__name__}, finite and 0 or more; "
                f"{name} is {constant:g} now"
            )
        each.append([(name, number) for number in numbers])
    tried = [Constants(values) for values in itertools.product(*each)] if each else []
    return [Constants(), *tried]


def _found(name: str) -> tuple[ModuleType, str]:
    """Return a constant's module and its name there; raise ValueError if there is none."""
    module_name, _, constant = name.partition(".")
    if module_name in MODULES and constant.isupper() and constant not in FACTS:
        module = importlib.import_module(f"pagedattn.attention.cuda.{module_name}")
        value = getattr(module, constant, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return module, constant
    raise ValueError(
        f"there is no constant {name!r} to try; one is prefill_estimate.UNEVEN, others are "
        f"numbers in capitals of {', '.join(MODULES)} that no kernel depends on"
    )


def _where(name: str) -> list[tuple[ModuleType, str]]:
    """Return the modules that have a constant: its own, and those that import it."""
    module, constant = _found(name)
    value = getattr(module, constant)
    kernels = [
        each for path, each in sys.modules.items() if path.startswith("pagedattn.attention.cuda.")
    ]
    return [(each, constant) for each in kernels if getattr(each, constant, None) is value]


def _forget() -> None:
    """Let what was found out by other constants, and is kept, be found out again."""
    for name in MODULES:
        module = importlib.import_module(f"pagedattn.attention.cuda.{name}")
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


@dataclass(frozen=True)
class TimedWays:
    """The ways of a batch, and which of them are chosen.

    Attributes:
        shape: of the batch.
        seconds: of a launch, by way.
        chosen: ways, by the labels of constants, `AS_IT_IS` among them.

    """

    shape: AttentionShape
    seconds: Mapping[str, float]
    chosen: Mapping[str, str]

    @property
    def fastest(self) -> str:
        """The way that takes least time."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def kind(self) -> str:
        """Of a drawn batch, what its name begins with."""
        return self.shape.name.partition("-")[0]

    def loss(self, label: str = AS_IT_IS) -> float:
        """What the chosen way takes longer than the fastest, as a share of the fastest's time."""
        return self.seconds[self.chosen[label]] / self.seconds[self.fastest] - 1

    def __str__(self) -> str:
        """Say in a line how well was chosen."""
        chosen = self.seconds[self.chosen[AS_IT_IS]]
        text = f"{self.shape.name} takes {number(chosen * 1e6)} µs as chosen"
        if self.loss() > LEAST_LOSS:
            text += f", {_share(self.loss())} longer than the fastest of {len(self.seconds)} ways"
        return text


def compile_ways(shape: AttentionShape) -> None:
    """Compile what `time_ways` will launch, so that processes can do it side by side.

    Those of the code's constants: what others choose besides is compiled when it is timed.
    """
    from pagedattn.attention.cuda import ways

    ways.ways_of(make_inputs(shape, device="cuda").call())
    torch.cuda.empty_cache()


def time_ways(
    shape: AttentionShape,
    tried: Sequence[Constants] = (Constants(),),
    *,
    device: str = "cuda",
    make_timed: Callable[[list[Callable[[], None]]], LaunchGraph] = LaunchGraph,
) -> TimedWays:
    """Time a batch's ways by turns, over inputs larger than twice the L2.

    Args:
        shape: of the batch.
        tried: constants whose choices are asked for.
        device: of the tensors.
        make_timed: of launches over the inputs, what is replayed.

    Raises:
        ValueError: the batch goes to Triton's kernels, or nothing can be chosen by some constants.
        AssertionError: a way's result errs by more than the budget.

    """
    from pagedattn.attention.cuda import ways

    case = AttentionCase.of(shape, device)
    calls = [inputs.call() for inputs in case.rotation]
    launches = ways.ways_of(calls[0])
    chosen = {}
    for constants in tried:
        with constants.applied():
            try:
                launch = ways.chosen_way(calls[0])
            except (ArithmeticError, LookupError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"the kernels cannot choose by {constants.label}: {error}"
                ) from error
            chosen[constants.label] = ways.name_of(launch, calls[0])
            launches.setdefault(chosen[constants.label], launch)
    graphs = {}
    for name, launch in launches.items():
        try:
            _check(case, calls[0], launch)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        graphs[name] = make_timed([partial(launch, call) for call in calls])
    rounds = time_interleaved(graphs, RULE)
    seconds = {name: statistics.median(each.seconds) for name, each in rounds.items()}
    return TimedWays(shape, seconds, chosen)


def _check(
    case: AttentionCase, call: AttentionCall, launch: Callable[[AttentionCall], None]
) -> None:
    call.out.fill_(torch.nan)
    launch(call)
    case.error("cuda", call.out)


def _share(loss: float) -> str:
    return f"{100 * loss:.1f} %"


def kind_table(found: Sequence[TimedWays]) -> Table:
    """Make the table of what choosing loses, by kind and over all batches."""
    groups = {kind: [each for each in found if each.kind == kind] for kind in _kinds(found)}
    if len(groups) > 1:
        groups["all"] = list(found)
    lines = []
    for kind, batches in groups.items():
        losses = [each.loss() for each in batches]
        best = sum(loss <= LEAST_LOSS for loss in losses)
        mean, most = _share(statistics.fmean(losses)), _share(max(losses))
        lines.append([kind, str(len(batches)), str(best), mean, most])
    title = "what the chosen way takes longer than the fastest"
    return Table(title, ["batches", "number", "within 1 %", "mean", "most"], lines, 1)


def _kinds(found: Sequence[TimedWays]) -> list[str]:
    return list(dict.fromkeys(each.kind for each in found))


def trial_table(found: Sequence[TimedWays]) -> Table:
    """Make the table of what other constants would lose, least first; empty if none are tried."""
    labels = list(found[0].chosen) if found else []
    rows = []
    for label in labels if len(labels) > 1 else ():
        losses = [each.loss(label) for each in found]
        others = sum(each.chosen[label] != each.chosen[AS_IT_IS] for each in found)
        rows.append((statistics.fmean(losses), max(losses), others, label))
    lines = [
        [label, str(others), _share(mean), _share(most)]
        for mean, most, others, label in sorted(rows)
    ]
    title = "what the way that other constants choose takes longer than the fastest"
    return Table(title, ["constants", "chosen otherwise", "mean", "most"], lines, 1)


def loss_table(found: Sequence[TimedWays]) -> Table:
    """Make the table of batches that lose 3 % and more, the worst first."""
    worst = sorted((each for each in found if each.loss() >= MUCH), key=lambda each: -each.loss())
    lines = [
        [
            each.shape.name,
            each.chosen[AS_IT_IS],
            each.fastest,
            number(each.seconds[each.chosen[AS_IT_IS]] * 1e6),
            number(each.seconds[each.fastest] * 1e6),
            _share(each.loss()),
        ]
        for each in worst
    ]
    header = ["batch", "chosen", "fastest", "chosen µs", "fastest µs", "longer"]
    return Table("batches that lose 3 % and more", header, lines, 3)


def to_frame(found: Sequence[TimedWays]) -> pd.DataFrame:
    """Return a row for each way of each batch: its time, and by which constants it is chosen."""
    import pandas as pd

    lines = []
    for batch in found:
        shape = batch.shape
        for way, seconds in batch.seconds.items():
            by = [label for label, chosen in batch.chosen.items() if chosen == way]
            lines.append(
                {
                    "workload": shape.name,
                    "sequences": shape.num_sequences,
                    "query_tokens": shape.num_query_tokens,
                    "longest": max(shape.kv_lengths),
                    "heads": f"{shape.num_query_heads}:{shape.num_kv_heads}",
                    "head_size": shape.head_size,
                    "way": way,
                    "us": seconds * 1e6,
                    "is_chosen": AS_IT_IS in by,
                    "chosen_by": "; ".join(by),
                }
            )
    return pd.DataFrame(lines)
