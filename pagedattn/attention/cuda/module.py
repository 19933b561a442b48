"""Compiled kernels on a device: loading, launching, and descriptions of tensors for the TMA."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from pagedattn.attention.cuda.compiler import compile_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

TENSOR_MAP_BYTES = 128

T = TypeVar("T", bound=Hashable)


class CudaError(RuntimeError):
    """The CUDA driver refused a call; the message names the error."""


class TensorMap(ctypes.Structure):
    """A tensor's description for the tensor memory accelerator, as a field of a parameter struct.

    Source: CUDA driver API, `cuTensorMapEncodeTiled`.
    """

    _fields_ = (("words", ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8)),)


class Kernel:
    """One compiled kernel on one device.

    A kernel takes one parameter: a struct by value. `launch` copies it, so that it may change at
    once after the call; a CUDA graph keeps the copy. Several threads may launch at the same time.

    Args:
        source: file beside this module.
        name: of the kernel in it, `extern "C"`.
        macros: what it is specialised for; sorted pairs.
        device: index of the GPU.

    """

    MOST_CONFIGS = 64

    def __init__(
        self, source: str, name: str, macros: Sequence[tuple[str, int | str]], device: int
    ) -> None:
        from cuda.bindings import driver

        self._driver = driver
        cubin = compile_kernel(source, dict(macros))
        self._device = device
        with torch.cuda.device(device):
            self._module = self._call(driver.cuModuleLoadData, cubin)
            self._function = self._call(driver.cuModuleGetFunction, self._module, name.encode())
        self._lock = threading.Lock()
        self._shared_bytes = 0  # that the function may take
        self._configs: dict[tuple[int, ...], Any] = {}

    def launch(
        self,
        programs: int,
        threads: int,
        shared_bytes: int,
        parameters: ctypes.Structure,
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream of the kernel's device, whichever device is current.

        The launch may begin while the one before on the stream ends, so a kernel has to wait for it
        by `griddepcontrol.wait` before it touches memory that it writes, and before it ends (CUDA
        C++ Programming Guide, "Programmatic Dependent Launch and Synchronization").

        Args:
            programs: thread blocks.
            threads: of a program.
            shared_bytes: dynamic shared memory of a program.
            parameters: the kernel's struct.
            cluster: programs that run at the same time and reach each other's shared memory, 8 at
                most.

        Raises:
            CudaError: the driver refuses.

        """
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self.launch(programs, threads, shared_bytes, parameters, cluster)
            return
        stream = torch.cuda.current_stream(self._device).cuda_stream
        config = self._config(programs, threads, shared_bytes, cluster, stream)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        self._call(
            self._driver.cuLaunchKernelEx, config, self._function, ctypes.addressof(pointers), 0
        )

    def most_clusters(self, threads: int, shared_bytes: int, cluster: int) -> int:
        """Return how many clusters run at once; arguments as those of `launch`.

        Not all multiprocessors have enough neighbours for a large one. Source: CUDA driver API,
        `cuOccupancyMaxActiveClusters`.

        Raises:
            CudaError: the driver refuses.

        """
        with torch.cuda.device(self._device):
            config = self._config(cluster, threads, shared_bytes, cluster, 0)
            ask = self._driver.cuOccupancyMaxActiveClusters
            return int(self._call(ask, self._function, config))

    def read(self, name: str) -> NDArray[np.uint8]:
        """Wait for the device and return the bytes of a `__device__` variable.

        Raises:
            CudaError: the kernel has none of this name.

        """
        driver = self._driver
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            address, size = self._call(driver.cuModuleGetGlobal, self._module, name.encode())
            found = np.empty(size, dtype=np.uint8)
            self._call(driver.cuMemcpyDtoH, found.ctypes.data, address, size)
        return found

    def _config(
        self, programs: int, threads: int, shared_bytes: int, cluster: int, stream: int
    ) -> Any:
        """Return a launch's description, which no launch on another stream has or changes."""
        key = (programs, threads, shared_bytes, cluster, stream)
        found = self._configs.get(key)
        if found is not None:
            return found
        driver = self._driver
        with self._lock:
            if shared_bytes > self._shared_bytes:
                attributes = driver.CUfunction_attribute
                large = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call(driver.cuFuncSetAttribute, self._function, large, shared_bytes)
                self._shared_bytes = shared_bytes
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = stream
        of_launch = [_may_begin_early(driver)]
        if cluster > 1:
            of_launch.append(_in_clusters(driver, cluster))
        config.attrs, config.numAttrs = of_launch, len(of_launch)
        if len(self._configs) >= self.MOST_CONFIGS:
            self._configs.clear()
        self._configs[key] = config
        return config

    def _call(self, function: Callable[..., tuple[Any, ...]], *args: object) -> Any:
        """Call the driver, with the device's context if the thread has none so far.

        A thread has none until PyTorch asks something of the GPU there, for which it is not enough
        that it takes memory that it has kept.
        """
        driver = self._driver
        answer = function(*args)
        if answer[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            device = _checked(driver, driver.cuDeviceGet(self._device))
            context = _checked(driver, driver.cuDevicePrimaryCtxRetain(device))
            _checked(driver, driver.cuCtxSetCurrent(context))
            answer = function(*args)
        return _checked(driver, answer)


def _may_begin_early(driver: Any) -> Any:
    """Make the launch attribute that lets a kernel's programs come while the launch before ends."""
    attribute = driver.CUlaunchAttribute()
    kinds = driver.CUlaunchAttributeID
    attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _in_clusters(driver: Any, size: int) -> Any:
    """Make the launch attribute that has so many programs that follow each other run at once."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x = size
    attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
    return attribute


def num_multiprocessors(device: torch.device) -> int:
    """Return how many programs of one to a multiprocessor a device runs at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def memory_rate(device: torch.device) -> float:
    """Return how many bytes a second a device's memory is made for, by its clock and its bus.

    0 on a CPU, and where PyTorch does not tell, as older ones do not.
    """
    if device.type != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    return 2e3 * kilohertz * bits / 8  # both edges of the clock count


@functools.cache
def load_kernel(
    source: str, name: str, macros: tuple[tuple[str, int | str], ...], device: int
) -> Kernel:
    """Compile and load a kernel at the first call with these arguments, see :class:`Kernel`."""
    return Kernel(source, name, macros, device)


class TensorMaps(Generic[T]):
    """Descriptions of tensors that differ in their address alone, each made once.

    Args:
        describe: makes one of a tensor and `argument`.
        argument: as `describe` takes it.

    """

    MOST = 1024

    def __init__(self, describe: Callable[[torch.Tensor, T], TensorMap], argument: T) -> None:
        self._describe, self._argument = describe, argument
        self._made: dict[int, TensorMap] = {}

    def of(self, tensor: torch.Tensor) -> TensorMap:
        """Return the description of a tensor."""
        address = tensor.data_ptr()
        found = self._made.get(address)
        if found is None:
            if len(self._made) >= self.MOST:
                self._made.clear()
            found = self._made[address] = self._describe(tensor, self._argument)
        return found


@functools.lru_cache(maxsize=64)
def _maps(
    describe: Callable[[torch.Tensor, T], TensorMap],
    argument: T,
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
) -> TensorMaps[T]:
    del shape, stride, dtype  # of all tensors whose descriptions these are
    return TensorMaps(describe, argument)


def maps_of(
    describe: Callable[[torch.Tensor, T], TensorMap], argument: T, like: torch.Tensor
) -> TensorMaps[T]:
    """Return the descriptions of tensors like this one.

    They are the same for all kinds of calls: a sequence that grows changes how a call is launched
    and not where the layers' caches lie.

    Args:
        describe: makes a description of a tensor and `argument`.
        argument: as `describe` takes it.
        like: has the shape, strides and dtype of all of them.

    """
    return _maps(describe, argument, like.shape, like.stride(), like.dtype)


def tensor_map(
    address: int,
    itemsize: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    fetched_bytes: int,
) -> TensorMap:
    """Describe a tensor and the box of it that one TMA instruction moves.

    Args:
        address: of the first element; a multiple of 16.
        itemsize: bytes an element, 1 or 2.
        sizes: elements in each dimension, the contiguous one first.
        strides: bytes from one element to the next in the dimensions after the first; multiples
            of 16.
        box: elements in each dimension that are moved at once.
        swizzle: bytes of the swizzled row (128, 64 or 32), above which `box[0] * itemsize` must
            not be, or 16 for none.
        fetched_bytes: that the L2 asks the memory for at once, 128 or 256.

    Raises:
        CudaError: the driver refuses.

    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {
        1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16,
    }[itemsize]
    swizzles = driver.CUtensorMapSwizzle
    pattern = {
        16: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[swizzle]
    promotions = driver.CUtensorMapL2promotion
    promotion = {
        128: promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        256: promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    }[fetched_bytes]
    encoded = _checked(
        driver,
        driver.cuTensorMapEncodeTiled(
            kind,
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            pattern,
            promotion,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )
    found = TensorMap()
    ctypes.memmove(ctypes.addressof(found), encoded.getPtr(), TENSOR_MAP_BYTES)
    return found


def _checked(driver: Any, answer: tuple[Any, ...]) -> Any:
    """Return what the driver answers, alone if it is one thing."""
    if answer[0] != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"the CUDA driver answers {answer[0].name}")
    return answer[1] if len(answer) == 2 else answer[1:]
