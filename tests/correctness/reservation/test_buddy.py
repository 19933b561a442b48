"""The buddy allocator: chunks are aligned, apart from each other, and whole again when freed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn.reservation import BuddyAllocator
from pagedattn.reservation.buddy import power_of_two_from


@pytest.mark.parametrize(
    ("number", "power"), [(1, 1), (2, 2), (3, 4), (25, 32), (32, 32), (33, 64), (2**40 + 1, 2**41)]
)
def test_a_number_is_rounded_up_to_a_power_of_two(number, power):
    assert power_of_two_from(number) == power


def test_a_memory_that_is_no_power_of_two_is_used_to_its_last_slot():
    memory = BuddyAllocator(15_728)
    sizes = [8192, 4096, 2048, 1024, 256, 64, 32, 16]
    starts = [memory.allocate(size) for size in sizes]
    assert starts == [0, 8192, 12_288, 14_336, 15_360, 15_616, 15_680, 15_712]
    assert memory.num_free == 0
    assert memory.allocate(1) is None
    memory.check_integrity()


def test_a_request_is_rounded_up_and_a_larger_chunk_is_halved():
    memory = BuddyAllocator(64)
    start = memory.allocate(9)
    assert (start, memory.size_of(start), memory.num_free) == (0, 16, 48)
    assert memory.allocate(33) is None  # 48 slots are free, the largest chunk has 32
    assert memory.allocate(32) == 32
    memory.free(0)
    assert memory.allocate(17) == 0
    memory.check_integrity()


@given(st.integers(0, 300), st.data())
def test_any_order_of_taking_and_freeing_keeps_the_memory_whole(num_slots, data):
    memory = BuddyAllocator(num_slots)
    taken = {}
    for _ in range(data.draw(st.integers(0, 40))):
        if taken and data.draw(st.booleans()):
            start = data.draw(st.sampled_from(sorted(taken)))
            memory.free(start)
            del taken[start]
        else:
            wanted = data.draw(st.integers(1, 80))
            free = memory.num_free
            start = memory.allocate(wanted)
            if start is None:
                assert memory.num_free == free
            else:
                taken[start] = wanted
                assert wanted <= memory.size_of(start) < 2 * wanted
        memory.check_integrity()
    for start in taken:
        memory.free(start)
    memory.check_integrity()
    fresh = BuddyAllocator(num_slots)
    assert memory._free == fresh._free


def test_mistakes_are_refused_with_a_sentence():
    memory = BuddyAllocator(64)
    memory.allocate(8)
    with pytest.raises(ValueError, match="must be at least 1"):
        memory.allocate(0)
    for start in (8, 4, -1):
        with pytest.raises(ValueError, match="no chunk begins"):
            memory.free(start)
    with pytest.raises(ValueError, match="0 or more"):
        BuddyAllocator(-1)
    memory.check_integrity()
