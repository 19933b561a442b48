"""A buddy allocator: contiguous chunks whose sizes are powers of two (Knuth, TAOCP 1, 2.5)."""

from __future__ import annotations


def power_of_two_from(number: int) -> int:
    """Return the least power of two that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


class BuddyAllocator:
    """Hands out chunks of 2**n slots; a freed chunk joins its buddy if that is free too.

    A memory that is no power of two is cut into descending powers of two to begin with: 15,728
    slots are chunks of 8192, 4096, 2048, 1024, 256, 64, 32 and 16.

    Args:
        num_slots: size of the memory.

    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 0:
            raise ValueError(f"num_slots is {num_slots}; it must be 0 or more")
        self.num_slots = num_slots
        self.num_free = num_slots
        self._free: list[set[int]] = [set() for _ in range(num_slots.bit_length())]
        self._taken: dict[int, int] = {}  # start: order
        start = 0
        for order in reversed(range(num_slots.bit_length())):
            if num_slots >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    def allocate(self, num_slots: int) -> int | None:
        """Take a chunk of at least `num_slots` slots; returns its start, or None without room.

        The smallest free chunk that is large enough is halved until it fits, the lowest address
        first.

        Raises:
            ValueError: `num_slots` is less than 1.

        """
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; it must be at least 1")
        wanted = power_of_two_from(num_slots).bit_length() - 1
        order = next((o for o in range(wanted, len(self._free)) if self._free[o]), None)
        if order is None:
            return None
        start = min(self._free[order])
        self._free[order].remove(start)
        while order > wanted:
            order -= 1
            self._free[order].add(start + (1 << order))
        self._taken[start] = order
        self.num_free -= 1 << order
        return start

    def free(self, start: int) -> None:
        """Give back the chunk that begins at `start`.

        Raises:
            ValueError: no chunk that was taken begins there.

        """
        if start not in self._taken:
            raise ValueError(f"no chunk begins at slot {start}")
        order = self._taken.pop(start)
        self.num_free += 1 << order
        # a buddy past the end of the memory was never free
        while order + 1 < len(self._free) and (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        self._free[order].add(start)

    def size_of(self, start: int) -> int:
        """Slots of the taken chunk that begins at `start`."""
        return 1 << self._taken[start]

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless taken and free chunks tile the memory, none half free."""
        chunks = [(start, order) for start, order in self._taken.items()]
        chunks += [(start, order) for order, free in enumerate(self._free) for start in free]
        end = 0
        for start, order in sorted(chunks):
            assert start == end, "chunks overlap or leave a gap"
            assert start % (1 << order) == 0, "a chunk is not aligned"
            end = start + (1 << order)
        assert end == self.num_slots, "the memory's end is lost"
        free_slots = sum(len(free) << order for order, free in enumerate(self._free))
        assert free_slots == self.num_free, "free slots are miscounted"
        for order, free in enumerate(self._free):
            pairs = {start for start in free if start ^ (1 << order) in free}
            assert not pairs, "two free buddies were not joined"
