"""The tidy table: rows as a DataFrame, and as ``rows.csv`` and ``rows.parquet``."""

from __future__ import annotations

import json
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from pagedattn.report.columns import DEFINITIONS, SAMPLES_COLUMN, TEXT

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    import pandas as pd

    from pagedattn.report.results import Run
    from pagedattn.report.rows import Row

CSV_NAME = "rows.csv"
PARQUET_NAME = "rows.parquet"
METADATA_KEY = b"pagedattn"
_FORMULA = ("=", "+", "-", "@", "'")
_TEXTS = [name for name, column in DEFINITIONS.items() if column.dtype == TEXT]


def to_frame(rows: tuple[Row, ...]) -> pd.DataFrame:
    """Return the table that `load` documents, of these rows in their order."""
    import pandas as pd

    values = zip(*map(attrgetter(*DEFINITIONS), rows), strict=True)
    columns = zip(DEFINITIONS.items(), values, strict=True)
    return pd.DataFrame(
        {name: pd.Series(each, dtype=column.dtype) for (name, column), each in columns}
    )


def write_tables(run: Run, folder: Path) -> None:
    """Write ``rows.csv`` and ``rows.parquet`` into a folder; the same run gives the same bytes.

    The Parquet file has the rounds' times as a last column, and in the schema's metadata under
    ``pagedattn`` what each results file says of its machine, as JSON. Raises ImportError without
    pandas or pyarrow.
    """
    import pyarrow as pa
    from pyarrow import parquet

    frame = to_frame(run.rows)
    _for_spreadsheets(frame).to_csv(folder / CSV_NAME, index=False, lineterminator="\n")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    fields = [
        table.schema.field(name).with_metadata({"unit": column.unit, "meaning": column.meaning})
        for name, column in DEFINITIONS.items()
    ]
    samples = pa.array([list(row.samples_us) for row in run.rows], pa.list_(pa.float64()))
    about = {"unit": SAMPLES_COLUMN.unit, "meaning": SAMPLES_COLUMN.meaning}
    fields.append(pa.field(SAMPLES_COLUMN.name, samples.type, metadata=about))
    metadata = {**(table.schema.metadata or {}), METADATA_KEY: environment(run).encode()}
    table = pa.Table.from_arrays(
        [*table.columns, samples], schema=pa.schema(fields, metadata=metadata)
    )
    parquet.write_table(table, folder / PARQUET_NAME, compression="zstd", write_statistics=False)


def read_csv(path: str | PathLike[str]) -> pd.DataFrame:
    """Read a ``rows.csv`` that this project wrote: the table as `load` returned it.

    Raises what `pandas.read_csv` does where the file is none.
    """
    import pandas as pd

    # from 3.1 on, pandas reads what it wrote to the last bit, and warns of the option
    old = tuple(int(part) for part in pd.__version__.split(".")[:2]) < (3, 1)
    options: dict[str, Any] = {"float_precision": "round_trip"} if old else {}
    frame: pd.DataFrame = pd.read_csv(
        path,
        dtype={name: column.dtype for name, column in DEFINITIONS.items()},
        keep_default_na=False,
        na_values=[""],
        **options,
    )
    for name in _TEXTS:
        frame[name] = frame[name].str.removeprefix("'")
    return frame


def environment(run: Run) -> str:
    """Return what the files say of their machines: a JSON list, an object a file."""
    files = [{"file": file.name, "environment": dict(file.about)} for file in run.files]
    return json.dumps(files, ensure_ascii=False)


def _for_spreadsheets(frame: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before text that a spreadsheet would take for a formula or for quoted."""
    guarded = {}
    for name in _TEXTS:
        risky = frame[name].str.startswith(_FORMULA).fillna(False).astype(bool)
        if risky.any():
            guarded[name] = frame[name].mask(risky, "'" + frame[name])
    return frame.assign(**guarded)
