"""Products and numbers of the machine that CUDA kernels are emulated on, against torch."""

import pytest
import torch

from .emulated import SEEDS, needs_a_compiler, run

pytest.importorskip("triton")

from pagedattn.testing.emulator import EmulationError, tensor_map

pytestmark = needs_a_compiler


@pytest.mark.parametrize("way", [0, 1, 2], ids=["as it is", "transposed", "in registers"])
def test_matrices_go_to_lanes_and_back(way):
    given = torch.arange(256, dtype=torch.int16).view(16, 16)
    out = torch.zeros_like(given)
    run("moves_matrices", way, given=given, out=out)
    assert torch.equal(out, given.T if way else given)


def factors(bf16, *shapes):
    dtype = torch.bfloat16 if bf16 else torch.float16
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("bf16", [0, 1])
def test_a_warp_multiplies_as_torch_does(bf16):
    a, b = factors(bf16, (16, 16), (8, 16))
    out = torch.zeros(16, 8)
    run("multiplies_in_a_warp", given=a, with_=b, out=out, bf16=bf16)
    torch.testing.assert_close(out, a.float() @ b.float().T)


def map_of(matrix, rows):
    """Describe a matrix so that one instruction brings so many rows of 128 bytes."""
    sizes, size = (matrix.shape[1], matrix.shape[0], 1, 1), matrix.element_size()
    pitch, box = size * matrix.shape[1], (128 // size, rows, 1, 1)
    return tensor_map(matrix.data_ptr(), size, sizes, (pitch,) * 3, box, 128, 128)


@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize(("bf16", "fp8"), [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_warpgroup_multiplies_by_rows_and_by_columns_as_torch_does(narrow, bf16, fp8, seed):
    # over fp8 factors are float16, whatever the queries were
    a, by_rows, by_columns = factors(bf16 and not fp8, (64, 64), (128, 64), (64, 128))
    how = {"threads": 128, "bf16": bf16, "fp8": fp8, "seed": seed, "map": map_of(a, 64)}
    for from_memory in (0, 1):
        out = torch.full((64, 64 if narrow else 128), torch.nan)
        flags = (narrow, 0, 0, 0, 0, from_memory)
        run("multiplies_rows", *flags, other=map_of(by_rows, 128), given=a, out=out, **how)
        torch.testing.assert_close(out, (a.float() @ by_rows.float().T)[:, : out.shape[1]])
    out = torch.full((64, 128), torch.nan)
    other = map_of(by_columns, 64)
    run("multiplies_columns", narrow, other=other, given=a, out=out, **how)
    torch.testing.assert_close(out, a.float() @ by_columns.float())


@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("from_memory", [0, 1])
def test_a_warpgroup_multiplies_numbers_of_fp8_as_torch_does(narrow, from_memory):
    a, b = (part.to(torch.float8_e4m3fn) for part in factors(0, (64, 128), (128, 128)))
    out = torch.full((64, 64 if narrow else 128), torch.nan)
    run(
        "multiplies_rows", narrow, 0, 0, 0, 0, from_memory,
        map=map_of(a, 64), other=map_of(b, 128), given=a, out=out,
        threads=128, fp8=1, fp8_products=1,
    )  # fmt: skip
    torch.testing.assert_close(out, (a.float() @ b.float().T)[:, : out.shape[1]])


def test_products_that_are_not_waited_for_are_missing_for_some_seed():
    a, b = factors(0, (64, 64), (128, 64))
    missing = []
    for seed in SEEDS:
        out = torch.zeros(64, 128)
        maps = {"map": map_of(a, 64), "other": map_of(b, 128)}
        run("multiplies_rows", 0, 1, out=out, threads=128, seed=seed, **maps)
        missing.append(out.isnan().any().item())
    assert any(missing)


def test_what_a_warpgroup_must_not_do_is_told():
    a, b = factors(0, (64, 64), (128, 64))
    how = {
        "map": map_of(a, 64),
        "other": map_of(b, 128),
        "threads": 128,
        "out": torch.zeros(64, 128),
    }
    with pytest.raises(EmulationError, match="multiplies without `products_begin`"):
        run("multiplies_rows", 0, 0, 1, **how)
    with pytest.raises(EmulationError, match="of one warpgroup, made 4 and 0 products"):
        run("multiplies_rows", 0, 0, 0, 1, **how)
    told = "writes to 5120, which products that are not waited for read"
    with pytest.raises(EmulationError, match=told):
        run("multiplies_rows", 0, 0, 0, 0, 1, **how)
    run("writes_before_a_product", 1, threads=128)
    with pytest.raises(EmulationError, match="has a product come to 10240, which thread 7 wrote"):
        run("writes_before_a_product", 0, threads=128)


def converted(kind, numbers, bits):
    out = torch.zeros(len(bits), dtype=torch.int32)
    run("converts", kind, len(bits), given=numbers, with_=bits, out=out)
    return out


EVERY = torch.arange(65536, dtype=torch.int32)


@pytest.mark.parametrize(("kind", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_floats_are_rounded_as_torch_rounds_them(kind, dtype):
    exact = EVERY.to(torch.int16).view(dtype).float()
    between = (exact + exact.roll(1)) / 2  # of two that are as near, the even one
    torch.manual_seed(0)
    wild = torch.randint(-(2**31), 2**31, (65536,), dtype=torch.int32).view(torch.float32)
    numbers = torch.cat([exact, between, wild])
    out = converted(kind, numbers, numbers.view(torch.int32)).view(dtype).view(-1, 2)
    for found, expected in zip(out.T, (numbers.to(dtype), -numbers.to(dtype)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("kind", "dtype"), [(2, torch.float16), (3, torch.bfloat16)])
def test_every_number_of_16_bits_is_widened_as_torch_widens_it(kind, dtype):
    found = converted(kind, EVERY, EVERY).view(torch.float32)
    expected = EVERY.to(torch.int16).view(dtype).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_every_pair_of_e4m3_numbers_is_widened_as_torch_widens_it():
    found = converted(4, EVERY, EVERY).view(torch.float16).view(-1, 2)
    expected = EVERY.to(torch.int16).view(torch.float8_e4m3fn).view(-1, 2).to(torch.float16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_floats_become_e4m3_as_torch_rounds_them_up_to_its_largest():
    exact = EVERY[:256].to(torch.uint8).view(torch.float8_e4m3fn).float()
    finite = exact[exact.isfinite()].sort().values
    torch.manual_seed(0)
    wild = torch.randint(-(2**31), 2**31, (65536,), dtype=torch.int32).view(torch.float32)
    numbers = torch.cat([exact, (finite[1:] + finite[:-1]) / 2, wild])
    found = converted(5, numbers, numbers.view(torch.int32)).view(torch.float8_e4m3fn).view(-1, 4)
    for column, factor in zip(found.T, (1, -1, 0.5, 2), strict=True):
        expected = (numbers * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(column.float().nan_to_num(999), expected.float().nan_to_num(999))
