"""The shapes that are timed on a GPU, before they are: right, and their kernels are compiled.

Kernels that are compiled when they are first used are so here, in workers beside one another, and
not one after the other while nothing else may run.
"""

import numpy as np
import pytest
import torch

from pagedattn.testing import check_attention, last_queries, make_inputs
from pagedattn.workloads import GPU_SHAPES, find_shape

SEQUENCES = 4
QUERIES = 16
"""Of a batch, that are compared with float64, and of a sequence."""


def pytest_generate_tests(metafunc):
    """Check all shapes, or those that --shape names."""
    names = metafunc.config.option.shape or [shape.name for shape in GPU_SHAPES]
    metafunc.parametrize("workload", names)


@pytest.mark.gpu
@pytest.mark.implementations("cuda", "cuda_fp8", "triton", "vllm_triton")
def test_what_is_timed_is_right(workload, implementation, attend):
    shape = find_shape(workload)
    lengths = np.array(shape.query_lengths)
    some = np.linspace(0, lengths.size - 1, SEQUENCES).astype(np.int64)
    try:
        inputs = make_inputs(shape, device="cuda", extra_columns=0)
        out = attend(inputs, implementation)
        part, rows = last_queries(inputs, np.unique([*some, lengths.argmax()]), QUERIES)
        check_attention(out[rows], part, implementation=implementation)
    except torch.OutOfMemoryError:
        pytest.skip("other workers have the memory that this takes")
