"""Mixed batches by two launches: which batches, and that together they do what one does."""

import dataclasses

import pytest
import torch

from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

pytest.importorskip("triton")

from pagedattn.attention.cuda import (
    decode,
    decode_calls,
    launcher_of,
    mixed,
    prefill,
    prefill_estimate,
)
from pagedattn.attention.cuda.decode_fits import H100, H200
from pagedattn.attention.cuda.prefill_choice import Way
from pagedattn.testing.emulator import emulation, unavailable

from .emulated import ALL, check, inputs_of, nightly

emulated = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)

K = 1024


def call_of(queries, kv_lengths, heads=(32, 8), **changes):
    """A call whose tensors have no memory, of what the host knows."""
    options = {name: changes.pop(name) for name in ("window",) if name in changes}
    values = {"head_size": 128, "block_size": 16, "dtype": "bfloat16"} | changes
    shape = AttentionShape("test", queries, kv_lengths, *heads, **values)
    return make_inputs(shape, device="cpu", **options).call()


ALIKE = ((2 * K, *(1,) * 63), (8 * K, *(4 * K,) * 63))
LONG_DECODE = ((512, *(1,) * 4), (K, 2 * K, 2 * K, 2 * K, 16 * K))


FP8 = {"kv_dtype": "float8_e4m3"}
MANY_DECODES = ((2 * K, *(1,) * 62), (2 * K, *range(K, 7 * K, 100)))


@pytest.mark.parametrize(
    ("lengths", "changes", "launcher"),
    [
        (LONG_DECODE, FP8, mixed.MixedLaunch),
        (((512, *(4,) * 4), LONG_DECODE[1]), FP8, mixed.MixedLaunch),  # of drafts
        (LONG_DECODE, {}, prefill.PrefillLaunch),  # the long one's keys are shared out
        (LONG_DECODE, FP8 | {"window": 100}, prefill.PrefillLaunch),  # then none is long
        (((2 * K, 1), (2 * K, 4 * K)), FP8, prefill.PrefillLaunch),  # the prompt takes longer
        (((512, *(8,) * 4), LONG_DECODE[1]), FP8, prefill.PrefillLaunch),  # which crowd decode
        (((512, *(8,) * 4), LONG_DECODE[1]), FP8 | {"heads": (64, 8)}, prefill.PrefillLaunch),
        (MANY_DECODES, {}, prefill.PrefillLaunch),
        (MANY_DECODES, FP8, mixed.MixedLaunch),  # whose elements prefill widens
        (LONG_DECODE, FP8 | {"block_size": 4}, None),  # which the prefill kernel does not take
    ],
    ids=str,
)
def test_a_batch_goes_to_two_kernels_where_one_takes_longer(lengths, changes, launcher):
    assert launcher_of(call_of(*lengths, **changes)) is launcher


def test_decodes_that_a_memory_brings_sooner_go_to_two_kernels_sooner(monkeypatch):
    call = call_of(*ALIKE, **FP8)
    for fit, launcher in ((H100, prefill.PrefillLaunch), (H200, mixed.MixedLaunch)):
        monkeypatch.setattr(prefill_estimate, "fit_for", {call.query.device: fit}.get)
        assert launcher_of(call) is launcher


def test_a_batch_whose_lengths_nobody_knows_goes_to_one_kernel():
    call = call_of(*LONG_DECODE, **FP8)
    unknown = dataclasses.replace(call, batch=dataclasses.replace(call.batch, known_lengths=None))
    assert launcher_of(unknown) is prefill.PrefillLaunch
    with pytest.raises(ValueError, match="short queries alone, or long ones alone"):
        mixed.MixedLaunch(unknown)


FIRST = ((130, 1, 1, 2, 9), (450, 333, 20, 90, 700))
BETWEEN = ((1, 130, 3, 40, 1), (33, 450, 333, 70, 90))
LAST = ((1, 4, 40), (9, 700, 1500))
FEW = ((1, 30, 3), (333, 600, 333))
BATCHES = {
    "long first": (FIRST, 1, {"dtype": "bfloat16"}),
    "long between": (BETWEEN, 1, {"head_size": 128}),
    "long last": (LAST, 1, {"head_size": 80, "block_size": 8}),
    "all options": (FIRST, 1, ALL),
    "fp8": (BETWEEN, 1, {"fp8": True, "head_size": 128}),
    "keys shared out": (LAST, 4, {"dtype": "bfloat16", "heads": (4, 2)}),
    "keys shared out between": (FEW, 3, {"sinks": True, "head_size": 128, "heads": (4, 2)}),
    "keys of fp8 shared out": (FEW, 2, {"fp8": True, "window": 300, "heads": (2, 1)}),
}


