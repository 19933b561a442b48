"""Batches of which the host knows bounds alone, so that a kernel guesses, rightly or not."""

import dataclasses

import torch

WILD = (-1, -(2**31), 2**31 - 1, 1 << 20)
"""Blocks that do not exist."""


def with_bound(inputs, bound):
    """Say that all sequences have `bound` tokens, be it true or not; past their end is WILD."""
    batch = inputs.batch
    tables = torch.tensor(WILD, dtype=torch.int32, device=batch.device)
    tables = tables.repeat(batch.num_sequences, -(-bound // inputs.cache.block_size) // 4 + 1)
    for row, table, length in zip(tables, batch.block_tables, batch.kv_lengths, strict=True):
        used = -(-int(length) // inputs.cache.block_size)
        row[:used] = table[:used]
    batch = dataclasses.replace(batch, block_tables=tables, max_kv_length=bound, is_full=True)
    return dataclasses.replace(inputs, batch=batch)
