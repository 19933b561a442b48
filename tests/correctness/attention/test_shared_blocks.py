"""Blocks that sequences share are read once, and nobody sees a difference."""

import dataclasses
import gc
import weakref
from unittest import mock

import numpy as np
import pytest
import torch

from pagedattn import BlockManager, PageTable
from pagedattn.attention import (
    AttentionBatch,
    attention,
    get_implementation,
    register,
)
from pagedattn.attention import registry as registry_module
from pagedattn.attention.cascade import plan as plan_module
from pagedattn.attention.cascade import run, schedule
from pagedattn.attention.cascade import sharing as sharing_module
from pagedattn.attention.cascade.costs import GPU
from pagedattn.attention.cascade.schedule import make_schedule
from pagedattn.attention.torch_impl import TorchImplementation
from pagedattn.shared_prefix import find_shared_blocks
from pagedattn.testing import AttentionInputs, check_attention, page_table_of

from .conftest import HOPPER, require, skip_unsupported
from .shared_tables import BLOCK, KINDS, fill, make, one_prefix, poisoned_cache, tree_tables

OWN = ("torch", "triton", *(["cuda"] if HOPPER else []))
OPTIONS = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "all keys": {"causal": False},
}
INTERPRETED = {
    "test_sequences_that_branch_at_random_get_what_float64_gives": {
        "kind": "few",
        "seed": 0,
        "is_cut": True,
    },
    "test_options_and_fp8_caches_go_with_shared_blocks": {
        "kind": "few",
        "options": OPTIONS["sinks"],
        "fp8": True,
    },
    "test_other_heads_and_sizes_go_with_shared_blocks": {"heads": (9, 3), "head_size": 80},
    "test_an_update_follows_batches_that_share_less_or_otherwise_or_nothing": {
        "kind": "four",
        "is_cut": False,
    },
}
pytestmark = pytest.mark.implementations(*OWN)


@pytest.fixture(autouse=True)
def makes_parts(request):
    """Skip an implementation that reads blocks for each sequence: `attention` does not ask more."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    name = params.get("implementation")
    if name is not None and not hasattr(get_implementation(name), "merge_parts"):
        pytest.skip(f"{name}: it makes no parts of shared blocks")


@pytest.fixture(autouse=True)
def interpret_little(request, monkeypatch):
    """Leave most of the cases under Triton's interpreter, some 10 s each, to the night."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    is_interpreted = (params.get("implementation"), params.get("device")) == ("triton", "cpu")
    if not is_interpreted or request.config.getoption("--nightly"):
        return
    usual = INTERPRETED.get(request.node.originalname)
    if usual is None or any(params[name] != value for name, value in usual.items()):
        pytest.skip("slow under Triton's interpreter; runs with --nightly")
    monkeypatch.setattr(plan_module, "LEAST_PARTS", 2)


def attend(inputs, implementation):
    require(implementation, inputs.query.device.type)
    lse = torch.empty(inputs.query.shape[:2], device=inputs.query.device)
    skip_unsupported(implementation, inputs.call(lse=lse))
    out = torch.full_like(inputs.query, torch.nan)
    return attention(
        inputs.query, inputs.cache, inputs.batch, out=out, return_lse=True,
        implementation=implementation, **inputs.options,
    )  # fmt: skip


def the_plan(batch):
    """The one plan that a batch's calls have made."""
    (plan,) = batch.sharing._plans.values()
    return plan


