"""The architecture page as tests: who imports whom, one signature per operation, nothing unsafe."""

from __future__ import annotations

import ast
import inspect
import re
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch

from zsq_fast import ops, reference
from zsq_fast.ops.schemas import SCHEMAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zsq_fast"
ALLOWED = {
    "errors": set(),
    "_build": set(),
    "reference": set(),
    "ops": {"errors", "_build"},
    "losses": {"ops", "errors"},
    "optim": {"ops", "errors"},
    "nn": {"ops", "errors"},
    "models": {"errors"},
    "data": {"errors"},
    "runs": {"errors"},
    "papers": {"errors"},
    "methods": {"nn", "optim", "losses", "ops", "runs", "errors"},
    "analysis": {"methods", "nn", "losses", "ops", "runs", "errors"},
    "report": {"methods", "runs", "papers", "errors"},
    "live": {"report", "methods", "nn", "runs", "errors"},
}


def imports(source: str, package: str) -> set[str]:
    """First-level names of ours that a module inside `package` imports; "zsq_fast" where it gets hold of everything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            found += [f"{origin}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):  # `import zsq_fast.ops` binds zsq_fast, with `as` it binds ops
            found += [name for a in node.names for name in ([a.name] if a.asname else [a.name, a.name.split(".")[0]])]
    ours = [name.split(".") for name in found if name.split(".")[0] == "zsq_fast"]
    return {parts[1] if len(parts) > 1 else parts[0] for parts in ours}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from zsq_fast.runs.directory import x", "zsq_fast.nn", {"runs"}),
        ("from zsq_fast import ops, runs as r", "zsq_fast.nn", {"ops", "runs"}),
        ("from ..runs import x\nfrom .layers import y", "zsq_fast.nn", {"runs", "nn"}),
        ("from .. import runs", "zsq_fast.nn", {"runs"}),
        ("def f():\n    from .runs import x", "zsq_fast", {"runs"}),
        ("import zsq_fast", "zsq_fast.nn", {"zsq_fast"}),
        ("import zsq_fast as z", "zsq_fast.nn", {"zsq_fast"}),
        ("import zsq_fast.runs", "zsq_fast.nn", {"runs", "zsq_fast"}),
        ("import zsq_fast.runs as r, torch", "zsq_fast.nn", {"runs"}),
        ("import torch.nn\nfrom torch import ops", "zsq_fast.nn", set()),
    ],
)
def test_imports_are_seen_in_every_form(source, package, expected):
    assert imports(source, package) == expected


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_import_directions(package):
    files = (
        [PACKAGE / f"{package}.py"] if (PACKAGE / f"{package}.py").exists() else list((PACKAGE / package).rglob("*.py"))
    )
    assert files
    for file in files:
        within = ".".join(file.parent.relative_to(ROOT).parts)
        extra = imports(file.read_text(), within) - ALLOWED[package] - {package}
        assert not extra, (
            f"{file.relative_to(ROOT)} imports {sorted(extra)}; docs/architecture.md allows {sorted(ALLOWED[package])}"
        )


def test_every_package_has_a_rule():
    rooms = {
        p.stem
        for p in PACKAGE.iterdir()
        if (p.suffix == ".py" or (p / "__init__.py").exists()) and p.stem != "__init__"
    }
    assert rooms - {"cli", "demo"} == set(ALLOWED)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.split("(")[0])
def test_reference_has_the_signature_of_the_schema(schema):
    name = schema.split("(")[0]
    op = getattr(torch.ops.zsq, name).default
    assert list(inspect.signature(getattr(reference, name)).parameters) == [a.name for a in op._schema.arguments]
    for device in ("cpu", "cuda"):
        assert any(f'm.impl("{name}"' in f.read_text() for f in (ROOT / "csrc" / "ops").glob(f"*/{device}.inc")), device


def test_public_operations_are_documented():
    for name in ops.__all__:
        assert len(inspect.getdoc(getattr(ops, name)) or "") > 40, name


def test_kernels_include_no_torch_headers():
    for folder in ("cpu", "cuda"):
        for file in (ROOT / "csrc" / folder).iterdir():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text()), file


def test_every_launch_names_its_stream():
    """A kernel on the default stream races with the caller's; <<<>>> without a stream is how that happens."""
    for file in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert "<<<" not in file.read_text(), f"{file.name}: launch through launch.h, which takes the stream"
    assert "CUDAGuard" in (ROOT / "csrc" / "ops" / "cuda.cpp").read_text()


def test_the_formatter_sees_every_native_source():
    (pattern,) = re.findall(r"files: (\\\..*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [f for f in (ROOT / "csrc").rglob("*.*") if not re.search(pattern, str(f))] == []


def test_nothing_executes_what_it_reads():
    """No pickle, eval or exec; torch.load and np.load only in their safe modes."""
    for file in PACKAGE.rglob("*.py"):
        for call in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)):
            name, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            where = f"{file.relative_to(ROOT)}:{call.lineno}: {name}"
            assert name not in ("eval", "exec") and not name.startswith(("pickle.", "marshal.")), where
            assert name != "torch.load" or options.get("weights_only") == "True", where
            assert name not in ("np.load", "numpy.load") or options.get("allow_pickle") == "False", where
