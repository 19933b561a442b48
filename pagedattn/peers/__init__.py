"""Other ways to do the same work, measured beside this project's own.

Each says of given inputs whether it can take them and, if not, why.
"""

from pagedattn.peers.contiguous import IndexPut, SdpaContiguous

__all__ = ["IndexPut", "SdpaContiguous"]
