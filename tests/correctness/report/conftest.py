"""Results as pytest-benchmark writes them, made up: an H100's, and bookkeeping on a CPU."""

import json
import statistics

import numpy as np
import pytest

from pagedattn.workloads import CPU_DECODE, CPU_PREFILL, DECODE, MIXED, PREFILL

H100_READ_GB_PER_S = 3087.0
_SPEED = {"triton": 0.93, "torch": 0.21, "sdpa_contiguous": 0.84, "flashinfer": 0.91}
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def make_stats(median_s, *, spread=0.02, rounds=20, with_data=True, seed=0):
    """Statistics of `rounds` samples around a median, the median exact."""
    noise = np.random.default_rng(seed).gamma(2.0, spread, rounds)
    samples = np.sort(median_s * (1 + noise))
    samples *= median_s / statistics.median(samples.tolist())
    data = samples.tolist()
    middle = len(data) // 2
    q1, q3 = statistics.median(data[:middle]), statistics.median(data[-middle:])
    stats = {
        "min": data[0],
        "max": data[-1],
        "mean": statistics.fmean(data),
        "stddev": statistics.stdev(data),
        "rounds": rounds,
        "median": median_s,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iterations": 1,
    }
    return stats | ({"data": data} if with_data else {})


def make_benchmark(name, median_s, *, spread=0.02, with_data=True, seed=0, **extra_info):
    """One entry of ``benchmarks``."""
    return {
        "group": extra_info.get("workload"),
        "name": f"bench_{name}",
        "fullname": f"tests/benchmarks/bench_made_up.py::bench_{name}",
        "params": None,
        "param": None,
        "extra_info": extra_info,
        "options": {},
        "stats": make_stats(median_s, spread=spread, with_data=with_data, seed=seed),
    }


def attention_benchmarks(shapes, implementations, *, device="cuda", with_data=True):
    """Rows whose times follow from a roofline, a launch cost and the implementation's speed."""
    made = []
    roof = H100_READ_GB_PER_S if device == "cuda" else 18.0
    peak = 700.0 if device == "cuda" else 0.09
    for i, shape in enumerate(shapes):
        limit = max(shape.kv_bytes / roof / 1e9, shape.flops / peak / 1e12)
        for j, implementation in enumerate(implementations):
            speed = _SPEED.get(implementation, 0.6) * (1 - 0.05 * ((i + j) % 3))
            median = limit / speed + (7e-6 if device == "cuda" else 4e-5)
            extra = {
                "area": "attention",
                "implementation": implementation,
                "workload": shape.name,
                "device": device,
                "kind": shape.kind,
                "batch": shape.num_sequences,
                "context": max(shape.kv_lengths),
                "num_query_heads": shape.num_query_heads,
                "num_kv_heads": shape.num_kv_heads,
                "head_size": shape.head_size,
                "block_size": shape.block_size,
                "dtype": shape.dtype,
                "bytes": shape.kv_bytes,
                "flops": shape.flops,
                "gb_per_s": shape.kv_bytes / median / 1e9,
                "tflop_per_s": shape.flops / median / 1e12,
                "limit_us": limit * 1e6,
                "error": 0.0019,
                "error_budget": 0.0041,
                "host_us": 23.5,
                "peak_memory_bytes": 3 * shape.kv_bytes,
            }
            if device == "cuda":
                extra["measured_read_gb_per_s"] = roof
                extra["share_of_bandwidth"] = shape.kv_bytes / median / 1e9 / roof
            name = f"attention[{implementation}-{shape.name}]"
            spread = 0.01 + 0.03 * ((i + j) % 4)
            made.append(
                make_benchmark(
                    name, median, spread=spread, with_data=with_data, seed=97 * i + j, **extra
                )
            )
    return made


def bookkeeping_benchmarks(*, with_data=True):
    made = []
    base = {"admit": 3.1e-3, "decode_step": 4.2e-4, "fork": 6e-5, "free": 9e-4}
    for num_sequences in (16, 256):
        for place, (operation, seconds) in enumerate(base.items()):
            for factor, implementation in ((1.0, "pagedattn"), (2.9, "vllm")):
                made.append(
                    make_benchmark(
                        f"{operation}[{implementation}-{num_sequences}]",
                        seconds * factor * num_sequences / 256,
                        spread=0.06,
                        with_data=with_data,
                        seed=place,
                        area="block_manager",
                        implementation=implementation,
                        workload="azure-conversation",
                        device="cpu",
                        operation=operation,
                        num_sequences=num_sequences,
                    )
                )
    for operation, seconds in (("padded", 1.3e-4), ("csr", 7e-5)):
        made.append(
            make_benchmark(
                f"{operation}[256]",
                seconds,
                with_data=with_data,
                area="page_table",
                implementation="pagedattn",
                workload="azure-conversation",
                device="cpu",
                operation=operation,
                num_sequences=256,
                length_distribution="azure",
            )
        )
    return made


