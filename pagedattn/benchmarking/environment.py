"""Which machine a run was on, so that a reader knows what its numbers can be compared with."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "ecc": "ecc.mode.current",
    "mig": "mig.mode.current",
    "uuid": "uuid",
}
_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pagedattn",
    "pytest-benchmark",
    "vllm",
    "flashinfer-python",
)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def query_gpu() -> dict[str, Any] | None:
    """State of the first GPU as nvidia-smi reports it, or None without one.

    Returns:
        name, driver, memory_mib, sm_clock_mhz, sm_clock_max_mhz, memory_clock_mhz,
        power_limit_w, temperature_c, ecc, mig, uuid_sha256 (the id itself is not kept), and where
        it can be asked clocks_held_back, in words.

    """
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_GPU_FIELDS.values())}",
        "--format=csv,noheader,nounits",
        "--id=0",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    held_back = _clocks_held_back()
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    if len(values) != len(_GPU_FIELDS):
        return None
    gpu: dict[str, Any] = dict(zip(_GPU_FIELDS, map(_number, values), strict=True))
    gpu["uuid_sha256"] = hashlib.sha256(str(gpu.pop("uuid")).encode()).hexdigest()
    gpu["name"], gpu["driver"] = values[0], values[1]
    if held_back is not None:
        gpu["clocks_held_back"] = held_back
    return gpu


# bits of what keeps clocks down (nvml.h, nvmlClocksEventReason*)
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}


def _clocks_held_back() -> str | None:
    """What keeps the first GPU's clocks down now, in words; None if it cannot be asked."""
    for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # new, old name
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
            bits = int(answer.stdout.strip(), 16)
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
        return ", ".join(word for bit, word in _REASONS.items() if bits & bit) or "nothing"
    return None


def query_cpu() -> dict[str, Any]:
    """State of the CPU, as far as the system tells.

    Returns:
        load_1min: processes that wanted to run, a mean over the last minute; governor: how the
        first core's clock is chosen; mhz: that clock now.

    """
    cpu: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        cpu["load_1min"] = os.getloadavg()[0]
    clock = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    with contextlib.suppress(OSError, ValueError):
        cpu["governor"] = (clock / "scaling_governor").read_text(encoding="utf-8").strip()
        cpu["mhz"] = int((clock / "scaling_cur_freq").read_text(encoding="utf-8")) / 1000
    return cpu


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """Describe machine and packages for a results file.

    Returns:
        machine: what tells machines apart (cpu, gpu, gpu_uuid_sha256); gpu: None, or
        `query_gpu` with cuda, num_sms, l2_bytes and memory_bytes; versions; num_cpus; num_threads
        that PyTorch computes with on a CPU; cpu, which is `query_cpu`.

    """
    import torch  # here: what is said of a GPU or a CPU alone needs none

    gpu = query_gpu()
    if gpu is not None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu["cuda"] = torch.version.cuda
        gpu["num_sms"] = properties.multi_processor_count
        gpu["l2_bytes"] = properties.L2_cache_size
        gpu["memory_bytes"] = properties.total_memory
    return {
        "machine": {
            "cpu": _cpu_name(),
            "gpu": gpu["name"] if gpu else None,
            "gpu_uuid_sha256": gpu["uuid_sha256"] if gpu else None,
        },
        "gpu": gpu,
        "versions": _versions(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cpu": query_cpu(),
    }


def machine_identity(machine_info: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a results file's `machine_info` that tells machines apart."""
    own = machine_info.get("pagedattn")
    if isinstance(own, dict) and isinstance(own.get("machine"), dict):
        return dict(own["machine"])
    cpu = machine_info.get("cpu")
    return {
        "cpu": cpu.get("brand_raw") if isinstance(cpu, dict) else None,
        "node": machine_info.get("node"),
    }
