"""Part 2: how many users fit, and how many tokens a second that makes, for each system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.block_manager import BlockManager, OutOfBlocksError
from pagedattn.calculator.settings import gib_text
from pagedattn.calculator.waste import PAGED, STANDARD
from pagedattn.calculator.workload import fill_with
from pagedattn.reservation import (
    RequestError,
    StepTime,
    make_reservation,
    reservation_names,
    simulate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedattn.calculator.settings import Budget, Settings
    from pagedattn.calculator.workload import Workload
    from pagedattn.memory import KVMemory
    from pagedattn.reservation import Simulation

WINDOWS = "paged-windows"
"""The block manager with the model's layer groups: blocks that leave a window are given back."""

BUS_BANDWIDTH = 16e9
"""Bytes a second between host and GPU: PCIe 3.0 with 16 lanes."""

_USERS = 4000  # a memory is filled until so many were in, or so many times
_MOST_FILLINGS = 100
_CHUNK = 2048  # tokens of a prompt that are stored at once
WATERMARK = 0.01  # as `Paged` has it
_SHORTEST_QUEUE, _LONGEST_QUEUE = 2.0, 8.0  # requests served for each that fits
_LEAST_REQUESTS, _MOST_REQUESTS = 100, 60_000
_RUN_SECONDS = 6.0  # about, for the longest run
_STEP_SECONDS, _BLOCK_SECONDS = 4e-4, 12e-9  # of a simulated step, and of counting a block in it


@dataclass(frozen=True, slots=True)
class SystemUsers:
    """How many users one system serves.

    ``users`` has the mean number that fit for each budget, by its name, and ``None`` where a
    request does not fit alone. From a run under the last budget, while requests wait:
    ``num_requests`` served in all, ``mean_running`` in a step, ``tokens_per_s`` at most, and how
    many times one was preempted; ``None`` without such a run.
    """

    system: str
    users: dict[str, float | None]
    num_requests: int | None = None
    mean_running: float | None = None
    tokens_per_s: float | None = None
    num_preempted: int | None = None


@dataclass(frozen=True, slots=True)
class Users:
    """Part 2's result; ``no_run`` says why nothing was run, or is ``None``."""

    mean_tokens: float
    systems: tuple[SystemUsers, ...]
    formulas: tuple[str, ...]
    no_run: str | None

    def of(self, system: str) -> SystemUsers:
        """Return one system's row."""
        return next(row for row in self.systems if row.system == system)


def calculate_users(settings: Settings, progress: Callable[[str], None]) -> Users:
    """Fill each system's memory under each budget, then let it serve a queue of requests."""
    counted: dict[str, dict[str, float | None]] = {}
    for name in _systems(settings):
        progress(f"users: {name}")
        counted[name] = {
            budget.name: _mean_users(settings, name, budget) for budget in settings.budgets
        }
    no_run = _why_no_run(settings)
    runs: dict[str, tuple[int, Simulation]] = {}
    if no_run is None:
        runs = _run_all(settings, counted, progress)
    rows = tuple(_row(name, users, runs.get(name)) for name, users in counted.items())
    mean = settings.user_requests.mean_tokens
    return Users(mean, rows, _formulas(settings, counted), no_run)


def bound(settings: Settings, num_running: float) -> float:
    """Return the tokens a second of so many running requests, new ones taking finished ones' place.

    A step reads the weights, each request's K and V, and computes a token of each, and the prompts
    of those that come: a prompt for every output.
    """
    times, requests = step_time(settings), settings.user_requests
    prompt, output = requests.mean_lengths
    each = times.per_token * (1 + prompt / output) + requests.mean_tokens * times.per_stored_token
    return num_running / (times.fixed + num_running * each)


def step_time(settings: Settings) -> StepTime:
    """Return the time of a step that only reads weights and K and V and multiplies, once each."""
    gpu, memory = settings.gpu, settings.memory
    weights, parameters = settings.weights_on_gpu, settings.model.num_parameters
    assert gpu.bandwidth is not None
    assert weights is not None
    flops = 0.0
    if gpu.flops is not None and parameters is not None:
        flops = 2 * parameters / (gpu.flops * memory.tensor_parallel_size)
    return StepTime(
        fixed=weights / gpu.bandwidth,
        per_token=flops,
        per_stored_token=memory.bytes_per_token / gpu.bandwidth,
        per_offloaded_slot=memory.bytes_per_token / BUS_BANDWIDTH,
    )


def _systems(settings: Settings) -> tuple[str, ...]:
    windows = [group.window for group in settings.model.layer_groups]
    has_window = any(window is not None and window < settings.max_model_len for window in windows)
    return (*reservation_names(), *([WINDOWS] if has_window else []))


def _why_no_run(settings: Settings) -> str | None:
    if settings.gpu.bandwidth is None:
        return f"the bandwidth of {settings.gpu.name} is not known"
    if settings.weights_on_gpu is None:
        return f"the weights of {settings.model.name} are not known"
    if settings.budgets[-1].name == "without-weights":
        return "the weights leave no memory for a request of the maximum length"
    return None


def _mean_users(settings: Settings, name: str, budget: Budget) -> float | None:
    count = num_fillings = 0
    while count < _USERS and num_fillings < _MOST_FILLINGS:
        seed = settings.seed + num_fillings
        try:
            count += _num_users(settings, name, budget, seed)
        except RequestError:
            return None
        num_fillings += 1
    return count / num_fillings


