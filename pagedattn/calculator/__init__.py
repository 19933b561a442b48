"""What a paged KV cache saves: waste, users that fit, and a shared prompt, counted.

The calculator runs no model. It fills the project's own reservations and block manager with
requests and counts their slots and blocks; the formulas beside the counts say what was to be
expected. `python tools/paged_attention_benchmark.py --help` is its command line, and
`pagedattn.calculator.result` says the shape of its JSON.
"""

from pagedattn.calculator.result import Calculation
from pagedattn.calculator.settings import Budget, Settings
from pagedattn.calculator.workload import Workload, workload_names

__all__ = ["Budget", "Calculation", "Settings", "Workload", "workload_names"]
