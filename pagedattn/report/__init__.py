"""From a benchmark's results file to a table, plots and a markdown report.

`load` reads results into a pandas table, whose columns `DEFINITIONS` defines; ``python
tools/plot.py`` draws them and writes the table too, which `read_csv` reads back. Importing this
package imports neither torch nor pandas nor matplotlib.
"""

from pagedattn.report.columns import DEFINITIONS
from pagedattn.report.data import read_csv
from pagedattn.report.results import load
from pagedattn.report.values import ResultsError

__all__ = ["DEFINITIONS", "ResultsError", "load", "read_csv"]
