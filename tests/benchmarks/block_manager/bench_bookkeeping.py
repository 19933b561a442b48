"""What the host does between two steps: admit, append, export the page table, fork, free."""

import numpy as np
import pytest

from pagedattn import BlockManager, PageTable
from pagedattn.workloads import AZURE_CONVERSATION, load_trace

BLOCK_SIZE = 16
ROUNDS = 300
DISTRIBUTIONS = ["uniform-100-1024", "azure-conversation", "trace"]


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request):
    return request.param


@pytest.fixture(params=[64, 256, 1024], ids=lambda n: f"B{n}")
def lengths(request, distribution, trace_path):
    """Prompt lengths of a batch, int64."""
    count = request.param
    rng = np.random.default_rng(0)
    if distribution == "uniform-100-1024":
        return rng.integers(100, 1025, count)
    if distribution == "azure-conversation":
        return AZURE_CONVERSATION.sample(rng, count)[0]
    if trace_path is None:
        pytest.skip("needs --trace-file PATH")
    prompts = np.array([request.prompt_tokens for request in load_trace(trace_path)])
    return rng.choice(prompts[prompts > 0], count)


@pytest.fixture
def manager(lengths):
    """Room for the batch, its growth over all rounds, and forks."""
    blocks = int((-(-lengths // BLOCK_SIZE)).sum())
    return BlockManager(blocks + lengths.size * (ROUNDS // BLOCK_SIZE + 3), BLOCK_SIZE)


@pytest.fixture
def record(benchmark, distribution, lengths):
    """Group a row and fill its columns."""

    def fill(area, operation):
        benchmark.group = operation
        benchmark.extra_info.update(
            area=area,
            operation=operation,
            implementation="pagedattn",
            workload=distribution,
            device="cpu",
            num_sequences=int(lengths.size),
            num_prompt_tokens=int(lengths.sum()),
            block_size=BLOCK_SIZE,
        )

    return fill


def bench_admit(benchmark, record, manager, lengths):
    record("block_manager", "admit")

    def free_all():
        manager.free(manager.sequence_ids())

    benchmark.pedantic(
        manager.allocate, args=(lengths,), setup=free_all, rounds=50, warmup_rounds=3
    )
    assert manager.num_sequences == lengths.size
    assert (manager.num_tokens(manager.sequence_ids()) == lengths).all()


def bench_append(benchmark, record, manager, lengths):
    record("block_manager", "append")
    ids = manager.allocate(lengths)
    benchmark.pedantic(manager.append, args=(ids,), rounds=ROUNDS - 5, warmup_rounds=3)
    assert (manager.num_tokens(ids) > lengths).all()
    manager.check_integrity()


def bench_decode_step(benchmark, record, manager, lengths):
    """All that a decode step asks of the host: append, page table, slots."""
    record("block_manager", "decode_step")
    ids = manager.allocate(lengths)

    def step():
        manager.append(ids)
        table = PageTable.of(manager, ids)
        return table, table.slots()

    table, slots = benchmark.pedantic(step, rounds=ROUNDS - 5, warmup_rounds=3)
    assert (slots == table.slots(1)).all()
    assert np.unique(slots).size == lengths.size


def bench_fork(benchmark, record, manager, lengths):
    """Two forks of each sequence, one call a sequence, as beam search asks."""
    record("block_manager", "fork")
    ids = manager.allocate(lengths)
    forks = []

    def drop_forks():
        if forks:
            manager.free(np.concatenate(forks))
            forks.clear()

    def fork_all():
        forks.extend(manager.fork(sequence, 2) for sequence in ids.tolist())

    benchmark.pedantic(fork_all, setup=drop_forks, rounds=10, warmup_rounds=1)
    assert manager.num_sequences == 3 * lengths.size


def bench_free(benchmark, record, manager, lengths):
    record("block_manager", "free")

    def admit():
        manager.free(manager.sequence_ids())
        return (manager.allocate(lengths),), {}

    benchmark.pedantic(manager.free, setup=admit, rounds=50, warmup_rounds=3)
    assert manager.num_free_blocks == manager.num_blocks


@pytest.mark.parametrize("form", ["padded", "csr", "slots"])
def bench_page_table(benchmark, record, manager, lengths, form):
    record("page_table", form)
    ids = manager.allocate(lengths)
    table = PageTable.of(manager, ids)
    calls = {
        "padded": lambda: PageTable.of(manager, ids),
        "csr": table.csr,
        "slots": table.slots,
    }
    benchmark.pedantic(calls[form], rounds=ROUNDS, warmup_rounds=3)
