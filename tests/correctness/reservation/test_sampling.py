"""Forks of requests: what they share is what a model of their history says."""

import numpy as np
import pytest

from pagedattn.reservation import Requests, beam_search, parallel_sampling
from pagedattn.reservation.sampling import _Forks


def requests_of(*lengths):
    prompts, outputs = np.array(lengths).T
    return Requests(np.zeros(len(lengths)), prompts, outputs)


def test_parallel_samples_share_the_prompts_full_blocks():
    # a prompt of 10 in blocks of 4: 2 full blocks and a partial one, which all but one copy
    shared = parallel_sampling(requests_of((10, 3)), width=3, block_size=4)
    # steps with 11, 12 and 13 tokens: 3, 3 and 4 blocks each
    assert shared.num_unshared == 3 * (3 + 3 + 4)
    assert shared.num_used == (2 + 3) + (2 + 3) + (2 + 6)
    assert shared.num_copied == 2
    assert shared.saving == pytest.approx(1 - 18 / 30)


def test_one_sample_shares_nothing():
    shared = parallel_sampling(requests_of((10, 30), (5, 7)), width=1)
    assert (shared.saving, shared.num_copied) == (0, 0)


def test_beams_hold_the_distinct_prefixes_of_their_histories():
    """Random choices of parents, against sets of prefixes."""
    rng = np.random.default_rng(0)
    requests = requests_of((5, 40), (16, 25), (3, 60))
    width, size = 4, 4
    forks = _Forks(requests, width, size)
    histories = [[tuple(range(prompt)) for _ in range(width)] for prompt in (5, 16, 3)]
    fresh = iter(range(1000, 10**6))
    used = unshared = 0
    while forks.left.size:
        parents = rng.integers(0, width, (len(histories), width))
        forks.choose(parents)
        histories = [
            [(*beams[parent], next(fresh)) for parent in row]
            for beams, row in zip(histories, parents, strict=True)
        ]
        forks.step()
        forks.manager.check_integrity()
        for beams, ids in zip(histories, forks.ids, strict=True):
            assert forks.manager.num_tokens(ids).tolist() == [len(beam) for beam in beams]
            assert len(set(ids.tolist())) == width
            # the end of a block belongs to the one beam that wrote it
            ends = [range(size, len(beam) + size, size) for beam in beams]
            blocks = {
                (beam[:end] if end <= len(beam) else (beam, place))
                for place, (beam, stops) in enumerate(zip(beams, ends, strict=True))
                for end in stops
            }
            used += len(blocks)
            unshared += sum(len(stops) for stops in ends)
        running = forks.keep_running()
        histories = [beams for beams, goes_on in zip(histories, running, strict=True) if goes_on]
    result = forks.result()
    assert (result.num_used, result.num_unshared) == (used, unshared)
    assert forks.manager.num_free_blocks == forks.manager.num_blocks


def test_the_surer_the_model_the_less_beams_share():
    requests = requests_of(*[(20, 80)] * 20)
    savings = [
        beam_search(requests, 4, np.random.default_rng(0), sharpness).saving
        for sharpness in (1, 8, 64)
    ]
    assert savings == sorted(savings, reverse=True)
    assert 0.75 > savings[0] > savings[2] + 0.1


def test_one_beam_is_a_plain_sequence():
    assert beam_search(requests_of((20, 50)), 1, np.random.default_rng(0), 4).saving == 0


def test_a_width_of_nothing_is_refused():
    with pytest.raises(ValueError, match="width is 0"):
        parallel_sampling(requests_of((1, 1)), 0)
