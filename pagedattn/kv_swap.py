"""Swapping blocks between a cache on a device and one in host memory, beside the computation.

What limits a swap is the bus, and the bus is fast in large pieces only. On a device a block lies in
as many pieces as there are layers, so a kernel gathers blocks in a staging buffer at the speed of
the device's memory; in host memory a block's layers lie together, so that one copy moves a block,
or a run of blocks that follow each other. The buffer has two halves: while one is on the bus, the
other is gathered or scattered.

    swap out   gather stream      | gather 0 | gather 1 |          | gather 2 | ...
               transfer stream               |   bus 0  |   bus 1  |   bus 2  | ...
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.kv_cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pagedattn.block_manager import BlockCopies

_STAGING_BYTES = 128 << 20


class HostKVCache(KVCache):
    """A cache in host memory, in which all layers of a block lie together.

    It is a `KVCache` in everything else. If `like` is on a GPU, the memory is page-locked, so that
    the GPU reads and writes it by itself; that takes a while, once. A copy that waits for its turn
    on the GPU must not outlive the cache.

    Args:
        like: a cache of the same layers, blocks and dtype, on a device.
        num_blocks: blocks in host memory.

    Attributes:
        blocks: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_size], contiguous;
            `storage` is a view of it.
        scales: of an fp8 cache, a copy of those that `like` had; swaps move elements alone.

    Raises:
        ValueError: `num_blocks` is less than 1.
        RuntimeError: the memory cannot be page-locked.

    """

    def __init__(self, like: KVCache, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; it must be at least 1")
        num_layers, _, *block = like.storage.shape
        self.blocks = torch.empty((num_blocks, num_layers, *block), dtype=like.storage.dtype)
        self.storage = self.blocks.transpose(0, 1)
        self.scales = None if like.scales is None else like.scales.cpu().clone()
        if like.storage.is_cuda:
            # torch's own page-locked tensors are rounded up to a power of two of bytes
            cudart = torch.cuda.cudart()
            address = self.blocks.data_ptr()
            torch.cuda.check_error(cudart.cudaHostRegister(address, self.blocks.nbytes, 0))
            release = weakref.finalize(self, _unlock, self.blocks)
            release.atexit = False


def _unlock(blocks: torch.Tensor) -> None:
    """Let memory be paged again; it was kept until now."""
    cudart = torch.cuda.cudart()
    cudart.cudaHostUnregister(blocks.data_ptr())


class BlockSwapper:
    """Moves blocks between a device's cache and the host's, all layers in one call.

    `swap_out` and `swap_in` are what `BlockManager.swap_out` and `swap_in` take as `copy`. On a GPU
    they return at once; the work runs on streams of its own, after what the calling stream was
    given before, and swaps take place in the order of the calls. With `wait`, what the calling
    stream is given afterwards runs after the blocks on the device were read or written, so nothing
    else needs to be done. Without it the caller sees to that, by the event that is returned: until
    it has happened, blocks that were swapped out must not be written, and blocks that were swapped
    in not be read. On a CPU a call returns when all is done.

    Bytes: each block of each layer once over the bus, and 2 times on the device more. Limit: the
    bus, as one large copy of page-locked memory uses it.

    Args:
        device: the cache that steps read and write.
        host: where blocks go.
        staging_bytes: of the device's memory for the staging buffer, at least two blocks of all
            layers. That many bytes leave the device's blocks without waiting for the bus.

    Raises:
        ValueError: the caches differ in more than their number of blocks.

    """

    def __init__(
        self, device: KVCache, host: HostKVCache, *, staging_bytes: int = _STAGING_BYTES
    ) -> None:
        mine, theirs = device.storage, host.storage
        if (len(mine), mine.shape[2:], mine.dtype) != (len(theirs), theirs.shape[2:], theirs.dtype):
            raise ValueError(
                "blocks can be swapped between caches that differ in their number of blocks alone; "
                f"given {tuple(mine.shape)} of {mine.dtype} and "
                f"{tuple(theirs.shape)} of {theirs.dtype}"
            )
        self._device, self._host = device, host
        self._on_gpu = mine.is_cuda
        if self._on_gpu:
            block = host.blocks[0]
            self._capacity = max(1, staging_bytes // (2 * block.nbytes))
            self._gathers = torch.cuda.Stream(mine.device)
            self._transfers = torch.cuda.Stream(mine.device)
            with torch.cuda.stream(self._gathers):
                # [2 halves, blocks, num_layers, 2, num_kv_heads, block_size, head_size]
                self._staging = mine.new_empty((2, self._capacity, *block.shape))
            self._unused = [torch.cuda.Event(), torch.cuda.Event()]
            self._half = 0

    def swap_out(self, copies: BlockCopies, *, wait: bool = True) -> torch.cuda.Event | None:
        """Copy blocks of the device to blocks of the host; changes the host's cache.

        Args:
            copies: sources on the device, destinations on the host.
            wait: whether the calling stream goes on only when the device's blocks were read.

        Returns:
            The event that the device's blocks were read, so that they may be written; None on a
            CPU. The host's contents are there after `synchronize`, or for a later `swap_in`.

        """
        if not self._on_gpu:
            self._host.copy_blocks(copies, self._device)
            return None
        current = self._begin()
        for half, pairs, blocks in self._parts(copies.sources, copies.destinations):
            staged = self._staging[half]
            self._gathers.wait_event(self._unused[half])
            with torch.cuda.stream(self._gathers):
                self._launch(self._device.storage, staged.transpose(0, 1), pairs)
            self._transfers.wait_stream(self._gathers)
            with torch.cuda.stream(self._transfers):
                for begin, end in _runs(blocks):
                    run = slice(blocks[begin], blocks[begin] + end - begin)
                    self._host.blocks[run].copy_(staged[begin:end], non_blocking=True)
                self._unused[half].record()
        return self._end(current, wait=wait)

    def swap_in(self, copies: BlockCopies, *, wait: bool = True) -> torch.cuda.Event | None:
        """Copy blocks of the host to blocks of the device; changes the device's cache.

        Args:
            copies: sources on the host, destinations on the device.
            wait: whether the calling stream goes on only when the device's blocks were written.

        Returns:
            The event that the device's blocks were written, so that they may be read; None on a
            CPU.

        """
        if not self._on_gpu:
            self._device.copy_blocks(copies, self._host)
            return None
        current = self._begin()
        for half, pairs, blocks in self._parts(copies.destinations, copies.sources):
            staged = self._staging[half]
            self._transfers.wait_event(self._unused[half])
            with torch.cuda.stream(self._transfers):
                for begin, end in _runs(blocks):
                    run = slice(blocks[begin], blocks[begin] + end - begin)
                    staged[begin:end].copy_(self._host.blocks[run], non_blocking=True)
            self._gathers.wait_stream(self._transfers)
            with torch.cuda.stream(self._gathers):
                self._launch(staged.transpose(0, 1), self._device.storage, pairs.flip(0))
                self._unused[half].record()
        return self._end(current, wait=wait)

    def synchronize(self) -> None:
        """Wait on the host until all swaps are done; their contents may then be read there."""
        if self._on_gpu:
            self._gathers.synchronize()
            self._transfers.synchronize()

    def _begin(self) -> torch.cuda.Stream:
        """Put what follows after the calling stream's work; return that stream."""
        current = torch.cuda.current_stream(self._staging.device)
        self._gathers.wait_stream(current)
        return current

    def _end(self, current: torch.cuda.Stream, *, wait: bool) -> torch.cuda.Event:
        done = self._gathers.record_event()
        if wait:
            current.wait_event(done)
        return done

    def _parts(
        self, on_device: NDArray[np.int32], on_host: NDArray[np.int32]
    ) -> Iterator[tuple[int, torch.Tensor, NDArray[np.int64]]]:
        """Cut a swap into what fits half of the staging buffer, in the host's order.

        Yields:
            The half, int32 [2, num_blocks] blocks of the device and their places in the half, and
            the host's blocks, ascending.

        """
        from pagedattn.block_copy import pairs_on

        order = np.argsort(on_host)
        blocks = on_host[order].astype(np.int64)
        with torch.cuda.stream(self._gathers):
            places = np.arange(order.size, dtype=np.int32) % self._capacity
            pairs = pairs_on(self._staging.device, on_device[order], places)
        for begin in range(0, order.size, self._capacity):
            end = begin + self._capacity
            yield self._half, pairs[:, begin:end], blocks[begin:end]
            self._half ^= 1

    @staticmethod
    def _launch(source: torch.Tensor, destination: torch.Tensor, pairs: torch.Tensor) -> None:
        from pagedattn.block_copy import launch_block_copy

        launch_block_copy(source, destination, pairs)


def _runs(blocks: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of an ascending array in which numbers follow each other.

    Example:
        >>> list(_runs(np.array([3, 4, 5, 9])))
        [(0, 3), (3, 4)]

    """
    ends = [*(np.flatnonzero(np.diff(blocks) != 1) + 1).tolist(), blocks.size]
    yield from zip([0, *ends[:-1]], ends, strict=True)
