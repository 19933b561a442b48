"""What this GPU really does: read and copy bandwidth, and the rate of its matrix units."""

from __future__ import annotations

import importlib.util
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagedattn.benchmarking.gpu_timing import LaunchGraph

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 4 << 30
STRETCH_BYTES = 256 << 10  # that a program of `read_sum` adds up
MATRIX_SIZE = 8192
REPLAYS = 10
REST = 0.1  # seconds before a product, after which the board's power does not limit it
BUS_BYTES = 512 << 20
FP8_RATE = 2.0  # of products in fp8 over those of 16 bits, as all GPUs that have them say


@dataclass(frozen=True)
class Roofs:
    """Measured limits of a GPU.

    Attributes:
        read_gb_per_s: bytes read by the faster sum of 4 GiB in `ways_to_read`, over its time; 1 GB
            is 1e9 bytes.
        copy_gb_per_s: bytes read and written by negating 4 GiB into another tensor, over its time.
        matmul_tflop_per_s: rate of an 8192-cubed bfloat16 product of random matrices, in graphs of
            2 ms after a rest each: one after the other, the board's power soon lowers the clock.

    """

    read_gb_per_s: float
    copy_gb_per_s: float
    matmul_tflop_per_s: float

    def limit_seconds(self, num_bytes: int, flops: int, *, in_fp8: bool = False) -> float:
        """Return the least time for moving so many bytes and doing so many matrix operations.

        Args:
            num_bytes: bytes that are moved.
            flops: matrix operations.
            in_fp8: whether both factors are rounded to fp8, and not 16 bits each.

        """
        rate = self.matmul_tflop_per_s * (FP8_RATE if in_fp8 else 1.0)
        return max(num_bytes / (self.read_gb_per_s * 1e9), flops / (rate * 1e12))


def _median_seconds(launch: Callable[[], object], rest: float = 0.0) -> float:
    graph = LaunchGraph([launch])
    seconds = []
    for _ in range(REPLAYS):
        time.sleep(rest)
        seconds.append(graph.replay())
    return statistics.median(seconds)


def measure_roofs(device: torch.device | str = "cuda") -> Roofs:
    """Measure a GPU's limits; takes about two seconds and 8 GiB of its memory at most.

    Less memory is used where less is free.
    """
    free_bytes, _ = torch.cuda.mem_get_info(device)
    read_bytes = min(READ_BYTES, free_bytes // 4) // STRETCH_BYTES * STRETCH_BYTES
    read, copy = _read_and_copy_seconds(read_bytes, device)
    return Roofs(
        read_gb_per_s=read_bytes / read * 1e-9,
        copy_gb_per_s=2 * read_bytes / copy * 1e-9,
        matmul_tflop_per_s=2 * MATRIX_SIZE**3 / _matmul_seconds(device) * 1e-12,
    )


@dataclass(frozen=True)
class Bus:
    """Measured limits of the way between a GPU and host memory.

    Attributes:
        out_gb_per_s: one copy of 512 MiB to page-locked memory, over its time.
        in_gb_per_s: the same from there.

    """

    out_gb_per_s: float
    in_gb_per_s: float


def measure_bus(device: torch.device | str = "cuda") -> Bus:
    """Measure how fast a GPU and the host exchange large pieces, one way at a time."""
    here = torch.randint(0, 256, (BUS_BYTES,), dtype=torch.uint8, device=device)
    host = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    host.copy_(here)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        seconds = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) * 1e-3)
        return BUS_BYTES / statistics.median(seconds) * 1e-9

    return Bus(out_gb_per_s=rate(host, here), in_gb_per_s=rate(here, host))


def ways_to_read(source: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Return sums that read all of a tensor and write next to nothing.

    PyTorch's, and one that is there to read, as on an H200 attention was faster than PyTorch's; or
    PyTorch's alone where there is no Triton.

    Args:
        source: float32 [a multiple of `STRETCH_BYTES`].

    """
    one = torch.empty((), device=source.device)
    ways = [lambda: torch.sum(source, dim=0, out=one)]
    if importlib.util.find_spec("triton") is not None:
        from pagedattn.benchmarking.read_sum import sum_stretches

        for_each = torch.empty(source.nbytes // STRETCH_BYTES, device=source.device)
        ways.append(lambda: sum_stretches(source, for_each))
    return ways


def _read_and_copy_seconds(num_bytes: int, device: torch.device | str) -> tuple[float, float]:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    # a kernel: in a graph, `copy_` is a memcpy node, and slower
    copy = _median_seconds(lambda: torch.neg(source, out=target))
    return min(_median_seconds(way) for way in ways_to_read(source)), copy


def _matmul_seconds(device: torch.device | str) -> float:
    left, right = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    product = torch.empty_like(left)
    return _median_seconds(lambda: torch.mm(left, right, out=product), REST)
