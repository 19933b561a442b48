"""GPUs by name, by size, and the machine's own."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pagedattn.config import ConfigError
from pagedattn.hardware import GIB, GPU, find_gpu, gpu_names, own_gpu


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("v100-16gb", 16),
        ("v100-32gb", 32),
        ("a100-40gb", 40),
        ("a100-80gb", 80),
        ("h100-80gb", 80),
        ("h200-141gb", 141),
        ("rtx-4090", 24),
    ],
)
def test_a_named_gpu_has_its_printed_memory(name, gib):
    gpu = find_gpu(name)
    assert (gpu.name, gpu.memory_bytes) == (name, gib * GIB)
    assert 500e9 < gpu.bandwidth < 10e12
    assert name in gpu_names()


def test_all_names_are_tested():
    marks = test_a_named_gpu_has_its_printed_memory.pytestmark
    assert tuple(row[0] for row in marks[0].args[1]) == gpu_names()


@pytest.mark.parametrize(
    ("asked", "name"),
    [("V100", "v100-32gb"), ("H100-80GB", "h100-80gb"), (" 4090 ", "rtx-4090")],
)
def test_short_names_and_any_case_will_do(asked, name):
    assert find_gpu(asked) == find_gpu(name)


@pytest.mark.parametrize(
    ("asked", "num_bytes"), [("48", 48 * GIB), ("0.5 GiB", GIB // 2), ("23.6gib", 25340307046)]
)
def test_a_number_is_a_gpu_of_so_many_gib(asked, num_bytes):
    gpu = find_gpu(asked)
    assert (gpu.memory_bytes, gpu.bandwidth, gpu.flops) == (num_bytes, None, None)
    assert gpu.name.endswith(" GiB")


@pytest.mark.parametrize("name", ["", "b1", "0", "-5", "1e3", "nan", "48 GB", "2000000", "٣"])
def test_anything_else_is_refused_with_the_names_there_are(name):
    with pytest.raises(ConfigError) as error:
        find_gpu(name)
    assert str(error.value).startswith("gpu must be one of v100-16gb, ")
    assert str(error.value).endswith(f"or a number of GiB up to 1024, not {name!r}.")


def seen(monkeypatch, name, num_bytes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name=name, total_memory=num_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return own_gpu()


def test_the_machines_own_gpu_has_the_memory_that_torch_sees(monkeypatch):
    gpu = seen(monkeypatch, "NVIDIA H100 80GB HBM3", 85_017_493_504)
    known = find_gpu("h100")
    expected = GPU("NVIDIA H100 80GB HBM3", 85_017_493_504, known.bandwidth, known.flops)
    assert gpu == expected


def test_a_gpu_of_another_name_has_no_known_rates(monkeypatch):
    gpu = seen(monkeypatch, "NVIDIA GH200 480GB", 100 * GIB)
    assert gpu == GPU("NVIDIA GH200 480GB", 100 * GIB)


def test_without_a_gpu_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_gpu() is None


def test_without_torch_there_is_none():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pagedattn.hardware import own_gpu; print(own_gpu())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
