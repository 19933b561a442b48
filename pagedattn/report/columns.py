"""The columns of the tidy table: one definition, for the code, the files and docs/DATA.md."""

from __future__ import annotations

from dataclasses import dataclass

TEXT, COUNT, REAL, SAMPLES = "string", "Int64", "float64", "list of float64"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its name, pandas dtype, unit (``-`` for none) and what it says."""

    name: str
    dtype: str
    unit: str
    meaning: str


def _make(dtype: str, unit: str, /, **meanings: str) -> tuple[Column, ...]:
    return tuple(Column(name, dtype, unit, meaning) for name, meaning in meanings.items())


_ALL = (
    *_make(
        TEXT,
        "-",
        area="Part of the project that was timed, such as `attention` or `block_manager`.",
        device="Where it ran: `cuda`, `cpu`, or `unknown`.",
        implementation="Name of the implementation.",
        workload="Name of the case, the same for all implementations of it.",
        kind="`decode`, `prefill` or `mixed`.",
        operation="Which call was timed, of bookkeeping.",
    ),
    *_make(COUNT, "sequences", batch="Sequences in one launch."),
    *_make(COUNT, "tokens", context="Tokens of the longest sequence."),
    *_make(COUNT, "sequences", num_sequences="Sequences that the bookkeeping call was for."),
    *_make(TEXT, "-", length_distribution="Where sequence lengths come from."),
    *_make(
        COUNT,
        "heads",
        num_query_heads="Query heads of the layer.",
        num_kv_heads="Key-value heads of the layer.",
    ),
    *_make(COUNT, "elements", head_size="Elements of a head's vector."),
    *_make(COUNT, "tokens", block_size="Tokens in a block."),
    *_make(TEXT, "-", dtype="Type of the data's elements."),
    *_make(COUNT, "tokens", window="Most keys that a query sees; missing where it sees all."),
    *_make(REAL, "logits", soft_cap="Bound of the scores; missing without."),
    *_make(
        COUNT,
        "heads",
        alibi="Query heads with an ALiBi slope; missing without.",
        sinks="Query heads with an attention sink; missing without.",
    ),
    *_make(
        REAL,
        "µs",
        median_us="Median time of one launch or call over the rounds.",
        q1_us="Lower quartile of the rounds' times.",
        q3_us="Upper quartile of the rounds' times.",
        min_us="Shortest round's time.",
        max_us="Longest round's time.",
    ),
    *_make(COUNT, "rounds", rounds="Rounds that were timed."),
    *_make(
        COUNT, "rounds", discarded_rounds="Rounds left out, as the clock was below 75 % of usual."
    ),
    *_make(
        REAL,
        "fraction",
        median_interval="Half the width of the median's 95 % interval, over the median.",
    ),
    *_make(REAL, "MHz", sm_clock_mhz="Median clock of the multiprocessors, spun for and measured."),
    *_make(COUNT, "inputs", rotation="Inputs that launches went through in turn, to be cold."),
    *_make(REAL, "1e9 bytes/s", gb_per_s="`bytes` over the median."),
    *_make(
        REAL,
        "fraction",
        share_of_bandwidth="`gb_per_s` over `measured_read_gb_per_s`; 1 is all of it.",
    ),
    *_make(
        REAL,
        "1e9 bytes/s",
        measured_read_gb_per_s="Read bandwidth that was measured on this device.",
    ),
    *_make(REAL, "1e12 operations/s", tflop_per_s="`flops` over the median."),
    *_make(REAL, "µs", limit_us="Time that the measured roofs allow at best."),
    *_make(
        REAL,
        "the benchmark's own",
        error="Largest error against float64, found before timing.",
        error_budget="Error that was allowed.",
    ),
    *_make(
        REAL,
        "µs",
        host_us="Host's time of one eager launch.",
        batch_us="Time of bringing a step's page table to the device, host and GPU.",
        plan_us="Time of planning a step besides, before its first launch, host and GPU; as the "
        "difference of two times it can be below 0 by noise.",
        hashing_us="Part of the median that hashing took, where it is a step of its own.",
    ),
    *_make(REAL, "bytes", bytes="Bytes that must be moved at least."),
    *_make(REAL, "operations", flops="Floating-point operations."),
    *_make(REAL, "bytes", peak_memory_bytes="Most device memory in use while it ran."),
    *_make(COUNT, "blocks", pool_blocks="Blocks in the pool."),
    *_make(COUNT, "requests", num_requests="Requests that asked the prefix cache."),
    *_make(
        COUNT,
        "blocks",
        num_lookup_blocks="Blocks that the prefix cache was asked for.",
        num_hit_blocks="Blocks that the prefix cache had.",
        num_repeated_blocks="Blocks that a cache that forgets nothing would have had.",
        num_evicted_blocks="Blocks that the prefix cache evicted.",
    ),
    *_make(TEXT, "-", model="Model that a serving engine ran."),
    *_make(COUNT, "clients", num_users="Clients of the engine at a time."),
    *_make(REAL, "requests/s", requests_per_s="Requests that the engine finished a second."),
    *_make(
        REAL,
        "tokens/s",
        prompt_tokens_per_s="Prompt tokens that the engine took a second.",
        output_tokens_per_s="Output tokens that the engine made a second.",
    ),
    *(
        Column(f"{what}_p{rank}_us", REAL, "µs", f"{text}, {rank}th percentile.")
        for what, text in (
            ("first_token", "Time from sending a request to its first token"),
            ("inter_token", "Time between two tokens of an answer"),
        )
        for rank in (50, 90, 99)
    ),
    *_make(
        REAL,
        "fraction",
        prefix_hit_rate="Prompt tokens that the engine's prefix cache had.",
        last_block_waste="Slots of blocks in use that hold no token.",
    ),
    *_make(
        REAL,
        "bytes",
        device_bytes="Memory of the device.",
        in_use_bytes="Memory in use on the device.",
        weights_bytes="Memory of the weights, as the engine says.",
        kv_pool_bytes="Memory of the KV pool, as the engine says.",
        graphs_bytes="Memory of CUDA graphs, as the engine says.",
        predicted_weights_bytes="Memory of the weights by the calculator.",
        predicted_kv_pool_bytes="Memory of the KV pool by the calculator.",
    ),
    *_make(
        COUNT,
        "blocks",
        predicted_blocks="Blocks in the pool by the calculator, from the device's memory.",
        predicted_pool_blocks="Blocks in the pool by the calculator, from the pool's bytes.",
        peak_blocks="Most blocks that the engine had in use.",
        expected_peak_blocks="Most blocks in use by this project's block manager.",
    ),
    *_make(
        COUNT,
        "steps",
        compared_steps="Steps after which the blocks in use of both were compared.",
        equal_steps="Steps after which both had the same blocks in use.",
    ),
    *_make(
        TEXT,
        "-",
        fullname="The benchmark's full name in pytest.",
        file="Name of the results file.",
    ),
)

DEFINITIONS: dict[str, Column] = {column.name: column for column in _ALL}
"""The definition of each column of the table, in order."""

SAMPLES_COLUMN = Column(
    "samples_us", SAMPLES, "µs", "Time of each round, in order; empty where the file has none."
)
"""The last column of the Parquet file, which the CSV and `load` leave out."""
