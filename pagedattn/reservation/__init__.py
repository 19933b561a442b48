"""How serving systems reserve KV memory, in slots: each behind one interface, and a run of each.

SOSP '23, §6.1 describes FasterTransformer and the three Orcas as they are modelled here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.reservation.batches import (
    FasterTransformer,
    FlexGen,
    TextGenerationInference,
    Transformers,
)
from pagedattn.reservation.buddy import BuddyAllocator
from pagedattn.reservation.contiguous import OrcaMax, OrcaOracle, OrcaPow2
from pagedattn.reservation.paged import Paged
from pagedattn.reservation.requests import Requests
from pagedattn.reservation.rows import RequestError
from pagedattn.reservation.sampling import SharedBlocks, beam_search, parallel_sampling
from pagedattn.reservation.simulation import Filled, Simulation, StepTime, fill, simulate
from pagedattn.reservation.use import KVUse

if TYPE_CHECKING:
    from pagedattn.reservation.base import Reservation

__all__ = [
    "BuddyAllocator",
    "FasterTransformer",
    "Filled",
    "FlexGen",
    "KVUse",
    "OrcaMax",
    "OrcaOracle",
    "OrcaPow2",
    "Paged",
    "RequestError",
    "Requests",
    "SharedBlocks",
    "Simulation",
    "StepTime",
    "TextGenerationInference",
    "Transformers",
    "beam_search",
    "fill",
    "make_reservation",
    "parallel_sampling",
    "reservation_names",
    "simulate",
]

_CONTIGUOUS = (
    FasterTransformer,
    OrcaMax,
    OrcaPow2,
    OrcaOracle,
    Transformers,
    TextGenerationInference,
    FlexGen,
)


def reservation_names() -> tuple[str, ...]:
    """Names of the systems that `make_reservation` knows."""
    return (*(system.name for system in _CONTIGUOUS), Paged.name)


def make_reservation(
    name: str, num_slots: int, max_model_len: int, *, block_size: int = 16
) -> Reservation:
    """Make a system's reservation by its name, with its default settings.

    Args:
        name: one of `reservation_names()`.
        num_slots: slots of the GPU's KV memory, at least one block.
        max_model_len: most tokens a request may have.
        block_size: tokens a block, for `paged`.

    Raises:
        ValueError: there is no such system.

    """
    if name == Paged.name:
        return Paged(num_slots, max_model_len, block_size)
    for system in _CONTIGUOUS:
        if system.name == name:
            return system(num_slots, max_model_len)
    raise ValueError(f"{name!r} is none of {', '.join(reservation_names())}")
