"""Which implementations the suite runs over, where, and how a case that one cannot take is told.

A test that takes `implementation` runs on this project's own and, on a GPU, on the peers; those
that `--impl` names replace all of them. `@pytest.mark.implementations("triton", ...)` names others
for one test; "own" and "peers" stand for all of these. A peer has the cases in bfloat16, and so has
the reference on a GPU, where its code is the same as on a CPU; `--impl` gives it all.

`@pytest.mark.pairs(kind=KINDS, head_size=HEAD_SIZES, ...)` runs a test where each value of an axis
meets each of every other, and with `--nightly` on every combination, unless `nightly=False`. The
axis `on` has pairs of device and dtype; each device has rows of its own.
"""

import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from pagedattn.attention import UnsupportedError, attention, get_implementation, write_kv
from pagedattn.peers import FLASHINFER_KERNELS, PEERS
from pagedattn.testing import finite, pairwise

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
OWN = ("reference", "torch", "triton", *(["cuda"] if HOPPER else []))
"""The project's own implementations, which have to support every feature."""

FP8_CAPABILITY = (8, 9)
"""The exception: older GPUs have no fp8, and Triton none on them."""


OWN_THAT_ROUND = ("cuda_fp8",) if HOPPER else ()
"""Those that are right in a lower type only, and support what is faster in it."""

