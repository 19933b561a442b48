"""GPUs in numbers: memory, bandwidth and arithmetic, by name or of the machine this runs on.

Sources: NVIDIA's data sheets, of the SXM modules where there are several. The memory is the printed
one, in GiB; a driver keeps 1 to 2 % of it for itself.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from reprlib import repr as short_repr

from pagedattn.config import ConfigError

GIB = 2**30
_MOST_GIB = 1 << 10


@dataclass(frozen=True, slots=True)
class GPU:
    """What a calculation needs to know of a GPU.

    ``bandwidth`` is in bytes a second, ``flops`` the dense rate of its matrix units in 16 bits,
    operations a second; ``None`` where they are not known.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    flops: float | None = None


def gpu_names() -> tuple[str, ...]:
    """Return the names that :func:`find_gpu` knows."""
    return tuple(_PRESETS)


def find_gpu(name: str) -> GPU:
    """Return a GPU by its name, in any case of letters, or a GPU of so many GiB.

    >>> find_gpu("A100").memory_bytes // GIB, find_gpu("48").memory_bytes // GIB
    (80, 48)

    Raises :class:`pagedattn.config.ConfigError`, which names the known ones.
    """
    key = name.strip().lower()
    key = _ALIASES.get(key, key)
    if key in _PRESETS:
        return _PRESETS[key]
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?: ?gib)?", key, re.ASCII)
    if number is None or not 0 < float(number[1]) <= _MOST_GIB:
        raise ConfigError(
            f"gpu must be one of {', '.join(_PRESETS)} or a number of GiB up to {_MOST_GIB}, "
            f"not {short_repr(name)}."
        )
    return GPU(f"{float(number[1]):g} GiB", math.floor(float(number[1]) * GIB))


def own_gpu() -> GPU | None:
    """Return the first CUDA GPU of this machine as torch sees it, or ``None``."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    known = _BY_PRODUCT.get(seen.name, GPU(seen.name, seen.total_memory))
    return replace(known, name=seen.name, memory_bytes=seen.total_memory)


# name: memory in GiB, bandwidth in GB/s, dense 16-bit matrix rate in TFLOP/s
_PRESETS = {
    name: GPU(name, gib * GIB, bandwidth * 1e9, tflops * 1e12)
    for name, (gib, bandwidth, tflops) in {
        "v100-16gb": (16, 900, 125),
        "v100-32gb": (32, 900, 125),
        "a100-40gb": (40, 1555, 312),
        "a100-80gb": (80, 2039, 312),
        "h100-80gb": (80, 3350, 989),
        "h200-141gb": (141, 4800, 989),
        "rtx-4090": (24, 1008, 165),
    }.items()
}

_ALIASES = {
    "v100": "v100-32gb",
    "a100": "a100-80gb",
    "h100": "h100-80gb",
    "h200": "h200-141gb",
    "rtx4090": "rtx-4090",
    "4090": "rtx-4090",
}

# names as torch gives them; boards of other names have other rates
_BY_PRODUCT = {
    "Tesla V100-SXM2-16GB": _PRESETS["v100-16gb"],
    "Tesla V100-SXM2-32GB": _PRESETS["v100-32gb"],
    "NVIDIA A100-SXM4-40GB": _PRESETS["a100-40gb"],
    "NVIDIA A100-SXM4-80GB": _PRESETS["a100-80gb"],
    "NVIDIA H100 80GB HBM3": _PRESETS["h100-80gb"],
    "NVIDIA H200": _PRESETS["h200-141gb"],
    "NVIDIA GeForce RTX 4090": _PRESETS["rtx-4090"],
}
