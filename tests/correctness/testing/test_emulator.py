"""The machine that CUDA kernels are emulated on: small kernels, in emulated.cu, a property each."""

import ctypes

import numpy as np
import pytest
import torch

from .emulated import SEEDS, SOURCE, Parameters, address_of, needs_a_compiler, run

pytest.importorskip("triton")

from pagedattn.attention.cuda.module import CudaError, TensorMap
from pagedattn.testing.emulator import (
    EmulatedKernel,
    EmulationError,
    kernel,
    tensor_map,
    unavailable,
)

pytestmark = needs_a_compiler


def aligned(size):
    """Bytes that begin at a multiple of 16."""
    memory = np.zeros(size + 16, np.uint8)
    return memory[-memory.ctypes.data % 16 :][:size]


# ---- who waits for what


@pytest.mark.parametrize("seed", SEEDS)
def test_who_waits_for_what_never_comes_is_told(seed):
    with pytest.raises(EmulationError, match=r"^nothing goes on: program 0's thread 40 waits for "):
        run("waits_for_nobody", 40, 41, threads=64, seed=seed)
    told = "program 1's threads 3 to 36 wait for the barrier at 1024"
    with pytest.raises(EmulationError, match=told):
        run("waits_for_nobody", 3, 37, threads=64, programs=2, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_who_looks_for_a_word_goes_on_once_it_is_left(seed):
    out = aligned(16)
    run("looks_for_a_word", 1, programs=2, seed=seed, out=out)
    assert list(out.view(np.float32)) == [1, 2, 3, 4]


def test_who_looks_for_what_nobody_leaves_is_told():
    with pytest.raises(EmulationError, match="1's thread 0 waits for a word of another program"):
        run("looks_for_a_word", 0, programs=2, out=aligned(16))


def test_a_named_barrier_wants_as_many_threads_as_it_is_told():
    run("waits_at_a_barrier", 2, 64, threads=96)
    with pytest.raises(EmulationError, match="threads 0 to 31 wait for others at named barrier 3"):
        run("waits_at_a_barrier", 1, 64, threads=96)
    with pytest.raises(EmulationError, match="barrier 3 of 33 threads"):
        run("waits_at_a_barrier", 1, 33, threads=96)


@pytest.mark.parametrize("seed", SEEDS)
def test_who_tells_the_next_at_a_named_barrier_does_not_wait_there(seed):
    out = aligned(40)
    run("takes_turns", 3, threads=96, seed=seed, out=out)
    assert list(out.view(np.int32)) == [9, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    with pytest.raises(EmulationError, match="threads 64 to 95 wait for others at named barrier 6"):
        run("takes_turns", 1, threads=96, seed=seed, out=aligned(40))


@pytest.mark.parametrize("seed", SEEDS)
def test_who_comes_after_the_next_phase_has_ended_waits_in_vain(seed):
    run("comes_late", 1, threads=64, seed=seed)
    with pytest.raises(EmulationError, match="threads 32 to 63 wait for the barrier"):
        run("comes_late", 0, threads=64, seed=seed)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("parts_ways", r"comes to __\w+, where others of its warp are at __\w+"),
        ("ends_before_its_warp", "comes to __syncwarp, and lanes of|ends, and others of its warp"),
        ("arrives_once_more", "arrives at the barrier at 1024, where all that it expects have"),
        ("waits_where_no_barrier_is", "uses a barrier at 1024, where none is"),
        ("overflows_its_stack", "needs more than 65536 bytes of stack"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_lane_must_not_do_is_told_in_a_sentence(name, told, seed):
    with pytest.raises(EmulationError, match=rf"^program 0's thread \d+ ({told})"):
        run(name, seed=seed)


def test_lanes_that_have_ended_are_not_waited_for_by_all():
    out = torch.full((32,), -1, dtype=torch.int32)
    run("some_end_before_all_meet", threads=64, out=out)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (496, None),
        (512, "uses 16 bytes at 1536, and shared memory has 512 at 1024"),
        (504, "uses 1528, which is no multiple of 16"),
        (64, "where the barrier at 1088 lies"),
    ],
)
def test_shared_memory_ends_where_the_launch_says_and_barriers_are_in_nobodys_way(at, told):
    if told is None:
        run("stores", at, shared_bytes=512)
    else:
        with pytest.raises(EmulationError, match=told):
            run("stores", at, shared_bytes=512)


# ---- copies


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_by_threads_is_there_when_its_barrier_says_so_and_nan_before(seed):
    given, out = torch.rand(32, 4), torch.zeros(32, 4)
    run("copies", 1, given=given, out=out, seed=seed)
    assert torch.equal(out, given)
    run("copies", 0, given=given, out=out, seed=seed)
    assert out.isnan().all()


def some_tensor(itemsize, swizzle):
    """A tensor of 5 dimensions, its values, and what describes a box of 8 x 3 rows of it."""
    columns = 2 * swizzle // itemsize - 3
    sizes = (columns, 10, 2, 3, 4)
    pitch = -(-columns * itemsize // 16) * 16
    memory = aligned(4 * 3 * 2 * 10 * pitch)
    memory[:] = np.random.default_rng(swizzle).integers(1, 255, memory.size)
    strides = (pitch, 10 * pitch, 20 * pitch, 60 * pitch)
    values = memory.reshape(4, 3, 2, 10, pitch)[..., : columns * itemsize].copy()
    values = values.view(np.uint16 if itemsize == 2 else np.uint8)
    box = (swizzle // itemsize, 8, 1, 3, 1)
    return (
        memory,
        values,
        box,
        tensor_map(address_of(memory), itemsize, sizes, strides, box, swizzle, 128),
    )


def box_of(values, box, corner):
    """Return a box, zeros where the tensor ends; dimensions the other way round as in numpy."""
    found = np.zeros(box[::-1], values.dtype)
    for place in np.ndindex(found.shape):
        at = tuple(c + i for c, i in zip(corner[::-1], place, strict=True))
        if all(0 <= i < size for i, size in zip(at, values.shape, strict=True)):
            found[place] = values[at]
    return found


def unswizzled(written, swizzle):
    """Bytes in the order of the box: piece i of 16 is at i XOR (i / 8 modulo pieces of a span)."""
    pieces = written.reshape(-1, 16)
    places = np.arange(len(pieces))
    return pieces[places ^ (places // 8) % (swizzle // 16)].reshape(-1)


@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize(
    "corner",
    [(0, 0, 0, 0, 0), (3, 1, 1, 0, 3), (-2, -5, 1, -1, 2), (9, 4, 0, 2, 0), (0, 0, 0, 0, 9)],
)
def test_a_box_is_swizzled_and_zero_outside_of_the_tensor(swizzle, itemsize, corner):
    memory, values, box, described = some_tensor(itemsize, swizzle)
    expected = box_of(values, box, corner)
    for seed in (0, 1):
        out = np.zeros(expected.nbytes, np.uint8)
        run("loads_a_box", out.size, *corner, map=described, out=out, seed=seed)
        found = unswizzled(out, swizzle).view(values.dtype).reshape(expected.shape)
        np.testing.assert_array_equal(found, expected)
    del memory  # the description has its address alone


def test_a_box_that_is_not_waited_for_is_nan():
    memory, _, _, described = some_tensor(2, 128)
    out = torch.zeros(8, dtype=torch.float16)
    run("reads_a_box_early", 3072, map=described, out=out)
    assert out.isnan().all()
    del memory


def test_a_copy_that_comes_after_its_programs_end_is_told_for_some_seed():
    memory, _, _, described = some_tensor(2, 128)
    told = []
    for seed in SEEDS:
        try:
            run("leaves_a_copy_behind", 3072, map=described, seed=seed)
        except EmulationError as error:
            told.append(str(error))
    assert told
    assert all("whose copies to shared memory are not waited for" in sentence for sentence in told)
    del memory


def test_the_tma_needs_fences_before_what_lanes_wrote_and_made():
    memory, _, _, described = some_tensor(2, 128)
    run("writes_before_the_tma", 3072, 1, map=described)
    with pytest.raises(EmulationError, match="has the TMA come to 1056, which thread 3 wrote"):
        run("writes_before_the_tma", 3072, 0, map=described)
    with pytest.raises(EmulationError, match="gives the TMA a barrier that was not fenced"):
        run("hides_a_barrier_from_the_tma", map=described)
    del memory


@pytest.mark.parametrize(
    "changes",
    [
        {"address": 8},
        {"strides": (24,)},
        {"sizes": (0, 4)},
        {"box": (64, 257)},
        {"box": (60, 4), "swizzle": 16},
        {"box": (128, 4)},
        {"box": (32, 4)},
        {"fetched_bytes": 512},
    ],
    ids=str,
)
def test_a_tensor_map_that_a_gpu_would_refuse_is_refused(changes):
    right = {"address": 0, "itemsize": 2, "sizes": (64, 4), "strides": (128,)}
    right |= {"box": (64, 4), "swizzle": 128, "fetched_bytes": 256}
    tensor_map(**right)
    with pytest.raises(CudaError, match="no such tensor map"):
        tensor_map(**(right | changes))


# ---- order, and how a kernel is compiled


def test_a_seed_decides_who_comes_when_and_nothing_else():
    orders = []
    for seed in (0, 0, 1, 2):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(3 * 64, dtype=torch.int32)
        run("draws_numbers", with_=counter, out=out, threads=64, programs=3, seed=seed)
        assert sorted(out.tolist()) == list(range(3 * 64))
        orders.append(out.tolist())
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_parameters_of_another_size_are_refused():
    emulated = EmulatedKernel(SOURCE, "kernel", (("BF16", 0), ("FP8", 0), ("FP8_PRODUCTS", 0)))
    told = f"parameters have {ctypes.sizeof(Parameters)} bytes, and it is given 128"
    with pytest.raises(EmulationError, match=told):
        emulated.launch(1, 32, 1024, TensorMap())


SMALL = '#include <cstring>\n#include "hopper.cuh"\nstruct Parameters { int a; };\n'


class Small(ctypes.Structure):
    _fields_ = (("a", ctypes.c_int),)


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_library_is_kept_where_that_can_be(tmp_path, monkeypatch, is_writable):
    (tmp_path / "file").touch()
    folder = tmp_path / ("kernels" if is_writable else "file")
    monkeypatch.setenv("PAGEDATTN_CACHE", str(folder))
    source = tmp_path / "small.cu"
    source.write_text(SMALL + "void small(const Parameters &) {}\n")
    EmulatedKernel(source, "small", (("OWN", int(is_writable)),)).launch(1, 32, 0, Small())
    assert not is_writable or len(list(folder.glob("emulated-small-*.so"))) == 1


def test_what_the_compiler_says_is_told(tmp_path):
    source = tmp_path / "small.cu"
    source.write_text(SMALL + "void small(const Parameters &) { nonsense(); }\n")
    with pytest.raises(EmulationError, match=r"(?s)small\.cu does not compile.*nonsense"):
        EmulatedKernel(source, "small", ())


def test_where_nothing_can_be_emulated_a_phrase_says_why(monkeypatch):
    monkeypatch.setattr(kernel.shutil, "which", {}.get)
    assert unavailable() == "it needs a C++ compiler: g++ or clang++"
    with pytest.raises(EmulationError, match="no kernel can be emulated: it needs a C"):
        EmulatedKernel("decode.cu", "decode_kernel", ())
    monkeypatch.setattr(kernel.platform, "machine", lambda: "riscv64")
    assert unavailable() == "it needs Linux on x86_64 or aarch64, not linux on riscv64"
