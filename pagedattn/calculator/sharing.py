"""Part 3: users that share a system prompt, and the blocks that they hold together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager import BlockManager
from pagedattn.calculator.settings import percent
from pagedattn.memory import num_blocks_for
from pagedattn.workloads import random_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pagedattn.calculator.settings import Settings

_BLOCK_SIZES = (4, 8, 16, 32, 64)
_POINTS = 20


@dataclass(frozen=True, slots=True)
class SharedBlocks:
    """Blocks that ``num_users`` hold, counted by block managers without and with sharing."""

    num_users: int
    block_size: int
    separate: int
    shared: int

    @property
    def saved(self) -> float:
        """Share of the blocks that sharing saves."""
        return 1 - self.shared / self.separate


@dataclass(frozen=True, slots=True)
class Sharing:
    """Part 3's result.

    ``by_users`` counts with the settings' block size, the last with all users; ``by_block_size``
    with all users. ``saved_tokens`` is what would be saved if blocks had one token.
    """

    by_users: tuple[SharedBlocks, ...]
    by_block_size: tuple[SharedBlocks, ...]
    bytes_per_block: int
    saved_tokens: float
    formulas: tuple[str, ...]

    @property
    def total(self) -> SharedBlocks:
        """The count for all users."""
        return self.by_users[-1]


def calculate_sharing(settings: Settings, progress: Callable[[str], None]) -> Sharing:
    """Admit each user's prompt, which begins with the same tokens, and count blocks."""
    size = settings.memory.block_size
    prompts = _prompts(settings)
    steps = np.linspace(1, settings.num_users, min(_POINTS, settings.num_users))
    progress("sharing: by users")
    by_users = _count(prompts, size, sorted(set(np.rint(steps).astype(int).tolist())))
    by_size = []
    for other in sorted({*_BLOCK_SIZES, size}):
        progress(f"sharing: blocks of {other}")
        by_size += _count(prompts, other, [len(prompts)])
    users, system, own = settings.num_users, settings.system_prompt_tokens, settings.own_tokens
    separate, shared = users * (system + own), system + users * own
    return Sharing(
        by_users=tuple(by_users),
        by_block_size=tuple(by_size),
        bytes_per_block=settings.memory.bytes_per_block,
        saved_tokens=1 - shared / separate,
        formulas=_formulas(settings, by_users[-1]),
    )


def _prompts(settings: Settings) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(settings.seed)
    (system,) = random_prompts(rng, [settings.system_prompt_tokens])
    own = random_prompts(rng, [settings.own_tokens] * settings.num_users)
    return [np.concatenate([system, tokens]) for tokens in own]


def _count(
    prompts: list[NDArray[np.int32]], block_size: int, num_users: list[int]
) -> list[SharedBlocks]:
    """Count blocks when so many users have been admitted, one after the other."""
    num_blocks = len(prompts) * num_blocks_for(len(prompts[0]), block_size)
    plain = BlockManager(num_blocks, block_size, prefix_caching=False)
    sharing = BlockManager(num_blocks, block_size)
    counts, before = [], 0
    for users in num_users:
        for manager in (plain, sharing):
            manager.admit(prompts[before:users])
        before = users
        used = [num_blocks - manager.num_free_blocks for manager in (plain, sharing)]
        counts.append(SharedBlocks(users, block_size, *used))
    return counts


def _formulas(settings: Settings, total: SharedBlocks) -> tuple[str, ...]:
    """Say how the saving follows from the settings, in tokens and in blocks."""
    users, system, own = settings.num_users, settings.system_prompt_tokens, settings.own_tokens
    size = settings.memory.block_size
    separate, shared = users * (system + own), system + users * own
    full = min(system, system + own - 1) // size
    each = num_blocks_for(system + own, size)
    return (
        (
            f"tokens: 1 - ({system} + {users} x {own}) / ({users} x {system + own}) = "
            f"1 - {shared:,} / {separate:,} = {percent(1 - shared / separate)}"
        ),
        (
            f"blocks of {size}: {system} tokens fill {full}, which all share; each user has "
            f"{each} - {full} of its own: 1 - ({full} + {users} x {each - full}) / "
            f"({users} x {each}) = {percent(1 - (full + users * (each - full)) / (users * each))}; "
            f"counted: 1 - {total.shared:,} / {total.separate:,} = {percent(total.saved)}"
        ),
    )