def kv_write_benchmarks(*, with_data=True):
    return [
        make_benchmark(
            f"write[{implementation}-{tokens}]",
            seconds * tokens,
            with_data=with_data,
            area="kv_write",
            implementation=implementation,
            workload=f"kv-write-{tokens}-tokens",
            device="cuda",
            bytes=tokens * 8192,
        )
        for tokens in (256, 8192)
        for implementation, seconds in (("triton", 5.1e-9), ("index_put", 9.9e-9))
    ]


def make_file(benchmarks, *, gpu=True, uuid="aa", cpu="Example CPU 9000"):
    """A whole results file; `gpu` False is a machine without one."""
    own = {
        "machine": {
            "cpu": cpu,
            "gpu": "NVIDIA H100 80GB HBM3" if gpu else None,
            "gpu_uuid_sha256": uuid if gpu else None,
        },
        "gpu": {
            "name": "NVIDIA H100 80GB HBM3",
            "driver": "580.65.06",
            "cuda": "13.0",
            "memory_bytes": 85_017_624_576,
            "sm_clock_mhz": 1980.0,
            "sm_clock_max_mhz": 1980.0,
            "memory_clock_mhz": 2619.0,
            "power_limit_w": 700.0,
            "temperature_c": 41.0,
            "num_sms": 132,
            "l2_bytes": 52_428_800,
        }
        if gpu
        else None,
        "versions": {"python": "3.11.9", "torch": "2.13.0", "numpy": "2.3.1", "pagedattn": "0.1.0"},
        "measured": {
            "read_gb_per_s": H100_READ_GB_PER_S if gpu else None,
            "copy_gb_per_s": 3021.0 if gpu else None,
        },
        "num_cpus": 26,
    }
    return {
        "machine_info": {"node": "node", "cpu": {"brand_raw": cpu}, "pagedattn": own},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": benchmarks,
        "datetime": "2026-01-02T03:04:05.678901+00:00",
        "version": "5.3.1",
    }


class Made:
    """What the tests make files of."""

    benchmark = staticmethod(make_benchmark)
    file = staticmethod(make_file)

    @staticmethod
    def h100(*, with_data=True):
        shapes = DECODE + PREFILL + MIXED
        names = ("triton", "torch", "sdpa_contiguous", "flashinfer")
        return make_file(
            attention_benchmarks(shapes, names, with_data=with_data)
            + kv_write_benchmarks(with_data=with_data)
            + bookkeeping_benchmarks(with_data=with_data)
        )

    @staticmethod
    def cpu(*, with_data=True):
        names = ("torch", "sdpa_contiguous")
        rows = attention_benchmarks(
            CPU_DECODE + CPU_PREFILL, names, device="cpu", with_data=with_data
        )
        return make_file(rows + bookkeeping_benchmarks(with_data=with_data), gpu=False)

    @staticmethod
    def small():
        """Two workloads with known medians: 100 and 80 µs, then 300 and 400 µs."""
        rows = [
            make_benchmark(
                f"attention[{name}-{workload}]",
                microseconds * 1e-6,
                area="attention",
                implementation=name,
                workload=workload,
                device="cuda",
                kind="decode",
                batch=batch,
                context=4096,
                bytes=150_000_000,
                flops=600_000_000,
                error=0.001,
                error_budget=0.004,
                host_us=21.5,
            )
            for workload, batch, times in (
                ("decode-B1-4k", 1, (100, 80)),
                ("decode-B8-4k", 8, (300, 400)),
            )
            for name, microseconds in zip(("sdpa_contiguous", "triton"), times, strict=True)
        ]
        return make_file(rows)

    @staticmethod
    def peers():
        """Block managers beside each other, with known medians in µs, and their prefix caches."""
        calls = [
            ("admit", "caching", 256, {"pagedattn": 500, "from_lists": 800, "vllm": 2000}),
            ("free", "caching", 256, {"pagedattn": 300, "vllm": 200}),
            ("fork", "caching", 256, {"pagedattn": 40}),
        ]
        hits = {900: (45, 30, 150), 5000: (60, 60, 20)}
        calls += [
            ("replay", f"trace, {pool} blocks", None, {"pagedattn": 7e6, "vllm": 14e6})
            for pool in hits
        ]
        rows = []
        for operation, workload, num_sequences, times in calls:
            for name, microseconds in times.items():
                extra = {"num_sequences": num_sequences}
                if operation == "replay":
                    pool = int(workload.split()[1])
                    ours, theirs, evicted = hits[pool]
                    extra |= {
                        "pool_blocks": pool,
                        "num_requests": 1234,
                        "num_lookup_blocks": 200,
                        "num_hit_blocks": ours if name == "pagedattn" else theirs,
                        "num_repeated_blocks": 60,
                        "num_evicted_blocks": evicted,
                        "block_size": 512,
                    }
                if name == "vllm" and operation == "admit":
                    extra["hashing_us"] = 1500
                rows.append(
                    make_benchmark(
                        f"{operation}[{name}-{workload}]",
                        microseconds * 1e-6,
                        area="block_manager",
                        implementation=name,
                        workload=workload,
                        device="cpu",
                        operation=operation,
                        **extra,
                    )
                )
        return make_file(rows, gpu=False)

    @staticmethod
    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def made():
    return Made
