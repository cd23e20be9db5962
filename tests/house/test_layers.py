"""Imports go strictly downward, and nothing above the torch line meets torch."""

import ast
import subprocess
import sys
import textwrap

import pytest
from layers import PACKAGE, ROOT, TORCH_LINE, files, imports, module, place


def test_imports_go_downward():
    wrong = []
    for file in files():
        level, unit = place(file)
        for line, target in imports(file):
            below, other = place(target)
            same_room = unit == other and unit != "root"
            others = int(below) == int(level) and unit.split(".")[0] != other.split(".")[0]
            if below > level or others or (below == level and not same_room):
                where = f"{file.relative_to(ROOT)}:{line}"
                wrong.append(
                    f"{where} (level {level:g}) imports {module(target)} (level {below:g})"
                )
    assert not wrong, "\n".join(wrong)


# By these methods a class is read, written or checked by a file that is made of the class: programs say
# `Plan.parse(line)` and `str(plan)`, and text has a file of its own. Each only imports it and calls it.
DOORS = {
    "spec/model.py": {"from_hf_config"},
    "spec/plan.py": {"parse", "__str__", "slug"},
    "spec/cluster.py": {"from_toml"},
    "spec/job.py": {"load", "problems"},
    "schedule/ir.py": {"__str__"},
    "simulate/predict.py": {"to_json", "__str__"},
}


def doors(file):
    """{line of its import: method} of a file's DOORS: an import, and a call of what it imports."""
    names, found = DOORS.get(str(file.relative_to(PACKAGE)), set()), {}
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    for node in nodes:
        words = [n for n in node.body if not isinstance(n, ast.Expr)]
        match words:
            case [
                ast.ImportFrom(names=[name]),
                ast.Return(value=ast.Call(func=ast.Name(id=called))),
            ]:
                if node.name in names and name.name == called:
                    found[words[0].lineno] = node.name
    return found


def test_no_file_needs_itself():
    """Imports inside functions and those of types alone count; DOORS do not, and each of them is needed."""
    graph, back = {}, {}
    for file in files():
        found = doors(file)
        graph[file] = {target for line, target in imports(file) if line not in found} - {file}
        for line, target in imports(file):
            if line in found:
                back[file, found[line]] = target
    done, path = set(), []

    def visit(file):
        if file in path:
            names = [module(f) for f in [*path[path.index(file) :], file]]
            pytest.fail(f"an import cycle: {' -> '.join(names)}")
        if file not in done:
            path.append(file)
            for target in sorted(graph[file]):
                visit(target)
            path.pop()
            done.add(file)

    def reaches(start, end):
        seen, ahead = set(), [start]
        while ahead:
            seen.add(file := ahead.pop())
            ahead += graph[file] - seen
        return end in seen

    for file in graph:
        visit(file)
    assert len(done) == len(graph)
    listed = {(PACKAGE / name, method) for name, methods in DOORS.items() for method in methods}
    assert set(back) == listed, "a door is an import and a call"
    assert all(reaches(target, file) for (file, _), target in back.items()), "needs no door"


def test_nothing_above_the_torch_line_imports_torch():
    pure = [module(f) for f in files() if place(f)[0] < TORCH_LINE]
    pure += [f"partita.cli.{name}" for name in ("main", "draw")]
    code = """
        import importlib, sys

        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "transformers"):
                    raise ImportError(f"{name} is imported above the torch line")

        sys.meta_path.insert(0, NoTorch())
        for name in sys.argv[1:]:
            try:
                importlib.import_module(name)
            except ImportError as error:
                sys.exit(f"{name}: {error}")
        import partita
        assert partita.schedule("1f1b", num_ranks=2, num_microbatches=2).num_stages == 2
    """
    words = [sys.executable, "-c", textwrap.dedent(code), *pure]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(pure) > 20
