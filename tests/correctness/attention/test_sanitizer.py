"""The CUDA kernels read and write what they may, in order: compute-sanitizer watches them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .sanitized import CASES

ROOT = Path(__file__).parents[3]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.nightly,
    pytest.mark.skipif(not HOPPER, reason="the kernels are for Hopper GPUs"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("case", CASES)
def test_small_cases_are_clean(case, tool):
    words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # PyTorch's own kernels are not looked at
    words += ["--kernel-name-exclude", "kernel_substring=at::"]
    # the bindings ask the driver for functions that it may not have
    words += ["--report-api-errors", "no"]
    # each tensor an allocation of its own, past whose end is nothing
    own = {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*words, sys.executable, "-m", "tests.correctness.attention.sanitized", case],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{case} is right" in done.stdout.splitlines(), done.stdout
