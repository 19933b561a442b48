"""What a step of decode costs before its first launch: its batch, and a plan of what is shared."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.attention import AttentionBatch
from pagedattn.attention.cascade import plan_of
from pagedattn.block_manager import BlockManager
from pagedattn.page_table import PageTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagedattn.attention import AttentionCall
    from pagedattn.attention.registry import Implementation
    from pagedattn.workloads import AttentionShape

WARM_UP = 8
STEPS = 240


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of a step in which all sequences grow by a token, host and GPU.

    Of the faster half of the steps: a host that does other things too is slow for whole steps.

    Attributes:
        batch: from the page table on the host to tensors on the device, where nothing is shared.
        plan: what a step takes longer where shared blocks are read once; None where they are not.
            The median of the differences, step by step, which noise can bring below 0.

    """

    batch: float
    plan: float | None


def time_steps(
    shape: AttentionShape, call: AttentionCall, implementation: Implementation
) -> StepTimes:
    """Time `AttentionBatch.advance`, and wait for the GPU after each.

    With and without a plan it goes through the same page tables by turns, a block manager's. The
    two times of a step are taken one after the other, so that what slows the host for a while is in
    both, and not in their difference.

    Args:
        shape: of a decode step.
        call: over such a batch; tells the kind of layer, and whether the batch has a plan.
        implementation: which attends.

    """
    tables = list(growing_tables(shape, WARM_UP + STEPS))
    longest = int(tables[-1].num_tokens.max())
    device = call.batch.device
    batches = [AttentionBatch.of(tables[0], 1, device, longest, share=False)]
    if plan_of(implementation, call) is not None:
        batches.append(AttentionBatch.of(tables[0], 1, device, longest, share=True))
        kept = plan_of(implementation, replace(call, batch=batches[-1]))  # by the batch
        assert kept is not None
    seconds: list[list[float]] = [[] for _ in batches]
    for number, table in enumerate(tables):
        order = range(len(batches)) if number % 2 else reversed(range(len(batches)))
        for which in order:
            _wait(device)
            begin = time.perf_counter()
            batches[which].advance(table)
            _wait(device)
            seconds[which].append(time.perf_counter() - begin)
    steps = sorted(list(zip(*seconds, strict=True))[WARM_UP:], key=sum)[: STEPS // 2]
    plan = statistics.median(step[1] - step[0] for step in steps) if len(batches) > 1 else None
    return StepTimes(statistics.median(step[0] for step in steps), plan)


def growing_tables(shape: AttentionShape, count: int) -> Iterator[PageTable]:
    """Yield page tables of `count` steps of decode, a block manager's.

    The sequences share the shape's prefix and begin with its lengths, but for up to a block less,
    so that in each step as large a part of them needs a new block: one of `block_size`.
    """
    size = shape.block_size
    shorter = np.arange(shape.num_sequences) % size
    lengths = np.maximum(np.array(shape.kv_lengths) - shorter, shape.shared_prefix + 1)
    shared = shape.shared_prefix // size
    num_blocks = int((-(-(lengths + count) // size) - shared).sum()) + shared
    manager = BlockManager(num_blocks, size, prefix_caching=False)
    if shared:
        ids = manager.fork(manager.allocate([shape.shared_prefix]), shape.num_sequences)
        manager.append(ids, lengths - shape.shared_prefix)
    else:
        ids = manager.allocate(lengths)
    for _ in range(count):
        yield PageTable.of(manager, ids)
        manager.append(ids)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