@pytest.fixture(params=[False, True], ids=["whole", "cut"])
def is_cut(request, monkeypatch):
    """Whether nodes are cut into parts, as for the many processors of a GPU."""
    monkeypatch.setattr(run, "_processors", lambda _: 132 if request.param else 1)
    monkeypatch.setattr(schedule, "CUT_TOKENS", BLOCK)
    monkeypatch.setattr(schedule, "GPU", dataclasses.replace(GPU, item=0.0, merge=1e18))
    return request.param


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_that_branch_at_random_get_what_float64_gives(
    implementation, device, kind, seed, is_cut
):
    inputs = make(device, kind, seed)
    out, lse = attend(inputs, implementation)
    check_attention(out, inputs, lse, implementation)
    made = the_plan(inputs.batch).schedule
    assert made.rows.size > 0
    longest = max(node.end - node.begin for node in inputs.batch.sharing.nodes)
    if made.most_queries * 4 > 32 and longest > 1:
        assert (made.lengths.size > len(inputs.batch.sharing.nodes)) == is_cut


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("kind", ["few", pytest.param("many", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_fp8_caches_go_with_shared_blocks(implementation, device, options, kind, fp8):
    inputs = make(device, kind, 1, fp8=fp8, **options)
    out, lse = attend(inputs, implementation)
    check_attention(out, inputs, lse, implementation)
    assert the_plan(inputs.batch).schedule.rows.size > 0


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (16, 1)], ids=str)
@pytest.mark.parametrize("head_size", [80, 128])
def test_other_heads_and_sizes_go_with_shared_blocks(implementation, device, heads, head_size):
    kind = "four" if device == "cpu" else "many"
    inputs = make(device, kind, 2, heads=heads, head_size=head_size)
    out, lse = attend(inputs, implementation)
    check_attention(out, inputs, lse, implementation)


@pytest.mark.parametrize("kind", ["few", "decode", "many", "mixed"])
def test_a_second_call_gives_the_same_bits(implementation, device, kind):
    inputs = make(device, kind)
    (first, first_lse), (second, second_lse) = (attend(inputs, implementation) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first_lse, second_lse)


@pytest.mark.parametrize("kind", KINDS)
def test_each_shared_token_is_read_once_and_not_through_the_sequences_tables(
    implementation, device, kind
):
    inputs = make(device, kind, 4)
    out, lse = attend(inputs, implementation)
    made = the_plan(inputs.batch).schedule
    tables = inputs.batch.block_tables.cpu().numpy()
    lengths, queries = inputs.batch.sharing.now.lengths.num_tokens, np.array(KINDS[kind])
    takes_part = queries > 0
    blocks = -(-lengths // BLOCK)
    distinct = np.unique(
        np.concatenate([t[:b] for t, b in zip(tables[takes_part], blocks[takes_part], strict=True)])
    )
    read = (made.lengths // BLOCK).sum() + -(-made.own_lengths // BLOCK)[takes_part].sum()
    # ceil and sums agree as shared blocks are whole
    assert read == distinct.size
    # the sequences' tables are not needed where blocks are shared
    inputs.batch.block_tables.fill_(2**30)
    again, _ = attend(inputs, implementation)
    assert torch.equal(again, out)
    assert lse.isfinite().all()


@pytest.mark.usefixtures("is_cut")
@pytest.mark.parametrize("kind", ["four", pytest.param("many", marks=pytest.mark.nightly)])
def test_an_update_follows_batches_that_share_less_or_otherwise_or_nothing(
    implementation, device, kind
):
    inputs = make(device, kind, 0)
    batch, num_blocks = inputs.batch, inputs.cache.num_blocks
    attend(inputs, implementation)
    plan = the_plan(batch)
    places = [tensor.data_ptr() for tensor in vars(plan.tensors).values()]
    for seed in (1, "nothing", 2, "unknown", 0):
        rng = np.random.default_rng(7 if isinstance(seed, str) else seed)
        while True:
            levels = 0 if isinstance(seed, str) else 3
            table, needed = tree_tables(rng, KINDS[kind], levels=levels)
            longest = int(table.num_tokens.max())
            shares = isinstance(seed, str) or find_shared_blocks(table)
            if needed <= num_blocks and longest <= batch.max_kv_length and shares:
                break
        table = PageTable(BLOCK, table.block_tables[:, : -(-longest // BLOCK)], table.num_tokens)
        other = AttentionBatch.of(table, 1, device, share=False if seed == "unknown" else None)
        fill(inputs.cache, table)
        batch.update(other)
        out, lse = attend(inputs, implementation)
        check_attention(out, inputs, lse, implementation)
        assert the_plan(batch) is plan
        assert [tensor.data_ptr() for tensor in vars(plan.tensors).values()] == places
        assert (plan.schedule.rows.size > 0) == (not isinstance(seed, str))


@pytest.mark.implementations("torch", *(["cuda"] if HOPPER else []))
def test_a_step_in_which_all_grow_keeps_its_schedule(implementation, device, monkeypatch):
    made = []

    def counted(*args):
        made.append(args)
        return make_schedule(*args)

    for module in (plan_module, sharing_module):
        monkeypatch.setattr(module, "make_schedule", counted)
    torch.manual_seed(0)
    order = np.random.default_rng(0).permutation(20).astype(np.int32)
    tables = np.stack([np.r_[order[:3], order[3 + 4 * i : 7 + 4 * i]] for i in range(4)])
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    cache = poisoned_cache(20, device, dtype).layer(0)
    batch = None
    # in a block, filling it, with a whole own block, opening the next ones, and moved
    for own, num_made in ((5, 1), (16, 1), (20, 2), (40, 2), (41, 3)):
        lengths = 48 + own - np.arange(4)
        if own == 41:
            tables[:, :3] = tables[:, [2, 0, 1]]  # as much is shared, in other blocks
        width = -(-int(lengths.max()) // BLOCK)
        table = PageTable(BLOCK, np.ascontiguousarray(tables[:, :width]), lengths)
        fill(cache, table)
        now = AttentionBatch.of(
            table, 1, device, share=True, max_kv_length=100 if batch is None else None
        )
        if batch is None:
            batch = now
        else:
            batch.update(now)
        query = torch.randn((4, 8, 64), device=device).to(dtype)
        inputs = AttentionInputs(query, query[:, :2], query[:, :2], cache, batch)
        out, lse = attend(inputs, implementation)
        check_attention(out, inputs, lse, implementation)
        assert len(made) == num_made
    assert the_plan(batch).schedule.rows.size > 0
    other = make(device, "four", share=True).batch  # shares otherwise
    batch.sharing.follow(other.sharing.now, batch)
    assert len(made) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["decode", "many", "mixed"])
@pytest.mark.parametrize("first", ["tree", "nothing"])
def test_a_captured_graph_follows_what_later_batches_share(implementation, kind, first):
    rng = np.random.default_rng(3)
    queries = np.array(KINDS[kind])
    longest = 48 * BLOCK
    cache = poisoned_cache(2000, "cuda", torch.bfloat16).layer(0)
    cache_bits = cache.key, cache.value
    for part in cache_bits:
        part.normal_()
    table, _ = tree_tables(rng, queries, levels=3 if first == "tree" else 0)
    batch = AttentionBatch.of(table, queries, "cuda", max_kv_length=longest, share=True)
    query = torch.randn((queries.sum(), 8, 64), device="cuda").bfloat16()
    inputs = AttentionInputs(query, query[:, :2], query[:, :2], cache, batch)
    attend(inputs, implementation)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(inputs, implementation)
    for levels in (3, 1, 0, 2, 3):
        table, _ = tree_tables(rng, queries, levels=levels)
        batch.update(AttentionBatch.of(table, queries, "cuda"))
        query.normal_()
        graph.replay()
        torch.cuda.synchronize()
        check_attention(out, inputs, lse, implementation)
    if batch.arrivals is not None:
        assert not batch.arrivals.any()


def test_lengths_of_parts_are_bounded_for_the_steps_that_a_graph_is_for(monkeypatch):
    inputs = make("cpu", "decode")
    attend(inputs, "torch")
    plan = the_plan(inputs.batch)
    monkeypatch.setattr(run, "replace", lambda _, **changes: changes)
    on_gpu = mock.Mock(  # to which weak references are made
        device=torch.device("cuda"), slots=inputs.batch.slots, max_kv_length=10_000
    )
    for captured in (False, True, False):  # of one step, as one warms up before it captures
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=captured: now)
        of_parts, of_own = run._kept_batches(on_gpu, plan)
        for made, lengths in (
            (of_parts, plan.schedule.lengths),
            (of_own, plan.schedule.own_lengths),
        ):
            assert made["likely_kv_length"] == lengths.max() > 0
            assert made["max_kv_length"] == (10_000 if captured else lengths.max())


def test_all_layers_of_a_step_have_the_same_two_batches_and_the_next_step_others():
    inputs = make("cpu", "decode")
    batch, kept = inputs.batch, []
    for num_tokens in (0, 1):
        table = page_table_of(batch, BLOCK)
        table = PageTable(BLOCK, table.block_tables, table.num_tokens - num_tokens)
        batch.update(AttentionBatch.of(table, 1))
        for _ in range(2):
            attend(inputs, "torch")
            kept.append(the_plan(batch).kept.made[False])
    assert kept[0] is kept[1]
    assert kept[2] is kept[3]
    assert kept[1] is not kept[2]
    assert kept[2][1].max_kv_length == the_plan(batch).schedule.own_lengths.max()


def test_a_batch_of_which_nothing_is_left_gives_its_memory_back_at_once():
    inputs = make("cpu", "decode")
    attend(inputs, "torch")
    kept = [weakref.ref(tensor) for tensor in (inputs.batch.kv_lengths, inputs.batch.block_tables)]
    gc.disable()  # which finds what keeps itself, but does not look for a GPU's memory
    try:
        del inputs
        assert not any(tensor() is not None for tensor in kept)
    finally:
        gc.enable()


def test_forks_and_cached_prompts_of_a_block_manager_share(implementation, device):
    manager = BlockManager(num_blocks=200, block_size=BLOCK)
    prompt = list(range(70))
    batch = manager.admit([[*prompt, *range(900, 900 + n)] for n in (3, 1, 20)]).sequence_ids
    for _ in range(20):
        manager.append(batch)
    batch = np.concatenate([batch, manager.fork(batch[:2], 2)])
    for _ in range(20):
        manager.append(batch)
    table = PageTable.of(manager, batch)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    cache = poisoned_cache(200, device, dtype).layer(0)
    fill(cache, table)
    query = torch.randn((batch.size, 8, 64), device=device).to(dtype)
    made = AttentionBatch.of(table, 1, device, share=True)
    inputs = AttentionInputs(query, query[:, :2], query[:, :2], cache, made)
    assert len(made.sharing.nodes) > 1
    out, lse = attend(inputs, implementation)
    check_attention(out, inputs, lse, implementation)


@pytest.mark.parametrize("options", [{"window": 9}, {"alibi_slopes": torch.ones(8)}], ids=str)
def test_where_scores_depend_on_positions_blocks_are_read_for_each_sequence(options):
    inputs = make("cpu", "decode", **options)
    out, lse = attend(inputs, "torch")
    check_attention(out, inputs, lse)
    assert not inputs.batch.sharing._plans


def test_an_implementation_without_parts_gets_the_plain_call(monkeypatch):
    monkeypatch.setattr(registry_module, "_made", dict(registry_module._made))
    calls = []

    class Other:
        name = "other"

        def unsupported(self, call):
            return call.beyond({"lse"})

        def attention(self, call):
            calls.append(call)
            TorchImplementation().attention(call)

    register(Other())
    inputs = make("cpu", "decode")
    out, lse = attend(inputs, "other")
    check_attention(out, inputs, lse)
    (call,) = calls
    assert call.batch is inputs.batch
    assert call.out is out


def test_nothing_is_shared_where_it_is_not_wanted_or_does_not_pay():
    for share in (False, None):
        inputs = make("cpu", "decode", share=share)
        out, lse = attend(inputs, "torch")
        check_attention(out, inputs, lse)
        sharing = inputs.batch.sharing
        assert sharing is None or set(sharing._plans.values()) <= {None}
    shared = make("cpu", "decode", share=True)
    assert shared.batch.without_sharing().sharing is None
    assert shared.batch.without_sharing().block_tables is shared.batch.block_tables


def test_on_a_cpu_not_even_a_long_prefix_is_shared_unless_asked_for():
    table = one_prefix(blocks=1024, members=8, own=1)
    cache = poisoned_cache(1, "cpu", torch.float16).layer(0)
    query = torch.zeros(8, 8, 64, dtype=torch.float16)
    plans = []
    for share in (None, True):
        batch = AttentionBatch.of(table, share=share)
        assert batch.sharing.nodes
        inputs = AttentionInputs(query, query, query, cache, batch)
        plans.append(run.plan_of(TorchImplementation(), inputs.call()))
    assert plans[0] is None
    assert plans[1].schedule.rows.size == 8
