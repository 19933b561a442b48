"""Decode by clusters: programs that add up a row in each other's shared memory."""

import dataclasses

import pytest
import torch

from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

pytest.importorskip("triton")

from pagedattn.attention.cuda import decode, decode_config, decode_division
from pagedattn.attention.cuda.decode_fits import H100
from pagedattn.testing.emulator import EmulatedKernel, emulation, unavailable

from .bounds import with_bound
from .emulated import ALL, check, clusters_of, inputs_of

emulated = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")

CLUSTERED = {
    "two of two": ((333,) * 2, (4, 2), 2, 8, {}),
    "three, one left": ((333,) * 2, (4, 2), 3, 14, {}),
    "four of one head": ((333,), (4, 1), 4, 4, {}),
    "a tile each": ((48,) * 2, (4, 2), 3, 14, {"seeds": 40}),
    "five": ((600,) * 2, (6, 2), 5, 20, {"head_size": 80}),
    "several of a row": ((2000,), (8, 2), 4, 40, {}),
    "many of a row": ((700,), (4, 1), 2, 40, {"lse": True}),
    "many columns": ((333,) * 2, (16, 2), 2, 8, {"queries": 2, "head_size": 128, "lse": True}),
    "several over many columns": (
        (333,),
        (16, 1),
        3,
        9,
        {"queries": 2, "head_size": 80, "lse": True},
    ),
    "as many as there can be": ((1500,) * 2, (8, 2), 2, 160, {"seeds": 2}),
    "blocks of one": ((333,) * 2, (4, 2), 2, 8, {"block_size": 1}),
    "fp8": ((600,) * 2, (4, 2), 2, 8, {"fp8": True, "head_size": 128}),
    "all options": ((333,) * 2, (4, 2), 4, 16, {**ALL, "lse": True}),
    "not of one length": ((333, 332, 300), (4, 2), 2, 12, {}),
    "fewer tiles than programs": ((20,) * 2, (4, 2), 2, 8, {}),
}
"""Lengths, heads, programs of a cluster, multiprocessors, and the rest."""


@emulated
@pytest.mark.parametrize("case", CLUSTERED)
def test_programs_of_a_cluster_add_up_a_row(case):
    kv_lengths, heads, cluster, multiprocessors, options = CLUSTERED[case]
    options = dict(options)
    lse, seeds = options.pop("lse", False), options.pop("seeds", 4)
    inputs = inputs_of(kv_lengths, heads=heads, **options)
    check(
        inputs, clusters_of(cluster), multiprocessors=multiprocessors, lse=lse, seeds=range(seeds)
    )


@emulated
def test_several_clusters_merge_parts_whose_scores_are_zero():
    inputs = inputs_of((500,), heads=(4, 1))
    inputs.query.zero_()
    check(inputs, clusters_of(2), multiprocessors=8)


@emulated
def test_clusters_follow_lengths_that_are_no_longer_the_same():
    inputs = inputs_of((500,) * 4, heads=(4, 2))
    out = torch.empty_like(inputs.query)
    with emulation(16):
        launch = clusters_of(2)(inputs.call(out))
        for lengths in ((500,) * 4, (500, 20, 0, 333), (7,) * 4, (129,) * 4, (0, 0, 0, 500)):
            inputs.batch.kv_lengths.copy_(torch.tensor(lengths))
            out.fill_(torch.nan)
            launch(inputs.call(out))
            check_attention(out, inputs)
            assert not inputs.batch.arrivals.any()


@emulated
def test_one_sequence_has_clusters_whatever_its_length_becomes():
    inputs = with_bound(inputs_of((500,), heads=(4, 1)), 700)
    batch = dataclasses.replace(inputs.batch, is_full=False)
    inputs = dataclasses.replace(inputs, batch=batch)
    out = torch.empty_like(inputs.query)
    with emulation(16):
        launch = decode.DecodeLaunch(inputs.call(out))
        assert launch.config.cluster > 1
        for length in (500, 1, 0, 17, 333):
            inputs.batch.kv_lengths.fill_(length)
            out.fill_(torch.nan)
            launch(inputs.call(out))
            check_attention(out, inputs)


