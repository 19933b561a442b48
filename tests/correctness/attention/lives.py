"""Sequences that do all that a block manager lets them, for batches that follow them."""

import numpy as np

from pagedattn import BlockManager, PageTable

BLOCK, NUM_SEQUENCES, LONGEST = 16, 4, 12 * 16
"""Tokens of a block, sequences, and tokens that one of them has at most."""


class Life:
    """Four sequences in a batch that grow, fork, swap, end and share, as hypothesis draws it.

    Args:
        choose: a function that picks one of several.

    """

    ACTIONS = ("grow", "grow", "grow", "chunk", "some", "fork", "replace", "swap", "nothing")

    def __init__(self, choose):
        self.choose = choose
        self.manager = BlockManager(200, BLOCK, num_host_blocks=100, seed=b"0" * 32)
        self.prompts = [[kind] * 33 + [kind, other] * 9 for kind in (1, 2) for other in (1, 2)]
        self.ids = np.concatenate([self.admitted() for _ in range(NUM_SEQUENCES)])

    def admitted(self):
        prompt = self.choose(self.prompts)
        return self.manager.admit([prompt[: self.choose([1, 16, 17, 32, 33, 48, 50])]]).sequence_ids

    def step(self):
        """Do something, and return the page table; no sequence is longer than `LONGEST`."""
        action = self.choose(self.ACTIONS)
        place = self.choose(range(NUM_SEQUENCES))
        one = self.ids[place : place + 1]
        room = LONGEST - self.manager.num_tokens(self.ids)
        if action == "grow" and room.min() > 0:
            self.manager.append(self.ids)
        elif action == "chunk" and room.min() > 40:
            self.manager.append(self.ids, self.choose([2, 16, 17, 40]))
        elif action == "some" and room[place] > 20:
            self.manager.append(one, self.choose([1, 5, 20]))
        elif action == "fork":
            other = self.choose(range(NUM_SEQUENCES))
            (fork,) = self.manager.fork(one)
            self.manager.free(self.ids[other : other + 1])
            self.ids[other] = fork
        elif action == "replace":
            self.manager.free(one)
            self.ids[place] = self.admitted()[0]
        elif action == "swap":
            self.manager.swap_out(one)
            self.manager.swap_in(one)
        return PageTable.of(self.manager, self.ids)
