"""Page tables made by hand."""

import numpy as np

from pagedattn import PageTable


def page_table(lengths, block_size=4):
    """Sequences of these lengths, each in blocks of its own, one after the other."""
    lengths = np.array(lengths)
    width = max(1, int(-(-lengths.max(initial=0) // block_size)))
    tables = np.arange(lengths.size * width, dtype=np.int32).reshape(lengths.size, width)
    return PageTable(block_size, tables, lengths)