@emulated
@pytest.mark.parametrize("launch_of", [decode.DecodeLaunch, clusters_of(4)], ids=["auto", "four"])
def test_where_not_all_clusters_run_at_once_there_are_none(launch_of, monkeypatch):
    """As 8 multiprocessors do that have room for one cluster of four."""
    inputs = inputs_of((500,) * 2, heads=(4, 1))
    inputs = dataclasses.replace(inputs, batch=dataclasses.replace(inputs.batch, is_full=True))
    for at_once, is_clustered in ((8, True), (1, False)):
        monkeypatch.setattr(EmulatedKernel, "most_clusters", lambda *_, n=at_once: n)
        launches = []

        def kept(call, launches=launches):
            launches.append(launch_of(call))
            return launches[-1]

        check(inputs, kept, multiprocessors=8)
        assert all((launch.config.cluster > 1) == is_clustered for launch in launches)


@emulated
def test_rows_among_longer_ones_have_no_clusters():
    inputs = inputs_of((500,) * 2, heads=(4, 1))
    inputs = dataclasses.replace(inputs, batch=dataclasses.replace(inputs.batch, is_full=True))
    with emulation(8):
        assert decode.DecodeLaunch(inputs.call()).config.cluster > 1
        assert decode.DecodeLaunch(inputs.call(), among_longer=True).config.cluster == 1


@emulated
def test_rows_that_leave_no_program_for_a_cluster_are_refused():
    with (
        emulation(8),
        pytest.raises(ValueError, match="8 rows leave no 2 of 8 ranges for each"),
    ):
        clusters_of(2)(inputs_of((500,) * 8, heads=(4, 1)).call())


def clusters_for(num_sequences, num_kv_heads, kv_length, num_programs=132):
    heads = decode_division.heads_in_parallel(num_kv_heads, num_programs)
    rows = num_sequences * num_kv_heads // heads
    row_bytes = 2 * kv_length * 128 * 2
    kind = decode_division.RowKind.of(128, 2, 4, 16, fit=H100)
    sizes = rows, heads, num_programs, kv_length, row_bytes
    cluster, parts = decode_division.clusters_of(*sizes, kind)
    return cluster, parts, rows, heads


@pytest.mark.parametrize(
    ("num_sequences", "num_kv_heads", "kv_length", "cluster", "parts"),
    [
        *((16, 1, 8192, 6, 6), (1, 1, 131_072, 8, 120), (1, 8, 1024, 6, 6), (4, 8, 2048, 2, 2)),
        *((8, 8, 8192, 2, 2), (1, 4, 4096, 8, 8), (20, 1, 4096, 5, 5), (3, 8, 1024, 2, 2)),
        (1, 8, 8192, 6, 6),
        # several, where one would read for too long
        *((1, 4, 8192, 8, 24), (3, 1, 8192, 8, 40), (2, 2, 8192, 8, 24), (4, 1, 16_384, 8, 24)),
        # rows stay whole; a third of the programs would have nothing; nothing to share out
        *((8, 8, 1024, 1, 0), (5, 8, 8192, 1, 0), (64, 8, 4096, 1, 0), (1, 8, 64, 1, 0)),
        # reading is what counts
        *((1, 8, 65_536, 1, 0), (8, 1, 16_384, 1, 0), (2, 8, 32_768, 1, 0)),
    ],
)
def test_clusters_of_rows(num_sequences, num_kv_heads, kv_length, cluster, parts):
    assert clusters_for(num_sequences, num_kv_heads, kv_length)[:2] == (cluster, parts)


@pytest.mark.parametrize("num_programs", [1, 7, 114, 132, 160])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 8, 40])
def test_clusters_are_of_one_row_and_have_work_for_each_program(num_kv_heads, num_programs):
    if num_kv_heads > num_programs:
        pytest.skip("heads for each program")
    seen = set()
    for num_sequences in (1, 2, 3, 7, 16, 30, 66, 200):
        for kv_length in (1, 15, 33, 100, 300, 1000, 5000, 40_000, 10**6):
            cluster, parts, rows, heads = clusters_for(
                num_sequences, num_kv_heads, kv_length, num_programs
            )
            seen.add(cluster)
            if cluster == 1:
                continue
            assert parts % cluster == 0
            assert parts * rows * heads <= num_programs
            assert parts * decode_config.MIN_TILE <= kv_length
            assert parts // cluster <= decode_division.MOST_PARTS
    assert 1 in seen
    # rows of 40 heads are whole, or cut for all programs
    assert len(seen) > 1 or num_programs < 8 or num_kv_heads == 40


