"""Which shared blocks are read once, and how they are cut into parts."""

import dataclasses

import numpy as np
import pytest

from pagedattn.attention.cascade.costs import GPU, Layer
from pagedattn.attention.cascade.schedule import Lengths, Limits, make_schedule
from pagedattn.shared_prefix import find_shared_blocks

from .shared_tables import BLOCK, KINDS, one_prefix, tree_tables


def layer_of(costs, **changes):
    values = {"num_query_heads": 32, "num_kv_heads": 8, "head_size": 128, "kv_bytes": 2}
    return Layer(**(values | {"processors": 132} | changes), costs=costs)


def of_one_prefix(blocks, members, own=16):
    table = one_prefix(blocks, members, own)
    lengths = Lengths(table.num_tokens, np.ones(members, np.int64), BLOCK)
    return find_shared_blocks(table), lengths


@pytest.mark.parametrize(
    ("blocks", "members"), [(1024, 128), (128, 256), (1024, 32), (700, 64), (4096, 33)]
)
def test_parts_are_cut_so_that_tiles_fill_the_multiprocessors(blocks, members):
    made = make_schedule(*of_one_prefix(blocks, members), layer_of(GPU))
    items = made.lengths.size * layer_of(GPU).tiles(members) * 8
    rounds = -(-items // 132)
    assert items / (132 * rounds) > 0.9
    assert made.lengths.max() - made.lengths.min() <= 128
    assert made.seconds_saved > 0


@pytest.mark.parametrize(
    ("blocks", "members", "pays"),
    [
        *[(8, 2, False), (8, 128, False), (16, 256, False), (32, 8, False), (32, 64, False)],
        *[(64, 32, False), (128, 16, False), (256, 8, False), (256, 2, False), (1024, 4, False)],
        *[(64, 128, True), (128, 64, True), (256, 16, True), (256, 32, True), (1024, 8, True)],
    ],
)
def test_blocks_are_shared_where_an_h100_was_found_to_be_faster_for_it(blocks, members, pays):
    made = make_schedule(*of_one_prefix(blocks, members), layer_of(GPU))
    assert (made.seconds_saved > 0) == pays


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limits", [(3, 50, 2, 8), (1, 10, 1, 3), (9, 1000, 3, 1000), (0, 0, 0, 1)])
def test_a_schedule_keeps_to_its_limits_and_stays_complete(limits, seed):
    queries = np.array(KINDS["mixed"])
    table, _ = tree_tables(np.random.default_rng(seed), queries)
    lengths = Lengths(table.num_tokens, queries, BLOCK)
    limits = Limits(*limits)
    layer = layer_of(None, processors=7)
    made = make_schedule(find_shared_blocks(table, queries), lengths, layer, limits)
    assert made.lengths.size <= limits.parts
    assert made.rows.size <= limits.rows
    assert made.parts_of_token.shape[1] <= limits.parts_of_a_token
    assert made.most_queries <= limits.queries
    starts = lengths.query_starts
    for sequence in np.flatnonzero(queries):
        for token in range(starts[sequence], starts[sequence] + queries[sequence]):
            places = made.parts_of_token[token]
            places = places[places >= 0]
            assert (made.rows[places] == token).all()
            parts = np.searchsorted(made.starts, places, side="right") - 1
            blocks = [
                table.block_tables[made.sources[part], made.first_blocks[part] :][
                    : made.lengths[part] // BLOCK
                ]
                for part in parts
            ]
            seen = np.concatenate([np.empty(0, int), *blocks])
            assert (seen == table.block_tables[sequence, : made.skipped[sequence]]).all()
        own = made.own_lengths[sequence]
        assert own + made.skipped[sequence] * BLOCK == table.num_tokens[sequence]
        assert own >= queries[sequence]


def test_long_queries_take_no_part_where_costs_count():
    nodes, lengths = of_one_prefix(64, 12)
    queries = lengths.query_lengths.copy()
    queries[3] = 200
    made = make_schedule(nodes, dataclasses.replace(lengths, query_lengths=queries), layer_of(GPU))
    assert made.skipped.tolist() == [64, 64, 64, 0, *[64] * 8]
