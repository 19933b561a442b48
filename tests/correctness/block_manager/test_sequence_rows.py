"""Ids of sequences: each stands for one live sequence, once a call."""

import pytest

from pagedattn import BlockManager


@pytest.mark.parametrize("order", ["aa", "aab", "abb", "aba", "bba", "baab"])
def test_an_id_given_twice_is_refused_wherever_it_stands(order):
    manager = BlockManager(8, 4)
    ids = dict(zip("ab", manager.allocate([3, 3]).tolist(), strict=True))
    given = [ids[letter] for letter in order]
    for operation in (manager.free, manager.append, manager.num_tokens, manager.drop):
        with pytest.raises(ValueError, match=r"sequence \d is given twice in one call"):
            operation(given)
    assert manager.num_tokens(list(ids.values())).tolist() == [3, 3]
    manager.check_integrity()
