"""Page tables whose sequences share blocks, inputs over them, and what a plan makes of them."""

import numpy as np
import torch

from pagedattn import KVCache, PageTable
from pagedattn.attention import AttentionBatch, write_kv
from pagedattn.kv_cache import FP8
from pagedattn.testing import AttentionInputs

BLOCK = 16
# query tokens of each sequence; 0 is a sequence that only waits
KINDS = {
    "four": (1,) * 4,
    "few": (1, 3, 1, 0, 1, 6),
    "decode": (1,) * 9,
    "many": (1,) * 20,
    "verify": (4,) * 6,
    "mixed": (1, 5, 1, 40, 3, 0, 1, 17, 1),
}


def one_prefix(blocks, members, own):
    """A page table of `members` sequences with `blocks` blocks in common, and `own` each."""
    tables = np.arange(members * (blocks + own), dtype=np.int32).reshape(members, -1)
    tables[:, :blocks] = np.arange(blocks)
    return PageTable(BLOCK, tables, np.full(members, (blocks + own) * BLOCK))


def tree_tables(rng, queries, *, most_blocks=6, levels=3, own=40):
    """A page table of sequences that branch from each other at random, their order random too.

    Each goes down a tree for 0 to `levels` nodes of 1 to `most_blocks` blocks, then has 0 to `own`
    tokens and its query tokens for itself. Returns it and how many blocks the pool needs.
    """
    nodes, rows, lengths, used = {(): []}, [], [], 0
    for queries_of_one in queries:
        path = tuple(rng.integers(0, 2, rng.integers(0, levels + 1)).tolist())
        for depth in range(1, len(path) + 1):
            if path[:depth] not in nodes:
                size = int(rng.integers(1, most_blocks + 1))
                nodes[path[:depth]] = list(range(used, used + size))
                used += size
        row = [block for depth in range(len(path) + 1) for block in nodes[path[:depth]]]
        length = len(row) * BLOCK + int(rng.integers(0, own + 1)) + queries_of_one
        missing = -(-length // BLOCK) - len(row)
        rows.append(row + list(range(used, used + missing)))
        lengths.append(length)
        used += missing
    names = rng.permutation(used + 1)  # the last is nobody's
    tables = np.full((len(rows), max(map(len, rows)) + 2), names[used], np.int32)
    for row, table in zip(rows, tables, strict=True):
        table[: len(row)] = names[row]
    return PageTable(BLOCK, tables, np.array(lengths)), used + 1


def check_plan(plan, table, queries):
    """Check that each query token reads its sequence's blocks: those of its parts, then own ones.

    Returns how many are read in parts.
    """
    made = {name: tensor.cpu().numpy() for name, tensor in vars(plan.tensors).items()}
    starts = np.cumsum(queries) - queries
    shared = 0
    num_blocks = table.num_blocks()
    for i, own_length in enumerate(made["own_lengths"]):
        own = made["own_tables"][i, : -(-own_length // BLOCK)]
        assert (table.num_tokens[i] - own_length) % BLOCK == 0
        for token in range(starts[i], starts[i] + queries[i]):
            places = made["parts_of_token"][token]
            places = places[places >= 0]
            assert (made["rows"][places] == token).all()
            parts = np.searchsorted(made["starts"], places, side="right") - 1
            read = [made["tables"][p, : made["lengths"][p] // BLOCK] for p in parts]
            shared += sum(map(len, read))
            seen = np.concatenate([*read, own])
            assert seen.tolist() == table.block_tables[i, : num_blocks[i]].tolist()
    return shared


def fill(cache, table):
    """Random K and V in the slots of a batch's tokens; what is elsewhere stays."""
    slots = np.unique(table.slots(table.num_tokens))
    sizes = (slots.size, cache.num_kv_heads, cache.head_size)
    dtype = torch.float16 if cache.dtype == FP8 else cache.dtype
    key, value = (torch.randn(sizes, device=cache.key.device).to(dtype) for _ in range(2))
    write_kv(key, value, cache, torch.from_numpy(slots).to(cache.key.device))


def poisoned_cache(num_blocks, device, dtype, *, heads=(8, 2), head_size=64, fp8=False):
    """A cache of NaN everywhere."""
    cache = KVCache(
        num_layers=1, num_blocks=num_blocks, block_size=BLOCK, num_kv_heads=heads[1],
        head_size=head_size, dtype=FP8 if fp8 else dtype, device=device,
    )  # fmt: skip
    if fp8:
        cache.storage.view(torch.uint8).fill_(0x7F)
        cache.scales.uniform_(0.0125, 0.0375)
    else:
        cache.storage.fill_(torch.nan)
    return cache


def make(device, kind, seed=0, *, share=True, heads=(8, 2), head_size=64, fp8=False, **options):
    torch.manual_seed(seed)
    queries = np.array(KINDS[kind])
    most_blocks = 2 if kind in ("four", "few") else 6
    table, num_blocks = tree_tables(np.random.default_rng(seed), queries, most_blocks=most_blocks)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    cache = poisoned_cache(num_blocks, device, dtype, heads=heads, head_size=head_size, fp8=fp8)
    fill(cache.layer(0), table)
    if options.pop("sinks", False):
        options["sinks"] = 2 * torch.randn(heads[0], device=device)
    query = torch.randn((queries.sum(), heads[0], head_size), device=device).to(dtype)
    batch = AttentionBatch.of(table, queries, device, share=share)
    return AttentionInputs(
        query, query[:, : heads[1]], query[:, : heads[1]], cache.layer(0), batch, **options
    )
