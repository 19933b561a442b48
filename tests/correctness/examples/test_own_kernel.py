"""A package outside of the project offers an implementation, is installed, and is tested."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagedattn.attention import UnsupportedError

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "own_kernel"
FOLDERS = ("tests/correctness/attention", "tests/benchmarks/attention")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder that the example is installed in, by pip, without a network."""
    source, site = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    shutil.copytree(EXAMPLE, source, dirs_exist_ok=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", site]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No module named pip" in done.stderr:
        pytest.skip("needs pip, which is not installed")
    assert done.returncode == 0, done.stderr
    return site


def pytest_with(site, *arguments):
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT)])
    environment.pop("PYTEST_ADDOPTS", None)
    options = ["-q", "-m", "not gpu", "--benchmark-disable", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            "test_support or bench_attention or second_run or strided or shared", id="some"
        ),
        pytest.param("", id="all", marks=pytest.mark.nightly),
    ],
)
def test_the_example_passes_the_suite_and_the_rows(site, cases):
    cases = f"block_by_block and ({cases})" if cases else "block_by_block"
    done = pytest_with(site, "--impl", "block_by_block", "-k", cases, *FOLDERS)
    assert done.returncode == 0, done.stdout
    assert " failed" not in done.stdout
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 25


def test_the_example_refuses_to_be_captured_where_it_reads_on_the_host(monkeypatch):
    spec = importlib.util.spec_from_file_location("own_kernel", EXAMPLE / "own_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    made, on_gpu = module.BlockByBlock(), SimpleNamespace(is_cuda=True)
    with pytest.raises(UnsupportedError, match="which blocks are seen"):
        made.attention(SimpleNamespace(query=on_gpu))
    with pytest.raises(UnsupportedError, match="which slots are in the cache"):
        made.write_kv(None, None, None, on_gpu)


def test_a_name_selects_the_suite_on_it_alone_and_the_rows_beside_the_usual_ones(site):
    words = ["--impl", "block_by_block", "--collect-only", *FOLDERS]
    collected = pytest_with(site, *words, "tests/correctness/test_page_table.py").stdout
    assert "test_page_table" not in collected
    suite = [line for line in collected.splitlines() if "correctness/attention" in line]
    rows = [line for line in collected.splitlines() if "benchmarks/attention" in line]
    assert len(suite) > 200
    assert all("block_by_block" in line for line in suite)
    assert sum("block_by_block" in line for line in rows) * 4 == len(rows)  # beside three others


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_suite_runs_on_the_emulated_kernels_too():
    cases = "tests/correctness/attention/test_attention.py"
    done = pytest_with(ROOT, "--impl", "cuda-emulated", "-k", "strided", "-rs", cases)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout or "cuda-emulated: " in done.stdout


def test_what_is_wrong_with_a_name_is_one_sentence(site):
    done = pytest_with(site, "--impl", "block_by_blok", "tests")
    assert done.returncode == 4
    assert "no implementation 'block_by_blok'; known are cuda, triton, torch" in done.stderr
    assert "block_by_block" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_that_cannot_be_imported_is_named(site, tmp_path):
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    (broken / "own_kernel.py").write_text("import no_such_module\n")
    done = pytest_with(broken, "--impl", "block_by_block", "tests")
    assert done.returncode == 4
    assert "implementation 'block_by_block' of the package own-kernel cannot be" in done.stderr
    assert "No module named 'no_such_module'" in done.stderr


def collected_with(site, *words):
    """Names of the GPU's rows that a session with these words would time, and what it says."""
    rows = "tests/benchmarks/attention/bench_attention_gpu.py"
    done = pytest_with(site, "-m", "gpu", "--collect-only", *words, rows)
    found = [line.rpartition("[")[2] for line in done.stdout.splitlines() if "[" in line]
    return found, done.stderr


def test_shapes_of_one_s_own_are_timed_in_the_place_of_the_usual_ones(site):
    words = ["--shape", "decode-B2-300-h28x4", "--shape", "chunk-64-over-1k", "--shape"]
    rows, _ = collected_with(site, *words, "decode-B2-300-h28x4", "--impl", "block_by_block")
    assert rows[0] == "decode-B2-300-h28x4-block_by_block]"
    cases = [row.rpartition("-")[0] for row in rows]
    assert list(dict.fromkeys(cases)) == ["decode-B2-300-h28x4", "chunk-64-over-1k"]
    assert cases.count("chunk-64-over-1k") == len(cases) / 2 > 10


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("decode-2k", "--shape decode-2k is neither a row's nor like decode-B16-2k, verify4-B16"),
        ("decode-B1-2k-h9x2", "--shape decode-B1-2k-h9x2: num_query_heads must be a multiple"),
    ],
)
def test_a_shape_that_cannot_be_is_told_in_a_sentence(site, name, sentence):
    rows, told = collected_with(site, "--shape", name)
    assert rows == []
    assert sentence in told
    assert "Traceback" not in told
