"""What SOSP '23 ran on an A100 of 40 GB, for the figures that compare systems."""

from __future__ import annotations

from pagedattn.config import ModelConfig
from pagedattn.memory import kv_bytes_per_token
from pagedattn.reservation import StepTime

OPT_13B = ModelConfig.preset("opt-13b")
KV_GIB = 12
"""What the weights leave for K and V (Table 1)."""

NUM_SLOTS = (KV_GIB << 30) // kv_bytes_per_token(OPT_13B)
MAX_MODEL_LEN = 2048

STEP_TIME = StepTime(
    fixed=0.034,
    per_sequence=0.2e-3,
    per_token=2 * (OPT_13B.num_parameters or 0) / 312e12,
    per_stored_token=kv_bytes_per_token(OPT_13B) / 1.555e12,
    per_offloaded_slot=kv_bytes_per_token(OPT_13B) / 16e9,
)
"""The A100's float16 rate, its memory's and a PCIe bus's bandwidth, and two numbers fitted to the
vLLM of Figure 13 (`tests/claims/test_paper_batch_sizes.py`)."""

LABELS = {
    "fastertransformer": "FasterTransformer",
    "orca-max": "Orca (Max)",
    "orca-pow2": "Orca (Pow2)",
    "orca-oracle": "Orca (Oracle)",
    "transformers": "HF Transformers",
    "tgi": "TGI (2023)",
    "flexgen": "FlexGen",
    "paged": "PagedAttention",
}
