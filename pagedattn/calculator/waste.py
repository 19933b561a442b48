"""Part 1: requests of different lengths, and where each system's memory goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.calculator.settings import percent
from pagedattn.calculator.workload import fill_with
from pagedattn.reservation import KVUse, RequestError, make_reservation, reservation_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedattn.calculator.settings import Settings

STANDARD = "fastertransformer"
"""The standard reservation: the model's maximum length for each request, from the first token."""

PAGED = "paged"
_REQUESTS = 2000  # a memory is filled until so many were in, or so many times
_MOST_FILLINGS = 200


@dataclass(frozen=True, slots=True)
class SystemWaste:
    """How one system's memory is used while one more request waits.

    ``shares`` are of all slots and sum to 1. ``num_requests`` is the mean over ``num_fillings``,
    and ``held_tokens`` the mean tokens that a request held. ``waste`` is the share of the memory
    that holds no token, ``waste_of_reserved`` that of the slots kept for requests: all but the
    external waste. A system that cannot hold some request alone has ``reason``, and no numbers.
    """

    system: str
    num_fillings: int
    num_requests: float
    held_tokens: float
    shares: dict[str, float]
    waste: float | None
    waste_of_reserved: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Waste:
    """Part 1's result, for a memory of ``num_slots``."""

    num_slots: int
    mean_tokens: float
    systems: tuple[SystemWaste, ...]
    formulas: tuple[str, ...]

    def of(self, system: str) -> SystemWaste:
        """Return one system's row."""
        return next(row for row in self.systems if row.system == system)


def calculate_waste(settings: Settings, progress: Callable[[str], None]) -> Waste:
    """Fill the memory of each system with requests that are under way, many times, and count."""
    rows = []
    for name in reservation_names():
        progress(f"waste: {name}")
        rows.append(_fill(settings, name))
    formulas = _formulas(settings, {row.system: row for row in rows})
    mean = settings.waste_requests.mean_tokens
    return Waste(settings.budgets[0].num_slots, mean, tuple(rows), formulas)


def _fill(settings: Settings, name: str) -> SystemWaste:
    slots = settings.budgets[0].num_slots
    used, count, num_fillings = KVUse(0, 0, 0, 0, 0), 0, 0
    while count < _REQUESTS and num_fillings < _MOST_FILLINGS:
        try:
            filled = fill_with(
                lambda: make_reservation(
                    name, slots, settings.max_model_len, block_size=settings.memory.block_size
                ),
                settings.waste_requests,
                slots,
                settings.seed + num_fillings,
            )
        except RequestError as error:
            return SystemWaste(name, 0, 0.0, 0.0, {}, None, None, str(error))
        used, count = used + filled.use, count + filled.num_requests
        num_fillings += 1
    kept = used.token_states + used.reservation + used.internal
    return SystemWaste(
        system=name,
        num_fillings=num_fillings,
        num_requests=count / num_fillings,
        held_tokens=used.token_states / count,
        shares=used.shares(),
        waste=used.waste,
        waste_of_reserved=1 - used.token_states / kept,
    )


def _formulas(settings: Settings, rows: dict[str, SystemWaste]) -> tuple[str, ...]:
    """Say how the counted waste follows from the settings, with the numbers put in."""
    mean, most = settings.waste_requests.mean_tokens, settings.max_model_len
    size = settings.memory.block_size
    end = (size - 1) / 2
    return (
        (
            f"{STANDARD}: 1 - {mean:.0f} tokens held / {most} reserved = "
            f"{percent(1 - mean / most)}; counted: {_percent(rows[STANDARD])}"
        ),
        (
            f"{PAGED}: empty end of the last block ({size} - 1) / 2 = {end:g} slots on average, "
            f"{end:g} / ({mean:.0f} + {end:g}) = {percent(end / (mean + end))}; "
            f"counted: {_percent(rows[PAGED])}"
        ),
    )


def _percent(row: SystemWaste) -> str:
    share = row.waste_of_reserved
    return "a request does not fit" if share is None else percent(share)