@pytest.fixture
def shared_out(monkeypatch):
    """Function that has the long queries' keys shared out among so many."""
    return lambda splits: monkeypatch.setattr(
        prefill, "way_of", lambda work, **_: Way(work.usual, splits, 1.0)
    )


@emulated
@pytest.mark.parametrize("case", BATCHES)
def test_each_kernel_takes_its_own(case, shared_out):
    (queries, kv_lengths), splits, options = BATCHES[case]
    shared_out(splits)
    inputs = inputs_of(kv_lengths, queries, **options)
    check(inputs, mixed.MixedLaunch, multiprocessors=3, lse=True)


@emulated
@pytest.mark.parametrize("splits", [1, 3])
def test_each_kernel_leaves_alone_what_is_the_other_s(splits, shared_out):
    queries, kv_lengths = (2, 12, 3, 30, 9), (20, 333, 333, 600, 20)
    shared_out(splits)
    inputs = inputs_of(kv_lengths, queries, heads=(4, 2))
    inputs.batch.kv_lengths[-1] = 0  # whose log-sum-exp is -inf
    short = torch.tensor(queries).repeat_interleave(torch.tensor(queries)) <= 3
    for launch_of, is_own in (
        (lambda call: prefill.PrefillLaunch(call, long_only=True), ~short),
        (lambda call: decode.DecodeLaunch(mixed.short_of(call), among_longer=True), short),
    ):
        before = 1000.0
        out = torch.full_like(inputs.query, before)
        lse = torch.full(out.shape[:2], before)
        with emulation(3):
            call = inputs.call(out, lse)
            launch_of(call)(call)
        for written in (out, lse[..., None]):
            assert torch.equal((written < 100).all((1, 2)), is_own)
            assert torch.equal((written == before).all((1, 2)), ~is_own)


@emulated
@pytest.mark.parametrize("splits", [1, 3])
def test_sequences_without_tokens_get_zeros_from_either(splits, shared_out):
    queries, kv_lengths = FEW
    shared_out(splits)
    inputs = inputs_of(kv_lengths, queries, heads=(4, 2))
    inputs.batch.kv_lengths[:2] = 0  # a short one and a long one
    check(inputs, mixed.MixedLaunch, multiprocessors=3, lse=True)


@emulated
@pytest.mark.parametrize(
    "later",
    [
        ((1, 9, 1, 130, 2), (450, 333, 20, 190, 700)),  # others are long
        ((6, 8, 129, 0, 0), (450, 333, 200, 90, 10)),  # short ones of more queries, and none
        ((29, 28, 29, 28, 29), (450, 333, 200, 90, 700)),  # all are long
    ],
    ids=str,
)
def test_a_launch_follows_which_sequences_are_long(later):
    queries, kv_lengths = FIRST
    inputs = inputs_of(kv_lengths, queries)
    batch, out = inputs.batch, torch.empty_like(inputs.query)
    with emulation(3):
        launch = mixed.MixedLaunch(inputs.call(out))
    queries, kv_lengths = (torch.tensor(lengths, dtype=torch.int32) for lengths in later)
    assert queries.sum() == batch.num_query_tokens
    batch.query_starts[1:] = queries.cumsum(0)
    batch.kv_lengths.copy_(kv_lengths.minimum(batch.kv_lengths))
    for seed in range(2):
        out.fill_(torch.nan)
        with emulation(3, seed):
            launch(inputs.call(out))
        check_attention(out, inputs)


