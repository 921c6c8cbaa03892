"""The core keeps nothing at module level, and loads neither megatron nor the DeepSpeed engine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ta_plugin

ROOT = Path(ta_plugin.__file__).parent
ENGINES = ("megatron", "deepspeed")  # the two rooms that import an engine
CORE = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] not in ENGINES]
CHANGEABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CONSTRUCTORS = {
    "list",
    "dict",
    "set",
    "defaultdict",
    "Counter",
    "deque",
    "OrderedDict",
    "WeakKeyDictionary",
    "SSPGroup",
}


def is_state(node: ast.stmt, in_class: bool) -> bool:
    """Whether a statement that runs on import names something that can change, or a placeholder to be filled later."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return False
    name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    value = node.value
    table = (
        name.isupper() and isinstance(value, ast.List | ast.Dict | ast.Set) and ast.unparse(value) not in ("[]", "{}")
    )
    if name == "__all__" or table:  # a filled table in capitals is a constant
        return False
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in CONSTRUCTORS
    placeholder = (
        isinstance(value, ast.Constant) and value.value is None and not in_class
    )  # a field's default may be None
    return isinstance(value, CHANGEABLE) or placeholder


def states(body: list[ast.stmt], in_class: bool = False) -> list[str]:
    """Module-level state, also inside if, try, with and class bodies."""
    found = []
    for node in body:
        if is_state(node, in_class):
            found.append(ast.unparse(node))
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While | ast.ClassDef):
            blocks = [getattr(node, block, []) for block in ("body", "orelse", "finalbody")]
            for block in [*blocks, *(handler.body for handler in getattr(node, "handlers", []))]:
                found += states(block, in_class or isinstance(node, ast.ClassDef))
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_at_module_level_can_change(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert states(tree.body) == []
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]


def test_the_search_finds_what_it_looks_for() -> None:
    state = [
        "A = None",
        "B: dict = {}",
        "if x:\n    C = defaultdict(list)",
        "class D:\n    e = []",
        "F = {}",
        "g = [1]",
        "H = []",
    ]
    fine = ["__all__ = []", "F = 3", "G = (1,)", "class H:\n    i: int | None = None", "def f():\n    g = []"]
    fine.append("TABLE = {'a': 1}")
    assert [len(states(ast.parse(source).body)) for source in state] == [1] * len(state)
    assert [states(ast.parse(source).body) for source in fine] == [[]] * len(fine)


def test_the_core_loads_no_engine() -> None:
    """Every module of the core, in a fresh process that refuses both packages."""
    lazy = ROOT / "ops/builder/classes.py"  # subclasses DeepSpeed's builders; imported inside load() only
    modules = [p.relative_to(ROOT.parent).with_suffix("") for p in CORE if p != lazy]
    names = [".".join(module.parts).removesuffix(".__init__") for module in modules]
    program = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ENGINES}:
            raise AssertionError(name + " is imported")

sys.meta_path.insert(0, Refuse())
for name in {names}:
    importlib.import_module(name)
loaded = [name for name in sys.modules if name.split(".")[0] in {ENGINES}]
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
