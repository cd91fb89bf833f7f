"""The house stays one in which a function fits a screen and a class a few."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lightning_modules", "datamodules", "callbacks", "experiments")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(("kind", "most"), [(ast.FunctionDef, 60), (ast.ClassDef, 250)])
def test_no_function_and_no_class_is_longer_than_one_can_read(kind, most):
    long = [
        f"{file.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, kind) and node.end_lineno - node.lineno + 1 > most
    ]
    assert FILES
    assert long == []
