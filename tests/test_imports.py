"""The house rules of imports: down floors only, heavy packages in one place, no torch where people wait."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "sorahpc").rglob("*.py"))

FLOORS = {
    0: {"errors", "config", "configfile", "files", "log", "runs", "lease", "page", "store"},
    1: {"ops", "distributed"},
    2: {"data", "models", "diffusion", "metrics", "profiling"},
    3: {"jobs"},
    4: {"cluster", "cli", "report", "demo", "__main__"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Each in one module, lazily where heavy.
ONE_PLACE = {
    "megatron": "sorahpc/distributed/megatron.py",
    "submitit": "sorahpc/cluster/submit.py",
    "nvidia.dali": "sorahpc/data/dali.py",
    "h5py": "sorahpc/data/hdf5.py",
    "diffusers": "sorahpc/models/vae.py",
    "transformers": "sorahpc/models/text.py",
    "huggingface_hub": "sorahpc/store.py",
    "sorahpc._C": "sorahpc/ops/_library.py",
    "transformer_engine": "sorahpc/profiling/peers.py",
    "apex": "sorahpc/profiling/peers.py",
    "fused_rotary_positional_embedding": "sorahpc/profiling/peers.py",
    "liger_kernel": "sorahpc/profiling/peers.py",
    "flash_attn": "sorahpc/profiling/peers.py",
}
NO_TORCH = [
    m for m in MODULES if m.relative_to(ROOT / "sorahpc").parts[0].removesuffix(".py") in FLOORS[0] | {"cluster", "cli"}
]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_top_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of each import, those inside functions too; of `from a import b` both a and a.b."""
    package = list(path.relative_to(ROOT).parent.parts)
    todo: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else str(node.module)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        if at_top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_top_only and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        todo.extend(ast.iter_child_nodes(node))


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(name: str) -> str:
    """`data` of sorahpc.data.cache; an import of the package itself has none."""
    return name.split(".")[1] if name.count(".") else ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_floors_only(path: Path) -> None:
    here = room_of(name_of(path))
    if not here:  # sorahpc/__init__.py: under every floor
        assert not [name for _, name in imports(path) if is_in(name, "sorahpc")]
        return
    assert here in FLOOR_OF, f"{path.relative_to(ROOT)}: on which floor is `{here}`? Say so in {Path(__file__).name}"
    for line, name in imports(path):
        room = room_of(name) if is_in(name, "sorahpc") else ""
        if room in FLOOR_OF:
            fault = f"{here} (floor {FLOOR_OF[here]}) imports {name} (floor {FLOOR_OF[room]})"
            assert FLOOR_OF[room] <= FLOOR_OF[here], f"{path.relative_to(ROOT)}:{line}: {fault}"


@pytest.mark.parametrize("path", sorted((ROOT / "sorahpc/jobs").glob("*.py")), ids=name_of)
def test_no_job_imports_another(path: Path) -> None:
    others = [f"{path.name}:{line}: {name}" for line, name in imports(path) if is_in(name, "sorahpc.jobs")]
    assert not others


@pytest.mark.parametrize("package", ONE_PLACE)
def test_a_heavy_package_is_imported_in_one_place(package: str) -> None:
    found = {str(p.relative_to(ROOT)) for p in MODULES for _, name in imports(p) if is_in(name, package)}
    assert found <= {ONE_PLACE[package]}


@pytest.mark.parametrize("path", NO_TORCH, ids=name_of)
def test_a_login_node_needs_no_torch(path: Path) -> None:
    """In the module's own lines, and in all that it imports, read from an interpreter that did."""
    assert not [f"{path.name}:{line}: {name}" for line, name in imports(path, at_top_only=True) if is_in(name, "torch")]


def test_importing_the_command_line_and_the_cluster_loads_no_torch() -> None:
    names = ", ".join(name_of(p) for p in NO_TORCH if p.stem not in ("__init__", "__main__"))
    script = f"import sys, {names}; print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_rules_see_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    module = tmp_path / "sorahpc/data/x.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "import h5py\nfrom sorahpc import _C\nfrom ..jobs import train\nfrom . import cache\n"
        "def f():\n    from megatron.core import x\n    import importlib\n    importlib.import_module('torch.cuda')\n"
    )
    names = {name for _, name in imports(module)}
    assert {"h5py", "sorahpc._C", "sorahpc.jobs.train", "sorahpc.data.cache", "megatron.core", "torch.cuda"} <= names
    assert "megatron.core" not in {name for _, name in imports(module, at_top_only=True)}
