"""What the host does between two steps: admit, append, export the page table, fork, swap, free.

All rows are timed by turns: a machine that others use too is slow for a second here and there, and
a row that was timed within that second alone would be slow in one run and not in the next.
"""

import numpy as np
import pytest

from pagedattn import BlockManager, PageTable
from pagedattn.benchmarking import CaseTiming, HostWork, StopRule
from pagedattn.workloads import AZURE_CONVERSATION, load_trace

BLOCK_SIZE = 16
MOST = 300
TURN, SETTLE = 25, 2
GROWTH = (MOST // TURN + 2) * (TURN + SETTLE)  # tokens that a sequence may get at most
RULE = StopRule(least=50, most=MOST, seconds=0.5)
DISTRIBUTIONS = ["uniform-100-1024", "azure-conversation", "trace"]

batches = pytest.mark.parametrize("num_sequences", [64, 256, 1024], ids=lambda n: f"B{n}")
workloads = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


class Operation:
    """One call on a manager with room for the batch, its growth over all rounds, and forks.

    Attributes:
        lengths: prompt lengths of the batch, int64.

    """

    area = "block_manager"

    def __init__(self, lengths):
        self.lengths = lengths
        blocks = int((-(-lengths // BLOCK_SIZE)).sum())
        growth = lengths.size * (-(-GROWTH // BLOCK_SIZE) + 3)
        self.manager = BlockManager(blocks + growth, BLOCK_SIZE)

    def prepare(self):
        """Get ready for a round; not timed."""

    def check(self):
        """What holds after a round."""


class Admit(Operation):
    def prepare(self):
        self.manager.free(self.manager.sequence_ids())

    def run(self):
        self.manager.allocate(self.lengths)

    def check(self):
        assert self.manager.num_sequences == self.lengths.size
        assert (self.manager.num_tokens(self.manager.sequence_ids()) == self.lengths).all()


class Append(Operation):
    def __init__(self, lengths):
        super().__init__(lengths)
        self.ids = self.manager.allocate(lengths)

    def run(self):
        self.manager.append(self.ids)

    def check(self):
        assert (self.manager.num_tokens(self.ids) > self.lengths).all()
        self.manager.check_integrity()


class DecodeStep(Append):
    """All that a decode step asks of the host: append, page table, slots."""

    def run(self):
        self.manager.append(self.ids)
        self.table = PageTable.of(self.manager, self.ids)
        self.slots = self.table.slots()

    def check(self):
        super().check()
        assert (self.slots == self.table.slots(1)).all()
        assert np.unique(self.slots).size == self.lengths.size


class AppendByLength(Append):
    """A step's bookkeeping is to cost the same at any length, and by the sequence."""

    def __init__(self, length, num_sequences):
        self.lengths = length + np.arange(num_sequences) % BLOCK_SIZE
        room = length // BLOCK_SIZE + -(-GROWTH // BLOCK_SIZE) + 3
        self.manager = BlockManager(num_sequences * room, BLOCK_SIZE)
        self.ids = self.manager.allocate(self.lengths)

    def check(self):
        assert (self.manager.num_tokens(self.ids) > self.lengths).all()


class Fork(Append):
    """Two forks of each sequence in one call, as a step of beam search asks."""

    def prepare(self):
        self.manager.free(np.setdiff1d(self.manager.sequence_ids(), self.ids))

    def run(self):
        self.manager.fork(self.ids, 2)

    def check(self):
        assert self.manager.num_sequences == 3 * self.lengths.size


class Swap(Operation):
    """All sequences to the host's pool and back, without the copies themselves."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.blocks = int((-(-lengths // BLOCK_SIZE)).sum())
        self.manager = BlockManager(
            self.blocks, BLOCK_SIZE, num_host_blocks=self.blocks, prefix_caching=False
        )
        self.ids = self.manager.allocate(lengths)

    def run(self):
        self.moved = len(self.manager.swap_out(self.ids)), len(self.manager.swap_in(self.ids))

    def check(self):
        assert self.moved == (self.blocks, self.blocks)


class Free(Operation):
    def prepare(self):
        self.manager.free(self.manager.sequence_ids())
        self.ids = self.manager.allocate(self.lengths)

    def run(self):
        self.manager.free(self.ids)

    def check(self):
        assert self.manager.num_free_blocks == self.manager.num_blocks


class Export(Operation):
    """A page table, or what a kernel takes of it."""

    area = "page_table"

    def __init__(self, lengths, form):
        super().__init__(lengths)
        ids = self.manager.allocate(lengths)
        table = PageTable.of(self.manager, ids)
        calls = {
            "padded": lambda: PageTable.of(self.manager, ids),
            "csr": table.csr,
            "slots": table.slots,
        }
        self.run = calls[form]


OPERATIONS = {
    "bench_admit": Admit,
    "bench_append": Append,
    "bench_append_by_length": AppendByLength,
    "bench_decode_step": DecodeStep,
    "bench_fork": Fork,
    "bench_swap": Swap,
    "bench_free": Free,
    "bench_page_table": Export,
}


@pytest.fixture(scope="module")
def lengths_of(trace_path):
    """Function of a distribution and a number: prompt lengths, int64."""

    def draw(distribution, count):
        rng = np.random.default_rng(0)
        if distribution == "uniform-100-1024":
            return rng.integers(100, 1025, count)
        if distribution == "azure-conversation":
            return AZURE_CONVERSATION.sample(rng, count)[0]
        if trace_path is None:
            pytest.skip("needs --trace-file PATH")
        prompts = np.array([request.prompt_tokens for request in load_trace(trace_path)])
        return rng.choice(prompts[prompts > 0], count)

    return draw


@pytest.fixture(scope="module")
def make(request, lengths_of):
    """Function of a row's name: its operation, which is kept in `operations` from then on."""
    rows = {item.name: item for item in request.session.items if item.path == request.path}

    def ready(name):
        item = rows[name]
        params = dict(item.callspec.params)
        if "distribution" in params:
            count = params.pop("num_sequences")
            params["lengths"] = lengths_of(params.pop("distribution"), count)
        made = OPERATIONS[item.originalname](**params)
        ready.operations[name] = made
        return HostWork(made.run, made.prepare)

    ready.operations = {}
    return ready


@pytest.fixture(scope="module")
def timing(request, make):
    names = [item.name for item in request.session.items if item.path == request.path]
    return CaseTiming(names, make, RULE, turn=TURN, settle=SETTLE)


@pytest.fixture
def report(request, benchmark, report_rounds, make, timing):
    """Function that times the row, among all of them, and fills its columns."""

    def fill(operation, workload, num_sequences):
        name = request.node.name
        if benchmark.disabled:
            benchmark(make(name).replay)
            made = make.operations[name]
        else:
            rounds = timing.of(name)
            made = make.operations[name]
            report_rounds(rounds)
        made.check()
        benchmark.group = operation
        benchmark.extra_info.update(
            area=made.area,
            operation=operation,
            implementation="pagedattn",
            workload=workload,
            device="cpu",
            num_sequences=num_sequences,
            num_prompt_tokens=int(made.lengths.sum()),
            block_size=BLOCK_SIZE,
        )

    return fill


@batches
@workloads
def bench_admit(report, distribution, num_sequences):
    report("admit", distribution, num_sequences)


@batches
@workloads
def bench_append(report, distribution, num_sequences):
    report("append", distribution, num_sequences)


@batches
@workloads
def bench_decode_step(report, distribution, num_sequences):
    report("decode_step", distribution, num_sequences)


@pytest.mark.parametrize("length", [128, 4096, 131_072], ids=lambda n: f"len{n}")
@pytest.mark.parametrize("num_sequences", [64, 256, 1024, 4096], ids=lambda n: f"B{n}")
def bench_append_by_length(report, num_sequences, length):
    report("append_by_length", f"{length} tokens each", num_sequences)


@batches
@workloads
def bench_fork(report, distribution, num_sequences):
    report("fork", distribution, num_sequences)


@batches
@workloads
def bench_swap(report, distribution, num_sequences):
    report("swap_out_and_in", distribution, num_sequences)


@batches
@workloads
def bench_free(report, distribution, num_sequences):
    report("free", distribution, num_sequences)


@pytest.mark.parametrize("form", ["padded", "csr", "slots"])
@batches
@workloads
def bench_page_table(report, distribution, num_sequences, form):
    report(form, distribution, num_sequences)
