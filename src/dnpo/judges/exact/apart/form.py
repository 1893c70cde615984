"""Read tests: find the names that they need from the answer, and what cannot work.

Tests are a Python program. A name that they use without a definition or an import, and that is not built into Python,
is the answer's: it refers to an object in the answer's process. Calls, attributes, items, iteration, arithmetic,
``str``, ``len``, ``bool`` and similar operations on it are computed there. Plain values are returned as copies of
exactly the same type: None, numbers, texts, bytes, lists, tuples, sets, mappings, ranges, named tuples, and types of
collections, decimal, fractions and datetime. Any other value, such as an instance of the answer's class or a generator,
stays in the answer's process, and the tests get a reference.

- Only plain values are compared. ``==``, ``<`` or ``in`` on a reference ends the tests, because the answer would decide
  the outcome. Arithmetic with a reference and a plain value, such as ``f(1) - 3``, ends them for the same reason.
- Arguments are passed as copies. If a call returns None, changes that it made to lists, sets and mappings among them
  are copied back, so that sorting in place can be tested. A call that returns a value cannot change its arguments.
- Functions of the tests can be passed as arguments; they are called in the tests' process.
- An exception of the answer is raised in the tests under its name, which can be built-in or defined by the answer.
- The output of a call is printed in the tests' process, where ``contextlib.redirect_stdout`` finds it.
- Functions ``test…()`` without parameters and classes of ``unittest.TestCase`` are run if nothing else runs them.
- The answer's imports are not available to tests, so tests import the modules that they use; only modules of the
  standard library, such as ``math``, need no import. The answer itself can be imported as ``solution`` or another name
  of ``ANSWERS``; names of this module refer to objects in the answer's process, like names without an import.
- If tests use only built-in functions and call just one of them, such as ``sum``, this function is the answer's.
"""

import ast
import builtins
import importlib.util
import symtable
import sys
from collections.abc import Iterator

