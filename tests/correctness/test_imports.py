"""Imports point down, and bookkeeping starts without torch."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pagedattn

ROOT = Path(pagedattn.__file__).parent
# each layer may import those before it
LAYERS = [
    {"config", "sequence"},
    {"memory", "block_manager", "workloads", "hardware"},
    {"page_table", "reservation", "block_copy", "device"},
    {"shared_prefix"},
    {"kv_cache"},
    {"attention", "kv_swap"},
    {"testing", "peers", "report"},
    {"benchmarking", "calculator", "models"},
    {"serving"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
WITHOUT_TORCH = [
    "pagedattn",
    "pagedattn.config",
    "pagedattn.memory",
    "pagedattn.sequence",
    "pagedattn.block_manager",
    "pagedattn.page_table",
    "pagedattn.shared_prefix",
    "pagedattn.workloads",
    "pagedattn.reservation",
    "pagedattn.report",
    "pagedattn.report.cli",
    "pagedattn.report.concepts",
    "pagedattn.report.html",
    "pagedattn.hardware",
    "pagedattn.calculator",
    "pagedattn.calculator.cli",
    "pagedattn.serving.cli",
    "pagedattn.models",
    "pagedattn.models.cli",
]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_it_is_imported_without_torch_pandas_or_matplotlib(module):
    code = (
        f"import sys, {module}; heavy = 'torch', 'pandas', 'matplotlib', 'triton', 'jinja2'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert answer.stdout.strip() == "[]"


def runtime_imports(path):
    """Names of the modules that a file imports when it runs, not for type checking."""

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return list(visit(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_point_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in runtime_imports(path):
        if not module.startswith("pagedattn.") or own == "__init__":
            continue
        other = module.split(".")[1]
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{own} imports {module}"


def test_the_fast_implementations_do_not_know_the_reference():
    for path in [ROOT / "attention" / "torch_impl.py", *(ROOT / "attention/triton").glob("*.py")]:
        assert "pagedattn.attention.reference" not in runtime_imports(path)


def test_every_public_name_is_there():
    for package in (
        "pagedattn",
        "pagedattn.attention",
        "pagedattn.reservation",
        "pagedattn.testing",
        "pagedattn.workloads",
    ):
        module = importlib.import_module(package)
        assert all(getattr(module, name) is not None for name in module.__all__)
        assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pagedattn.nothing
