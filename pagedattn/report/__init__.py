"""From a benchmark's results file to a table, plots and a markdown report.

`load` reads results into a pandas table; ``python tools/plot.py`` draws them. Importing this
package imports neither torch nor pandas nor matplotlib.
"""

from pagedattn.report.results import load
from pagedattn.report.rows import ResultsError

__all__ = ["ResultsError", "load"]