_ASSERTIONS = {
    *("assertEqual", "assertNotEqual", "assertEquals", "assertIn", "assertNotIn", "assertLess", "assertLessEqual"),
    *(
        "assertGreater",
        "assertGreaterEqual",
        "assertListEqual",
        "assertTupleEqual",
        "assertDictEqual",
        "assertSetEqual",
    ),
    *("assertSequenceEqual", "assertCountEqual", "assertAlmostEqual"),
}
_PYTHONS = frozenset(dir(builtins))
# Names that need the answer in the same process, or would run the answer's text among the tests.
_REFUSED_MODULES = {
    "asyncio",
    "concurrent",
    "gc",
    "inspect",
    "marshal",
    "mock",
    "multiprocessing",
    "pickle",
    "threading",
    "unittest.mock",
}
# Names by which tests may import the answer; some are also modules, which tests of an answer do not use.
ANSWERS = frozenset(
    [
        *("solution", "solutions", "answer", "answers", "response", "submission", "candidate", "main", "program"),
        *("implementation", "student", "student_code", "my_module", "my_solution", "your_module", "your_code"),
        *("your_solution", "module", "generated", "generated_code", "solve", "task", "exercise"),
    ]
)
_REFUSED_NAMES = {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input"}


def answer_names(tests: str) -> list[str]:
    """The names that tests need from the answer.

    Raises:
        SyntaxError, ValueError: the tests are not Python.
    """
    tree = ast.parse(tests)
    free = _free_names(tests) - _own_modules(tree, _free_names(tests))
    names = free - _PYTHONS
    if names or answer_modules(tests):
        return sorted(names)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if any(isinstance(node, functions) for node in ast.walk(tree)):
        return []
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    one = sorted((called & free & _PYTHONS) - {"print"})
    return one if len(one) == 1 else []


def own_modules(tests: str) -> list[str]:
    """The modules of the standard library that tests use without an import: names used only for their attributes."""
    return sorted(_own_modules(ast.parse(tests), _free_names(tests)))


def answer_modules(tests: str) -> list[str]:
    """The names by which tests import the answer as a module."""
    return sorted({module for _, module, _ in _answer_imports(ast.parse(tests))})


def _answer_imports(tree: ast.AST) -> Iterator[tuple[str, str, ast.AST]]:
    """The imports of the answer: the module's name in the tests ("" if only names are imported), module, and node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((each.asname or each.name, each.name, node) for each in node.names if each.name in ANSWERS)
        elif isinstance(node, ast.ImportFrom) and node.module in ANSWERS and not node.level:
            yield "", node.module, node


def find_fault(tests: str) -> str | None:
    """Describe why these tests cannot be used; None if they can."""
    try:
        tree = ast.parse(tests)
        compile(tree, "tests", "exec")
        names = answer_names(tests)
    except SyntaxError as error:
        return f"is not a Python program (line {error.lineno}: {error.msg})"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"is not a Python program ({error})"
    if not tree.body:
        return "is empty"
    refused = sorted(_REFUSED_NAMES & _free_names(tests))
    if refused:
        return f"{refused[0]} is not possible: the answer is in another process, and its text must not run in this one"
    for node in ast.walk(tree):
        fault = _fault(node)
        if fault is not None:
            return f"line {getattr(node, 'lineno', '?')}: {fault}"
    fault = _module_fault(tree)
    if fault is not None:
        return fault
    if not names and not answer_modules(tests):
        return (
            "names nothing that an answer would define, so every answer would pass; a function such as "
            "check(candidate) needs a line that calls it, check(NAME)"
        )
    return None


def _fault(node: ast.AST) -> str | None:
    if isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith):
        return "await is not possible: the answer is in another process"
    if isinstance(node, ast.Attribute) and node.attr == "stdin" and isinstance(node.value, ast.Name):
        return f"{node.value.id}.stdin is not the answer's, which is in another process and reads nothing"
    modules = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            return "a relative import is not possible; import the answer by from solution import NAME"
        modules = [node.module or ".", *(f"{node.module}.{alias.name}" for alias in node.names)]
    for module in modules:
        if _REFUSED_MODULES & {module, module.partition(".")[0]}:
            return f"{module} is not possible: the answer is in another process; its names are there without an import"
    for module in modules[:1] if isinstance(node, ast.ImportFrom) else modules:
        if module in ANSWERS:
            continue
        if module.partition(".")[0] in ANSWERS:
            return f"{module} is not possible: the answer is one module, {module.partition('.')[0]}"
        if not _is_installed(module.partition(".")[0]):
            return (
                f"module {module} is not installed; if it is to be the answer, call it solution, or leave the import "
                "out: the answer's names are there without one"
            )
    return None


def _module_fault(tree: ast.AST) -> str | None:
    """Describe a use of the answer as a module that is impossible, as the answer is in another process."""
    bound = {name: module for name, module, _ in _answer_imports(tree) if name}
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            if not isinstance(node.ctx, ast.Load):
                return (
                    f"line {node.lineno}: {node.value.id}.{node.attr} cannot be set: the answer is in another process"
                )
            allowed.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            allowed |= {id(arg) for arg in node.args[:1]}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Name)
            and node.id in bound
            and isinstance(node.ctx, ast.Load)
            and id(node) not in allowed
        ):
            return f"line {node.lineno}: {node.id} is the answer, and only its names can be used ({node.id}.NAME)"
    return None


def find_comparison(tests: str) -> str | None:
    """Describe where tests seem to compare an instance of an answer's class; None if they do not.

    The class may also be one of plain values, such as a named tuple; only running the tests shows this.
    """
    tree = ast.parse(tests)
    modules = {name for name, _, _ in _answer_imports(tree) if name}
    names = {*answer_names(tests)} | {
        alias.asname or alias.name
        for _, _, node in _answer_imports(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare) and not any(isinstance(each, ast.Is | ast.IsNot) for each in node.ops):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ASSERTIONS:
            sides = node.args[:2]
        for side in sides:
            if isinstance(side, ast.Call) and (made := _class_name(side.func, names, modules)):
                return f"line {side.lineno}: compares a {made}"
    return None


def _class_name(function: ast.expr, names: set[str], modules: set[str]) -> str:
    """The name of a function if it is written like a class of the answer, else ""."""
    if isinstance(function, ast.Name) and function.id in names:
        name = function.id
    elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in modules:
        name = function.attr
    else:
        return ""
    return name if name[:1].isupper() and not name.isupper() else ""


def _is_installed(module: str) -> bool:
    return bool(module) and (module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None)


def _free_names(tests: str) -> set[str]:
    """The names that are used but never bound at the level of the module."""
    top = symtable.symtable(tests, "tests", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                used.add(symbol.get_name())
            if symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
    return used - bound - {"__name__", "__file__", "__doc__"}


def _own_modules(tree: ast.AST, free: set[str]) -> set[str]:
    modules = free & sys.stdlib_module_names
    if not modules:
        return set()
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return modules - {node.id for node in loads if id(node) not in owners}
