"""The commands of tools/ as modules, so that tests can replace what they call."""

import importlib.util
from pathlib import Path

TOOLS = Path(__file__).parents[3] / "tools"


def load_tool(name):
    """Return the module of a command that is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