def _num_users(settings: Settings, name: str, budget: Budget, seed: int) -> int:
    if name == WINDOWS:
        return _fill_windows(settings.memory, settings.user_requests, budget, seed)
    return fill_with(
        lambda: make_reservation(
            name,
            budget.num_slots,
            settings.max_model_len,
            block_size=settings.memory.block_size,
        ),
        settings.user_requests,
        budget.num_slots,
        seed,
    ).num_requests


def _fill_windows(memory: KVMemory, requests: Workload, budget: Budget, seed: int) -> int:
    """Count the users whose tokens a block manager with the model's layer groups holds."""
    manager = BlockManager(
        memory.num_pool_blocks_in(budget.num_bytes),
        memory.block_size,
        prefix_caching=False,
        windows=memory.pool_windows,
        watermark=WATERMARK,
    )
    rng = np.random.default_rng(seed)
    for number in range(manager.num_blocks):  # a user holds a block at least
        if number % _CHUNK == 0:
            held = requests.held_tokens(rng, _CHUNK)
        if not _store(manager, int(held[number % _CHUNK])):
            return number
    return manager.num_blocks


def _store(manager: BlockManager, num_tokens: int) -> bool:
    """Store a sequence of so many tokens in chunks, the last token alone, if there is room."""
    first = max(1, min(_CHUNK, num_tokens - 1))
    if not manager.can_allocate([first]):
        return False
    (sequence,) = manager.allocate([first])
    try:
        while first < num_tokens:
            chunk = max(1, min(_CHUNK, num_tokens - 1 - first))
            manager.append([sequence], chunk)
            first += chunk
    except OutOfBlocksError:
        return False
    return True


def _run_all(
    settings: Settings,
    counted: dict[str, dict[str, float | None]],
    progress: Callable[[str], None],
) -> dict[str, tuple[int, Simulation]]:
    """Let each system serve a queue that is there at the start, the longer the more it batches."""
    times, budget = step_time(settings), settings.budgets[-1]
    # as many steps for each that fits as its output has tokens
    steps = _RUN_SECONDS / (_STEP_SECONDS + _BLOCK_SECONDS * budget.num_blocks)
    queue = np.clip(steps / settings.user_requests.mean_lengths[1], _SHORTEST_QUEUE, _LONGEST_QUEUE)
    runs = {}
    for name in reservation_names():
        users = counted[name][budget.name]
        if users is None or queue * users > _MOST_REQUESTS:
            continue
        count = max(_LEAST_REQUESTS, int(queue * users))
        requests = settings.user_requests.draw(np.random.default_rng(settings.seed), count)
        reservation = make_reservation(
            name, budget.num_slots, settings.max_model_len, block_size=settings.memory.block_size
        )
        try:
            runs[name] = count, simulate(reservation, requests, times, _told(progress, name))
        except RequestError:  # one of these is longer than those that filled the memory
            continue
    return runs


def _told(progress: Callable[[str], None], name: str) -> Callable[[int, int], None]:
    progress(f"throughput: {name}")
    return lambda done, count: progress(f"throughput: {name}, {done} of {count} requests")


def _row(
    name: str, users: dict[str, float | None], run: tuple[int, Simulation] | None
) -> SystemUsers:
    if run is None:
        return SystemUsers(name, users)
    count, served = run
    return SystemUsers(
        name, users, count, served.mean_running, served.queued_tokens_per_s, served.num_preempted
    )


def _formulas(settings: Settings, counted: dict[str, dict[str, float | None]]) -> tuple[str, ...]:
    """Say how the users that fit follow from the settings, with the numbers put in."""
    size, most = settings.memory.block_size, settings.max_model_len
    mean = settings.user_requests.mean_tokens
    end = (size - 1) / 2
    lines = []
    for budget in settings.budgets:
        standard, paged = counted[STANDARD][budget.name], counted[PAGED][budget.name]
        lines += [
            (
                f"{budget.name}: {budget.formula} = {gib_text(budget.num_bytes)}; / "
                f"{settings.memory.bytes_per_token:,} bytes a token = {budget.num_slots:,} tokens"
            ),
            (
                f"  {STANDARD}: {budget.num_slots:,} / {most} = {budget.num_slots / most:.1f}; "
                f"counted: {_count(standard)}"
            ),
            (
                f"  {PAGED}: 99 % of {budget.num_slots:,} / ({mean:.0f} + {end:g}) = "
                f"{0.99 * budget.num_slots / (mean + end):.1f}; counted: {_count(paged)}"
            ),
        ]
        if WINDOWS in counted:
            held = settings.user_requests.held_tokens(np.random.default_rng(settings.seed), 20_000)
            one = float(settings.memory.bytes_of(held).mean())
            lines.append(
                f"  {WINDOWS}: 99 % of {budget.num_bytes:,} bytes / {one:,.0f} bytes of blocks a "
                f"user = {0.99 * budget.num_bytes / one:.1f}; counted: "
                f"{_count(counted[WINDOWS][budget.name])}"
            )
    return tuple(lines)


def _count(users: float | None) -> str:
    return "a request does not fit" if users is None else f"{users:.1f}"
