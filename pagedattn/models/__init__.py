"""A small real model as a plain Hugging Face folder, made without a model hub.

``python tools/fetch_model.py`` is the command line. Importing this package imports neither torch
nor transformers; converting the weights does.
"""

from pagedattn.models.fetch import SMOLLM2, Source, default_folder, fetch_model
from pagedattn.models.folder import FetchError, is_complete

__all__ = ["SMOLLM2", "FetchError", "Source", "default_folder", "fetch_model", "is_complete"]
