"""Results files of made-up rows, and the comparison of two of them."""

import json

import numpy as np

from pagedattn.report.compare import compare
from pagedattn.report.results import load_run

ROUNDS = 30


def benchmark(name, samples, *, keep=True):
    seconds = sorted(float(s) for s in samples)
    q1, median, q3 = np.percentile(seconds, (25, 50, 75)).tolist()
    stats = {"min": seconds[0], "q1": q1, "median": median, "q3": q3, "max": seconds[-1]}
    stats |= {"rounds": len(seconds)} | ({"data": list(map(float, samples))} if keep else {})
    extra = {"area": "attention", "implementation": "triton", "workload": name, "device": "cuda"}
    return {"fullname": f"tests/x.py::{name}", "extra_info": extra, "stats": stats}


def run_file(path, rows, *, keep=True, cpu="Xeon", others=0):
    benchmarks = [benchmark(name, samples, keep=keep) for name, samples in rows.items()]
    benchmarks += [{"fullname": f"other{i}", "extra_info": {}, "stats": {}} for i in range(others)]
    info = {"pagedattn": {"machine": {"cpu": cpu, "gpu": None}}}
    path.write_text(json.dumps({"machine_info": info, "benchmarks": benchmarks}))
    return path


def measured(seed, *, noise=0.01, rows=40, factors=None, rounds=ROUNDS):
    """Times of rows between 2 µs and 2 ms, each with a relative noise."""
    true = np.geomspace(2e-6, 2e-3, rows)
    rng = np.random.default_rng(seed)
    return {
        f"row{i}": time
        * (factors or {}).get(f"row{i}", 1.0)
        * (1 + noise * rng.normal(size=rounds))
        for i, time in enumerate(true)
    }


def compared(tmp_path, before, after, **options):
    paths = [
        run_file(tmp_path / f"{name}.json", rows, **options)
        for name, rows in (("before", before), ("after", after))
    ]
    return compare(*(load_run([path]) for path in paths))
