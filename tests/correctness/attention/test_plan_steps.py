"""What a plan keeps of each sequence's own comes with a step's numbers, and is never of another."""

import dataclasses

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from pagedattn import BlockManager, PageTable
from pagedattn.attention import AttentionBatch, batch_memory
from pagedattn.attention.cascade.costs import Layer

from .shared_tables import BLOCK, check_plan

LAYER = Layer(8, 2, 64, 2, 132, None)
OWN = (20, 17, 18, 31)
SHARED = 3
LONGEST = 40 * BLOCK
QUERIES = [1] * len(OWN)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


class Forks:
    """Sequences that share three blocks, their batch, and its plan, which has followed a step.

    The last is the longest: with `longest` of 6 blocks or fewer its tables soon are full, and
    nothing can be written before the first own table but what it reads.
    """

    def __init__(self, device="cpu", longest=LONGEST):
        self.manager = BlockManager(300, BLOCK)
        self.ids = self.manager.fork(self.manager.allocate([SHARED * BLOCK]), len(OWN))
        self.manager.append(self.ids, OWN)
        self.batch = AttentionBatch.of(self.table(), 1, device, longest, share=True)
        self.plan = self.batch.sharing.plan(LAYER, self.batch)
        self.batch.advance(self.table())

    def table(self, grown=0):
        """The page table of now, or after each sequence has grown."""
        if grown:
            self.manager.append(self.ids, grown)
        return PageTable.of(self.manager, self.ids)

    def check(self, table):
        """Check the block tables, and that a plan has what is shared in parts, the rest as own."""
        is_read = np.arange(table.block_tables.shape[1]) < table.num_blocks()[:, None]
        held = self.batch.block_tables.cpu().numpy()[:, : is_read.shape[1]]
        assert (held == table.block_tables)[is_read].all()
        assert check_plan(self.plan, table, QUERIES) == SHARED * len(OWN)


class Names(TorchDispatchMode):
    """Names of PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_that_grows_has_no_operation_more_where_blocks_are_shared():
    forks = Forks()
    plain = AttentionBatch.of(forks.table(), 1, "cpu", LONGEST, share=False)
    for number, grown in enumerate((1, 16, 1, 1, 15, 40)):
        table = forks.table(grown)
        seen = []
        for batch in (plain, forks.batch):
            with Names() as names:
                batch.advance(table)
            seen.append(names.seen)
        assert number < 2 or seen[0] == seen[1]  # views are made by the first steps and kept
        forks.check(table)


@pytest.mark.parametrize("grown", [1, 16, 40])
def test_only_new_entries_of_own_tables_are_written(grown):
    forks = Forks()
    before = forks.table().num_blocks()
    sentinel = 2**30
    own = forks.plan.tensors.own_tables.fill_(sentinel)
    table = forks.table(grown)
    forks.batch.advance(table)
    columns = np.arange(own.shape[1]) + SHARED
    is_new = (columns >= before[:, None]) & (columns < table.num_blocks()[:, None])
    assert ((own.numpy() != sentinel) == is_new).all()
    rows, places = is_new.nonzero()
    assert (own.numpy()[is_new] == table.block_tables[rows, places + SHARED]).all()


def test_more_own_entries_than_there_is_room_for_come_all_the_same(device, monkeypatch):
    monkeypatch.setattr(batch_memory, "ROOM", 0)
    forks = Forks(device)
    # room for one of each table; a step of two has none
    for grown in (1, 16, 17, 32, 1, 60):
        table = forks.table(grown)
        forks.batch.advance(table)
        forks.check(table)


def test_own_tables_follow_sequences_whose_lineage_is_another(device):
    forks = Forks(device, longest=6 * BLOCK)
    forks.batch.advance(forks.table(2))  # the last has 6 blocks
    for place in range(len(OWN) - 1):
        one = forks.ids[place : place + 1]
        (fork,) = forks.manager.fork(one)
        forks.manager.append(fork)  # on a copy of the block that is not full
        forks.manager.free(one)
        forks.ids[place] = fork
        table = forks.table(1)
        forks.batch.advance(table)
        forks.check(table)


def test_a_step_back_and_on_again_leaves_own_tables_right(device):
    forks = Forks(device)
    tables = [forks.table(), *(forks.table(grown) for grown in (16, 1, 60))]
    for number in (3, 0, 2, 1, 3):
        forks.batch.advance(tables[number])
        forks.check(tables[number])


@pytest.mark.parametrize("way", ["without sharing", "replaced"])
@pytest.mark.parametrize("length", [1, 2 * BLOCK, 3 * BLOCK + 1])
def test_nothing_is_written_before_own_tables_when_sequences_were_shorter_meanwhile(
    device, way, length
):
    forks = Forks(device, longest=6 * BLOCK)
    table = forks.table()
    short = PageTable(BLOCK, table.block_tables, np.full(len(OWN), length))
    object.__setattr__(short, "lineage", table.lineage)
    for _ in range(2):
        if way == "without sharing":
            forks.batch.without_sharing().advance(short)
        else:
            dataclasses.replace(forks.batch, slots=forks.batch.slots.clone()).advance(short)
        table = forks.table(1)
        forks.batch.advance(table)
        forks.check(table)


def test_the_batch_of_an_update_may_hold_what_its_own_plans_were_not_told_of(device):
    forks = Forks(device)
    strangers = forks.manager.allocate([70] * len(OWN))  # share nothing
    other = AttentionBatch.of(forks.table(), 1, device)
    other.without_sharing().advance(PageTable.of(forks.manager, strangers))
    forks.batch.update(other)
    forks.manager.append(strangers)
    table = PageTable.of(forks.manager, strangers)
    forks.batch.advance(table)
    assert check_plan(forks.plan, table, QUERIES) == 0