@pytest.mark.gpu
def test_launches_that_share_the_gpu_do_not_wait_for_each_other():
    """The last cluster of a row waits for the others, which may not all run at once then."""
    shapes = [
        AttentionShape("one", (1,), (40_000,), 8, 1, 128, 16, "bfloat16"),
        AttentionShape("four heads", (1,), (9_000,), 32, 4, 128, 16, "bfloat16"),
    ]
    inputs = [make_inputs(shape, device="cuda") for shape in shapes]
    outs = [torch.empty_like(each.query) for each in inputs]
    calls = [each.call(out) for each, out in zip(inputs, outs, strict=True)]
    config = dataclasses.replace(decode_config.choose_config(128, 2, 8, fit=H100), cluster=2)
    launches = [decode.DecodeLaunch(calls[0]), decode.DecodeLaunch(calls[1], config)]
    assert [launch.config.cluster for launch in launches] == [8, 2]
    streams = [torch.cuda.Stream() for _ in launches]
    torch.cuda.synchronize()
    for _ in range(300):
        for launch, call, stream in zip(launches, calls, streams, strict=True):
            with torch.cuda.stream(stream):
                launch(call)
    torch.cuda.synchronize()
    for each, out in zip(inputs, outs, strict=True):
        check_attention(out, each)


@pytest.mark.gpu
@pytest.mark.pairs(
    case={
        "two": ((4000,) * 8, (32, 8), 2),
        "three": ((3001,) * 5, (32, 8), 3),
        "four": ((2048,) * 4, (32, 8), 4),
        "eight": ((5000,) * 16, (8, 1), 8),
        "several of a row": ((3000,), (32, 8), 8),
        "many of a row": ((70_000,), (8, 1), 8),
        "not of one length": ((3000, 10, 2999, 2), (32, 8), 4),
    },
    head_size=[64, 128, 256],
    block_size=[1, 16, 64],
    queries=[1, 2],
    kv_dtype={"16-bit": None, "fp8": "float8_e4m3"},
    options={"plain": {}, "all": {"window": 700, "soft_cap": 3.0, "alibi": True, "sinks": True}},
)
def test_clusters_agree_with_float64_on_the_gpu(
    case, head_size, block_size, queries, kv_dtype, options
):
    kv_lengths, heads, cluster = case
    shape = AttentionShape(
        "test", (queries,) * len(kv_lengths), kv_lengths, *heads, head_size, block_size,
        "bfloat16", kv_dtype,
    )  # fmt: skip
    inputs = make_inputs(shape, device="cuda", **options)
    columns = queries * heads[0] // heads[1]
    if columns * head_size > decode_config.MAX_ACCUMULATORS:
        pytest.skip("not taken")
    config = decode_config.choose_config(
        head_size, 1 if kv_dtype else 2, columns, block_size=block_size, fit=H100
    )
    config = dataclasses.replace(config, cluster=cluster)
    first, second = torch.full((2, *inputs.query.shape), torch.nan, device="cuda").bfloat16()
    lse = torch.full(inputs.query.shape[:2], torch.nan, device="cuda")
    for out in (first, second):
        call = inputs.call(out, lse)
        decode.DecodeLaunch(call, config)(call)
        check_attention(out, inputs, lse)
    assert torch.equal(first, second)
    assert not inputs.batch.arrivals.any()


@emulated
@pytest.mark.parametrize(
    ("num_sequences", "length", "cluster", "programs"),
    [(8, 768, 1, 1), (8, 2000, 2, 1), (8, 2304, 1, 2), (8, 4352, 1, 2), (17, 600, 1, 2)],
)
def test_rows_that_come_from_the_l2_are_added_up_by_clusters_or_read_by_two_programs(
    num_sequences, length, cluster, programs
):
    inputs = inputs_of((40,) * num_sequences, heads=(32, 8), head_size=128)

    def config_of(window=None, **hint):
        batch = dataclasses.replace(inputs.batch, max_kv_length=length, is_full=True, **hint)
        call = dataclasses.replace(inputs, batch=batch, window=window).call()
        with emulation(132):
            return decode.DecodeLaunch(call).config

    config = config_of(likely_shared=True)
    assert (config.cluster, config.programs) == (cluster, programs)
    assert (config_of().cluster, config_of().programs) == (1, 1)
    assert config_of(9000, likely_shared=True) == config_of()
