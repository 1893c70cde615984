"""loop.py shows the algorithm: its verbs equal those in the README's drawing, and each calls its function."""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

from dnpo import loop
from dnpo.stages import verbs

ROOT = Path(__file__).resolve().parent.parent
INPUTS = {"name_earlier", "arrange", "reference", "match", "find_caches"}  # what training reads, laid out before it


def drawn() -> list[str]:
    """The verbs in the box of an iteration."""
    box = re.search(r"─ iteration k ─.*?policy k\+1", (ROOT / "README.md").read_text(), re.DOTALL)
    assert box is not None
    return re.findall(r"^ +│  (\w+) {2,}\S", box.group(), re.MULTILINE)


def calls(function: object) -> list[str]:
    """The names of the functions that a function calls, in order."""
    tree = ast.parse(inspect.getsource(function))  # type: ignore[arg-type]
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [node.func.id for node in sorted(found, key=lambda node: node.lineno) if isinstance(node.func, ast.Name)]


def defines(module: ModuleType, name: str) -> bool:
    """Whether a function of this name is defined in the module, and not imported there."""
    return getattr(getattr(module, name, None), "__module__", None) == module.__name__


def test_an_iteration_calls_the_verbs_of_the_drawing_in_order() -> None:
    called = [name for name in calls(loop.iterate) if defines(verbs, name)]
    assert drawn() == ["generate", "judge", "label", "optimise", "evaluate"]
    assert [name for name in called if name not in INPUTS] == drawn()
    assert set(called) == {*drawn(), *INPUTS}


def test_each_verb_is_the_function_that_computes_it() -> None:
    """One click in an editor: the definition of each verb is the computation, not a plan of it."""
    for name in drawn():
        source = inspect.getsource(inspect.unwrap(getattr(verbs, name)))
        assert re.search(rf"^def {name}\(run: Run, plan: Plan.*task: Task\) -> Facts:", source, re.MULTILINE), name
        assert re.search(r"task\.(folder|inputs)", source), name


def test_the_algorithm_fits_on_a_screen() -> None:
    assert len(Path(loop.__file__).read_text().splitlines()) <= 80
