"""Parts of random inputs are the inputs that they are said to be."""

import numpy as np
import pytest
import torch

from pagedattn.attention import attention
from pagedattn.testing import last_queries, make_inputs
from pagedattn.workloads import AttentionShape

CASES = {
    "decode": ((1,) * 5, (30, 1, 64, 17, 40), 0),
    "mixed": ((1, 20, 3, 7, 1), (30, 20, 64, 17, 40), 0),
    "shared": ((1, 2, 1, 9, 1), (70, 80, 64, 90, 66), 48),
}


@pytest.mark.parametrize("options", [{}, {"window": 9, "alibi": True}], ids=["plain", "window"])
@pytest.mark.parametrize("case", CASES)
def test_last_queries_of_some_sequences_attend_as_in_the_whole_batch(case, options):
    queries, lengths, prefix = CASES[case]
    shape = AttentionShape(
        "test", queries, lengths, 4, 2, 16, 8, "float32", shared_prefix=0 if options else prefix
    )
    inputs = make_inputs(shape, **options)
    part, rows = last_queries(inputs, np.array([3, 0, 2]), 4)
    taken = [min(queries[sequence], 4) for sequence in (3, 0, 2)]
    ends = np.cumsum(queries)[[3, 0, 2]]
    expected = [
        row for end, count in zip(ends, taken, strict=True) for row in range(end - count, end)
    ]
    assert rows.tolist() == expected
    assert torch.equal(part.key, inputs.key[rows])
    assert torch.equal(part.value, inputs.value[rows])
    whole, of_part = (
        attention(x.query, x.cache, x.batch, implementation="reference", **x.options)
        for x in (inputs, part)
    )
    torch.testing.assert_close(of_part, whole[rows])
