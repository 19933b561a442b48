"""What the host does between two steps: admit, append, export the page table, fork, swap, free."""

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


@pytest.mark.parametrize("length", [128, 4096, 131_072], ids=lambda n: f"len{n}")
@pytest.mark.parametrize("num_sequences", [64, 256, 1024, 4096], ids=lambda n: f"B{n}")
def bench_append_by_length(benchmark, num_sequences, length):
    """A step's bookkeeping is to cost the same at any length, and by the sequence."""
    manager = BlockManager(num_sequences * (length // BLOCK_SIZE + 10), BLOCK_SIZE)
    ids = manager.allocate(length + np.arange(num_sequences) % BLOCK_SIZE)
    benchmark.group = "append_by_length"
    benchmark.extra_info.update(
        area="block_manager",
        operation="append_by_length",
        implementation="pagedattn",
        workload=f"{length} tokens each",
        device="cpu",
        num_sequences=num_sequences,
        num_prompt_tokens=num_sequences * length,
        block_size=BLOCK_SIZE,
    )
    benchmark.pedantic(manager.append, args=(ids,), rounds=100, warmup_rounds=3)
    assert (manager.num_tokens(ids) > length).all()


def bench_fork(benchmark, record, manager, lengths):
    """Two forks of each sequence in one call, as a step of beam search asks."""
    record("block_manager", "fork")
    ids = manager.allocate(lengths)

    def drop_forks():
        manager.free(np.setdiff1d(manager.sequence_ids(), ids))
        return (ids, 2), {}

    benchmark.pedantic(manager.fork, setup=drop_forks, rounds=50, warmup_rounds=3)
    assert manager.num_sequences == 3 * lengths.size


def bench_swap(benchmark, record, lengths):
    """All sequences to the host's pool and back, without the copies themselves."""
    record("block_manager", "swap_out_and_in")
    blocks = int((-(-lengths // BLOCK_SIZE)).sum())
    manager = BlockManager(blocks, BLOCK_SIZE, num_host_blocks=blocks, prefix_caching=False)
    ids = manager.allocate(lengths)

    def there_and_back():
        return len(manager.swap_out(ids)), len(manager.swap_in(ids))

    assert benchmark.pedantic(there_and_back, rounds=50, warmup_rounds=3) == (blocks, blocks)


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