GROUPS = {
    "own": OWN,
    "rounding": OWN_THAT_ROUND,
    "peers": PEERS if torch.cuda.is_available() else (),
}
"""What a marker's words stand for; no peer runs without a GPU."""


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """Folder of compiled kernels, empty."""
    monkeypatch.setenv("PAGEDATTN_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture(scope="session")
def nvrtc():
    """Skip where the compiler's library is missing; the tests' modules ask for the packages."""
    from pagedattn.attention.cuda import compiler

    try:
        compiler.compiler_version()
    except RuntimeError as error:
        pytest.skip(f"NVRTC cannot be loaded: {error}")


@pytest.hookimpl(tryfirst=True)  # before fixtures' parameters, so that a name is always the same
def pytest_generate_tests(metafunc):
    """Run each test over all implementations that are under test, and over rows of its axes."""
    if "implementation" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("implementations")
        words = marker.args if marker else ("own", "peers")
        usual = [name for word in words for name in GROUPS.get(word, (word,))]
        metafunc.parametrize("implementation", metafunc.config.option.impl or usual)
    for marker in metafunc.definition.iter_markers("pairs"):
        axes = dict(marker.kwargs)
        every = axes.pop("nightly", True) and metafunc.config.option.nightly
        metafunc.parametrize(list(axes), list(rows_of(axes, every)))


def rows_of(axes, every):
    """Yield rows in which each two values meet and, if `every`, the others, marked nightly.

    Args:
        axes: values of each argument, or values by their names; those of `on` are (device, dtype).
        every: whether to yield all combinations.

    """
    named = {
        name: list(values.items())
        if isinstance(values, dict)
        else [("-".join(map(str, v)) if isinstance(v, tuple) else str(v), v) for v in values]
        for name, values in axes.items()
    }
    devices = dict.fromkeys(device for _, (device, _) in named.get("on", ()))
    for device in devices or [None]:
        here = dict(named)
        if device is not None:
            here["on"] = [(name, on) for name, on in named["on"] if on[0] == device]
        ids = [[name for name, _ in values] for values in here.values()]
        values = [dict(axis) for axis in here.values()]
        usual = pairwise(*ids)
        others = set(itertools.product(*ids)) - set(usual) if every else ()
        for row in [*dict.fromkeys(usual), *sorted(others)]:
            marks = [pytest.mark.gpu] * (device == "cuda") + [pytest.mark.nightly] * (row in others)
            found = (axis[name] for axis, name in zip(values, row, strict=True))
            yield pytest.param(*found, id="-".join(row), marks=marks)


def pytest_collection_modifyitems(config, items):
    if config.option.impl is None:
        here = Path(__file__).parent
        items[:] = [item for item in items if here not in item.path.parents or _is_usual(item)]


def _is_usual(item):
    """Whether a session without --impl has this case."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    name = params.get("implementation", "")
    device, dtype = params.get("on", (params.get("device", "cuda"), params.get("dtype")))
    if name == "reference":
        return device == "cpu" or dtype in (None, "bfloat16", torch.bfloat16)
    if name not in PEERS:
        return isinstance(name, str)  # else the test has none
    if item.get_closest_marker("nightly") or device == "cpu":
        return False
    # cases without `on` are in float16, for which FlashInfer would compile everything again
    usual = "float16" if name in FLASHINFER_KERNELS else "bfloat16"
    return "feature" in params or params.get("on", ("cuda", usual)) == ("cuda", "bfloat16")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def require(implementation, device):
    """Skip where an implementation cannot run at all."""
    if implementation in ("cuda", "cuda_fp8") and device == "cpu":
        pytest.skip("its kernels need a GPU")
    if implementation == "triton":
        pytest.importorskip("triton")
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("beside a GPU, Triton compiles for it and does not interpret")


def skip_unsupported(implementation, call):
    """Skip a case that an implementation cannot take, with its phrase; its own must take all.

    Raises:
        Failed: the project's own implementation says that it cannot.

    """
    reason = get_implementation(implementation).unsupported(call)
    if reason is None:
        return
    old_gpu = call.query.is_cuda and torch.cuda.get_device_capability() < FP8_CAPABILITY
    if implementation in OWN and not (old_gpu and "fp8" in call.features):
        pytest.fail(f"{implementation} cannot take a listed feature: {reason}")
    pytest.skip(f"{implementation}: {reason}")


@pytest.fixture
def runnable(request, implementation, device):
    """Skip where the implementation cannot run at all, and wait for what it needs compiled."""
    require(implementation, device)
    if implementation in FLASHINFER_KERNELS:
        request.getfixturevalue("flashinfer_modules")


@pytest.fixture
def attend(request):
    """Function that runs a case through an implementation, or skips it; see its docstring."""

    def run(inputs, implementation, *, out=None, return_lse=False, scale=None):
        """Attend over the inputs; `out` is filled with NaN first unless given.

        Returns what `attention` does. Unused slots are zeros for an implementation that asks for
        it.
        """
        require(implementation, inputs.query.device.type)
        if implementation in FLASHINFER_KERNELS:
            request.getfixturevalue("flashinfer_modules")
        made = get_implementation(implementation)
        lse = torch.empty(inputs.query.shape[:2], device=inputs.query.device)
        call = inputs.call(lse=lse if return_lse else None, scale=scale)
        skip_unsupported(implementation, call)
        if out is None:
            out = torch.full_like(inputs.query, torch.nan)
        needs_finite = getattr(made, "reads_unused_slots", False)
        with finite(inputs.cache) if needs_finite else nullcontext():
            return _or_skip(
                attention,
                inputs.query,
                inputs.cache,
                inputs.batch,
                out=out,
                return_lse=return_lse,
                scale=scale,
                implementation=implementation,
                **inputs.options,
            )

    return run


def _or_skip(function, *args, implementation, **options):
    """Call, and skip what an implementation other than the project's own refuses only then."""
    try:
        return function(*args, implementation=implementation, **options)
    except UnsupportedError as refusal:
        if implementation in OWN:
            raise
        pytest.skip(f"{implementation}: {refusal}")


@pytest.fixture
def write():
    """`write_kv`, skipped where the implementation cannot run."""

    def run(key, value, cache, slots, *, implementation):
        require(implementation, key.device.type)
        outside = (slots < 0) | (slots >= cache.num_slots)
        if outside.any() and not getattr(get_implementation(implementation), "checks_slots", True):
            pytest.skip(f"{implementation}: it does not check slots")
        _or_skip(write_kv, key, value, cache, slots, implementation=implementation)

    return run
