"""What the rows that compare block managers share."""

import gc

import pytest

from pagedattn.peers import PagedattnBlockManager, VllmBlockManager


@pytest.fixture
def without_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def make_manager(implementation):
    """Make the implementation's manager of so many usable blocks."""

    def make(num_blocks, block_size, *, prefix_caching):
        if implementation == "vllm":
            return VllmBlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
        return PagedattnBlockManager(
            num_blocks,
            block_size,
            prefix_caching=prefix_caching,
            from_lists=implementation == "pagedattn_from_lists",
        )

    return make


@pytest.fixture
def describe_row(benchmark, implementation):
    """Group a row and fill its columns."""

    def fill(operation, workload, block_size, num_sequences=None, **more):
        benchmark.group = ", ".join(
            [operation, workload, *([f"{num_sequences} sequences"] if num_sequences else [])]
        )
        benchmark.extra_info.update(
            area="block_manager",
            operation=operation,
            implementation=implementation,
            workload=workload,
            device="cpu",
            num_sequences=num_sequences,
            block_size=block_size,
            **more,
        )

    return fill
