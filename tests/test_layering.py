"""Imports go one way: tests and benchmarks -> engine -> kernels -> the extension."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted(
    p for d in ("engine", "kernels", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py")
)


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports; relative imports resolved as the package is installed."""
    folder = path.relative_to(ROOT).parent.parts
    package = ["leangpt", *(folder if folder[0] == "kernels" else folder[1:])]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imported_modules(path):
        top = name.split(".")[0]
        assert top not in ("engine", "kernels"), (
            f"import {name} as leangpt..., or two copies of it exist"
        )
        if layer == "kernels" and top == "leangpt":
            assert name.startswith("leangpt.kernels"), f"kernels must not know the engine: {name}"
        if layer == "engine":
            assert top != "transformers", "oracles are for tests"
        if top == "triton":
            assert layer in ("tests", "benchmarks") or path.name.startswith("triton_")


def test_transformers_is_importable_from_the_clone():
    """`./kernels` must not be taken for Hugging Face's package `kernels`, which transformers looks for."""
    program = "import sys, transformers.integrations.hub_kernels; sys.exit('kernels' in sys.modules and sys.modules['kernels'].__file__.startswith(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)],
        cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert run.returncode == 0
    assert not any(Path(p or ".").resolve() == ROOT for p in sys.path), (
        "plain pytest: see conftest.py"
    )
