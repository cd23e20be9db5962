"""Imports go strictly downward, and nothing above the torch line meets torch."""

import subprocess
import sys
import textwrap

import pytest
from layers import ROOT, TORCH_LINE, files, imports, module, place


def test_imports_go_downward():
    wrong = []
    for file in files():
        level, unit = place(file)
        for line, target in imports(file):
            below, other = place(target)
            same_unit = unit == other and unit != "root"
            if below > level or (below == level and not same_unit):
                where = f"{file.relative_to(ROOT)}:{line}"
                wrong.append(
                    f"{where} (level {level:g}) imports {module(target)} (level {below:g})"
                )
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_cycles():
    """Inside a unit, too; an import inside a function is no cycle, nor is a name in its own package."""
    import ast

    graph = {}
    for file in files():
        tree = ast.parse(file.read_text())
        top = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        graph[file] = {target for line, target in imports(file) if line in top} - {file}
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

    for file in graph:
        visit(file)
    assert len(done) == len(graph)


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
