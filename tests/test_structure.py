"""Who may know whom: the import rules that keep the house in order."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import shoal

ROOT = Path(shoal.__file__).parent
HEAVY = {
    "matplotlib",
    "pyarrow",
    "transformers",
    "tensorboard",
    "triton",
    "datasets",
    "fastapi",
    "gguf",
    "uvicorn",
    "zstandard",
    "llguidance",
    "lm_eval",
}
SERVER = {"pydantic", "starlette", "prometheus_client", "llguidance"}
"""What `serve` may import when it is loaded, as it is itself loaded only when a server starts."""
HEAVY |= SERVER

TRITON = "shoal.kernels.fp8_triton"
"""Kernels are functions that Triton decorates: this module cannot be loaded without it, and is loaded by no other."""

FLOOR = {"config", "runtime", "atomic", "memory", "apart", "finite"}
MATHS = FLOOR | {"kernels", "numerics", "model"}
PARTS = {"formats", "data", "parallel", "plan"}
WORK = {"train", "engine"}
# The unit (folder or file of shoal) -> the units it may import.
MAY_KNOW: dict[str, set[str]] = {
    "atomic": set(),
    "memory": set(),
    "finite": set(),
    "config": set(),
    "runtime": {"config", "kernels"},
    "apart": {"config"},
    "options": {"config"},
    "kernels": FLOOR - {"runtime"},
    "numerics": FLOOR | {"kernels"},
    "model": {"config", "kernels"},
    **dict.fromkeys(PARTS, MATHS),
    **dict.fromkeys(WORK, MATHS | PARTS),
    "post": MATHS | PARTS | WORK,
    **dict.fromkeys(("evaluate", "serve", "bench", "showcase", "exporting", "doctor"), MATHS | PARTS | WORK | {"post"}),
    "dial": MATHS | PARTS | {"options"},
    "memory_limit": MATHS | PARTS | WORK | {"post", "showcase"},
    "quantizing": MATHS | PARTS | WORK | {"evaluate"},
}
TOP = {"cli", "__main__"}


def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("shoal", *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, *, at_load: bool) -> Iterator[str]:
    """What a module imports, as absolute dotted names; `at_load`: only what is imported when it is loaded."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if at_load and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)):
            continue
        todo.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in MODULES else source


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def unit(name: str) -> str:
    """`train` for shoal.train.trainer; empty for shoal itself, which holds the version and nothing else."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_knows_only_what_its_floor_allows(name: str) -> None:
    mine = unit(name)
    if mine in TOP or not mine:
        return
    assert mine in MAY_KNOW, f"{mine} is new: give it a place in MAY_KNOW"
    known = {unit(other) for other in imports(name, at_load=False) if other.split(".")[0] == "shoal"} - {"", mine}
    assert known <= MAY_KNOW[mine], f"{name} must not know {', '.join(sorted(known - MAY_KNOW[mine]))}"


def test_there_are_no_cycles_between_modules() -> None:
    graph = {name: {other for other in imports(name, at_load=True) if other in MODULES and other != name} for name in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_packages_are_imported_only_where_they_are_used(name: str) -> None:
    loaded = {other.split(".")[0] for other in imports(name, at_load=True)}
    loaded |= {"tensorboard" for other in imports(name, at_load=True) if other.startswith("torch.utils.tensorboard")}
    allowed = SERVER if unit(name) == "serve" else {"triton"} if name == TRITON else set()
    assert not loaded & (HEAVY - allowed)
    assert TRITON not in imports(name, at_load=True)


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if unit(name) != "serve"])
def test_the_server_is_loaded_only_when_one_starts(name: str) -> None:
    assert "serve" not in {unit(other) for other in imports(name, at_load=True)}


def modules_loaded_by(code: str) -> set[str]:
    """Top-level packages in memory after `code` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(result.stdout.split("LOADED ")[1].split())


def test_help_answers_without_loading_torch() -> None:
    code = """
from shoal.cli import main
verbs = ('train', 'sft', 'dpo', 'grpo', 'recipe', 'generate', 'chat', 'serve', 'eval', 'quantize', 'export', 'doctor')
for args in (['--help'], ['--version'], *([verb, '--help'] for verb in verbs)):
    try:
        assert main(args) == 0
    except SystemExit as stop:
        assert not stop.code
"""
    assert not modules_loaded_by(code) & {"torch", "numpy", "tokenizers", "jinja2", *HEAVY}


def test_commands_load_no_optional_package_before_they_need_it() -> None:
    loaded = modules_loaded_by(
        "import shoal.showcase, shoal.evaluate, shoal.exporting, shoal.doctor, shoal.bench.train, shoal.serve.terminal"
    )
    assert "torch" in loaded
    # triton belongs to torch where that was built for GPUs
    assert not loaded & (HEAVY - {"triton"})