@emulated
@nightly
@pytest.mark.pairs(
    lengths={"first": FIRST, "between": BETWEEN, "last": LAST},
    heads=[(4, 4), (8, 2), (9, 3)],
    head_size=prefill.HEAD_SIZES,
    block_size=[8, 64, 256],
    options={"plain": {}, "all": ALL, "fp8": {"fp8": True, "dtype": "bfloat16"}},
    splits=[1, 2, 5],
    nightly=False,
)
def test_two_launches_agree_with_float64_in_many_orders(
    lengths, heads, head_size, block_size, options, splits, shared_out
):
    queries, kv_lengths = lengths
    shared_out(splits)
    inputs = inputs_of(
        kv_lengths, queries, heads=heads, head_size=head_size, block_size=block_size, **options
    )
    short = dataclasses.replace(
        inputs.batch,
        max_query_length=inputs.batch.known_lengths.short.most_queries,
        known_lengths=None,
    )
    refused = decode_calls.not_taken(dataclasses.replace(inputs.call(), batch=short))
    if refused is not None:
        pytest.skip(refused)
    check(inputs, mixed.MixedLaunch, multiprocessors=3, lse=True)


def on_gpu(lengths, heads, head_size, block_size, kv_dtype, **options):
    shape = AttentionShape("test", *lengths, *heads, head_size, block_size, "bfloat16", kv_dtype)
    return make_inputs(shape, device="cuda", **options)


LONGER = ((700, 1, 1, 64, 3, 130), (700, 9000, 33, 640, 90, 2000))


@pytest.mark.gpu
@on_hopper
@pytest.mark.pairs(
    heads=[(4, 4), (8, 2), (9, 3)],
    head_size=[64, 96, 128, 192, 256],
    block_size=[8, 64, 256],
    kv_dtype={"16-bit": None, "fp8": "float8_e4m3"},
    options={"plain": {}, "all": ALL, "sinks": {"sinks": True}},
    splits=[1, 2, 5],
)
def test_two_launches_agree_with_float64(
    heads, head_size, block_size, kv_dtype, options, splits, shared_out
):
    shared_out(splits)
    inputs = on_gpu(LONGER, heads, head_size, block_size, kv_dtype, **options)
    first, second = torch.full((2, *inputs.query.shape), torch.nan, device="cuda").bfloat16()
    lse = torch.full(inputs.query.shape[:2], torch.nan, device="cuda")
    launch = mixed.MixedLaunch(inputs.call(first, lse))
    launch(inputs.call(first, lse))
    check_attention(first, inputs, lse)
    launch(inputs.call(second, lse))
    assert torch.equal(first, second)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("splits", [1, 3])
def test_a_captured_graph_follows_which_sequences_are_long(splits, shared_out):
    shared_out(splits)
    inputs = on_gpu(LONGER, (8, 2), 128, 16, None)
    out = torch.full_like(inputs.query, torch.nan)
    call = inputs.call(out)
    launch = mixed.MixedLaunch(call)
    launch(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(call)
    for queries in (LONGER[0], (1, 700, 1, 64, 3, 130), (149, 150, 150, 150, 150, 150)):
        starts = torch.tensor((0, *queries)).cumsum(0)
        inputs.batch.query_starts.copy_(starts)
        lengths = torch.tensor(LONGER[1]).minimum(torch.tensor(queries) + 500)
        inputs.batch.kv_lengths.copy_(lengths.minimum(torch.tensor(LONGER[1])))
        out.fill_(torch.nan)
        graph.replay()
        check_attention(out, inputs)


@pytest.mark.gpu
@on_hopper
def test_launches_that_begin_beside_each_other_disturb_nobody(shared_out):
    shared_out(1)
    lengths = ((300, 1, 1, 2), (700, 20_000, 33, 4000)), LONGER
    rows = []
    for each, head_size in zip(lengths, (128, 64), strict=True):
        inputs = on_gpu(each, (8, 2), head_size, 16, None)
        outs = [torch.full_like(inputs.query, torch.nan) for _ in range(8)]
        calls = [inputs.call(out) for out in outs]
        rows.append((inputs, outs, calls, mixed.MixedLaunch(calls[0])))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # each batch's follow each other, as a step's layers do, then both batches' by turns
        for begin, end in ((0, 4), *((i, i + 1) for i in range(4, 8))):
            for _, _, calls, launch in rows:
                for call in calls[begin:end]:
                    launch(call)
    for _ in range(20):
        for _, outs, _, _ in rows:
            for out in outs:
                out.fill_(torch.nan)
        graph.replay()
        for inputs, outs, _, _ in rows:
            check_attention(outs[0], inputs)
            assert all(torch.equal(out, outs[0]) for out in outs)
