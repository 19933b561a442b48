"""What decode's division takes a GPU to do, as fitted to batches on it, and what its L2 fetches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.attention.cuda.module import memory_rate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FullRates:
    """How many programs read all that the memory gives, if no two share a path to the L2.

    Attributes:
        gathered: over blocks of one token, which threads copy.
        wide: of more than `wide_from` queries times heads of a group.
        fp8: over e4m3.
        narrow: of heads of at most `narrow_to` elements.
        others: than these; of what fits several, the first counts.
        wide_from: columns of the score tile.
        narrow_to: elements.

    """

    gathered: int
    wide: int
    fp8: int
    narrow: int
    others: int
    wide_from: int
    narrow_to: int


@dataclass(frozen=True)
class FewerCosts:
    """How much longer all takes by fewer programs than there are multiprocessors.

    Some of them share a path to the L2, and end last. In parts of 1000.

    Attributes:
        wide: over rows of more than 8 columns, and blocks of one token.
        narrow: over heads of 64 and less.
        others: over others.

    """

    wide: int
    narrow: int
    others: int


@dataclass(frozen=True)
class Fit:
    """Rates and times of one GPU; another is taken to be like the one with the nearest memory.

    Multiprocessors and L2 of Hopper GPUs are alike, and their memories are not. One that gives more
    is kept busy by more programs, and more is lost if some share a path to the L2. What is not here
    is the same for both. How many programs a multiprocessor has, but for shared blocks and
    `needs_all`, and how fast programs read that share no path or are in no cluster, was fitted to
    an H100; what cutting rows of several lengths takes, to an H200; what beginning and merging
    take, to both.

    Attributes:
        memory_rate: bytes a second that the memory is made for; see `module.memory_rate`.
        read_rate: bytes a second that are read.
        full_rates: see there.
        fewer_costs: see there.
        merge_bytes: K and V that are read in the time that it takes to merge parts.
        halves: whether half of the programs, each with a path for itself, read all that the memory
            gives of 16-bit heads of 64.
        clustered_rate: bytes a second to each program of clusters where they share paths.
        more_in_flight_to: elements of a head up to which a program alone on a multiprocessor has
            more in flight.
        tile_of_128: KV tokens that a warp takes at once, at most, of 16-bit heads of 128 with up to
            8 columns, by one program on a multiprocessor.
        needs_all: whether more is read if fewer multiprocessors are without work; see
            `decode_config.programs_for`.
        spares_paths: whether less is in flight where `shares_paths_unevenly`.
        fetched_bytes: that the L2 asks the memory for at once, 128 or 256; of prefill's tensors
            too.

    """

    memory_rate: float
    read_rate: float
    full_rates: FullRates
    fewer_costs: FewerCosts
    merge_bytes: int
    halves: bool
    clustered_rate: float
    more_in_flight_to: int
    tile_of_128: int
    needs_all: bool
    spares_paths: bool
    fetched_bytes: int


H100 = Fit(
    memory_rate=3.352e12,
    read_rate=3.1e12,
    full_rates=FullRates(
        gathered=76, wide=76, fp8=76, narrow=66, others=57, wide_from=8, narrow_to=64
    ),
    fewer_costs=FewerCosts(wide=10, narrow=87, others=31),
    merge_bytes=6_100_000,
    halves=True,
    clustered_rate=31e9,
    more_in_flight_to=64,
    tile_of_128=64,
    needs_all=False,
    spares_paths=True,
    fetched_bytes=256,
)
"""With HBM3."""

H200 = Fit(
    memory_rate=4.815e12,
    read_rate=4.45e12,
    full_rates=FullRates(
        gathered=110, wide=110, fp8=90, narrow=90, others=66, wide_from=16, narrow_to=96
    ),
    fewer_costs=FewerCosts(wide=87, narrow=87, others=87),
    merge_bytes=8_000_000,
    halves=False,
    clustered_rate=42e9,
    more_in_flight_to=80,
    tile_of_128=32,
    needs_all=True,
    spares_paths=False,
    fetched_bytes=128,
)
"""With HBM3e."""


@functools.cache
def fit_for(device: torch.device) -> Fit:
    """Return the fit of the GPU whose memory is made for about as much as the device's."""
    rate = memory_rate(device)
    return min((H100, H200), key=lambda fit: abs(fit.memory_rate - rate))
