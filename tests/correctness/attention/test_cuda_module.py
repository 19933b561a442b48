"""A kernel is launched on its device's current stream, by any thread, without a driver here."""

import contextlib
import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from pagedattn.attention.cuda import module

SUCCESS, INVALID_CONTEXT = SimpleNamespace(name="fine"), SimpleNamespace(name="invalid context")
DEVICE = 1


class Parameters(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int),)


class Driver:
    """In place of cuda.bindings.driver: notes the stream of each launch, and who is current.

    A launch waits for another one before it looks at what it was given, as the driver does not
    hold the interpreter's lock.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS, CUDA_ERROR_INVALID_CONTEXT=INVALID_CONTEXT)
    CUlaunchConfig = SimpleNamespace
    CUfunction_attribute = CUlaunchAttribute = CUlaunchAttributeID = mock.MagicMock()

    def __init__(self):
        self.launched = []
        self.others = None
        self.thread = threading.local()
        self.thread.context = "of some device"

    def cuModuleLoadData(self, cubin):  # noqa: N802
        return self._answer(cubin)

    def cuModuleGetFunction(self, found, name):  # noqa: N802
        return SUCCESS, (found, name)

    def cuFuncSetAttribute(self, *_):  # noqa: N802
        return self._answer()

    def cuDeviceGet(self, ordinal):  # noqa: N802
        return SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, device):  # noqa: N802
        return SUCCESS, f"of {device}"

    def cuCtxSetCurrent(self, context):  # noqa: N802
        self.thread.context = context
        return (SUCCESS,)

    def cuLaunchKernelEx(self, config, *_):  # noqa: N802
        if self.others is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.others.wait(timeout=1)
        answer = self._answer()
        if answer[0] is SUCCESS:
            self.launched.append((config.hStream, torch.cuda.current_device(), config.gridDimX))
        return answer

    def _answer(self, *found):
        if getattr(self.thread, "context", None) is None:
            return (INVALID_CONTEXT, *(None for _ in found))
        return (SUCCESS, *found)


@pytest.fixture
def gpu(monkeypatch):
    """Current devices and streams, each thread's own; `switches` are the changes of device."""
    now = threading.local()
    switches = []

    @contextlib.contextmanager
    def on(device):
        before = torch.cuda.current_device()
        switches.append(device)
        now.device = device
        yield
        now.device = before

    def stream(device=None):
        device = torch.cuda.current_device() if device is None else device
        return SimpleNamespace(cuda_stream=getattr(now, "streams", {}).get(device, 0))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(now, "device", 0))
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "device", on)
    return SimpleNamespace(now=now, switches=switches)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=made))
    monkeypatch.setattr(module, "compile_kernel", lambda *_: b"code")
    return made


@pytest.fixture
def kernel(gpu, driver):
    del driver
    made = module.Kernel("source", "name", (), DEVICE)
    gpu.switches.clear()
    return made


@pytest.mark.parametrize("current", [0, DEVICE, 2])
def test_a_kernel_is_launched_on_its_device_and_its_current_stream(kernel, driver, gpu, current):
    gpu.now.device, gpu.now.streams = current, {0: 10, DEVICE: 11, 2: 12}
    kernel.launch(3, 32, 0, Parameters())
    assert driver.launched == [(11, DEVICE, 3)]
    assert torch.cuda.current_device() == current
    assert len(gpu.switches) == (current != DEVICE)


def test_threads_launch_at_the_same_time_each_on_its_stream(kernel, driver, gpu):
    driver.others = threading.Barrier(2)

    def launch(stream):
        driver.thread.context, gpu.now.device = "of this thread", DEVICE
        gpu.now.streams = {DEVICE: stream}
        for _ in range(20):
            kernel.launch(stream, 32, 0, Parameters())
            kernel.launch(1, 32, 0, Parameters())
        return stream

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(launch, (100, 200))) == [100, 200]
    streams = [stream for stream, _, programs in driver.launched if programs == 1]
    assert sorted(streams) == [100] * 20 + [200] * 20
    assert all(programs in (1, stream) for stream, _, programs in driver.launched)


def test_a_thread_in_which_pytorch_has_not_used_the_gpu_launches_too(kernel, driver, gpu):
    def launch(made):
        gpu.now.device = DEVICE
        assert getattr(driver.thread, "context", None) is None
        made = made or module.Kernel("source", "other", (), DEVICE)
        made.launch(3, 32, 1000, Parameters())
        return driver.thread.context

    kernel.launch(3, 32, 1000, Parameters())
    for made in (kernel, None):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(launch, made).result() == f"of {DEVICE}"
    assert len(driver.launched) == 3


def test_what_the_driver_refuses_for_another_reason_is_said(kernel, driver):
    refusal = (SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"),)
    with (
        mock.patch.object(Driver, "cuLaunchKernelEx", return_value=refusal),
        pytest.raises(module.CudaError, match="answers CUDA_ERROR_OUT_OF_MEMORY"),
    ):
        kernel.launch(3, 32, 0, Parameters())
    assert driver.launched == []


def test_streams_that_come_and_go_leave_no_more_than_so_many_descriptions(kernel, driver, gpu):
    for stream in range(5 * kernel.MOST_CONFIGS):
        gpu.now.streams = {DEVICE: stream}
        kernel.launch(3, 32, 0, Parameters())
    assert [launched[0] for launched in driver.launched] == list(range(5 * kernel.MOST_CONFIGS))
    assert len(kernel._configs) <= kernel.MOST_CONFIGS
