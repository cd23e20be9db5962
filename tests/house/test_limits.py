"""Sizes, and what must not stand in the package. Exceptions, with reasons, are in limits.toml."""

import ast
import re
import tomllib
from pathlib import Path

from layers import PACKAGE, ROOT, files

LIMITS = {"lines": 400, "length": 60, "parameters": 8}


def exceptions() -> dict[tuple[str, str, str], int]:
    rows = tomllib.loads((Path(__file__).parent / "limits.toml").read_text())["exception"]
    assert all(len(row["reason"]) > 20 for row in rows), "a raised limit needs a reason"
    return {(row["file"], row.get("name", ""), row["what"]): row["limit"] for row in rows}


def functions(tree: ast.AST):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def num_parameters(node) -> int:
    a = node.args
    named = [x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
    return len(named)


def sizes():
    for file in files():
        name, text = str(file.relative_to(ROOT)), file.read_text()
        yield (name, "", "lines"), text.count("\n")
        for node in functions(ast.parse(text)):
            yield (name, node.name, "length"), node.end_lineno - node.lineno + 1
            yield (name, node.name, "parameters"), num_parameters(node)


def test_nothing_outgrows_its_room():
    raised = exceptions()
    found = list(sizes())
    over = [(key, n) for key, n in found if n > raised.get(key, LIMITS[key[2]])]
    assert not over, "\n".join(f"{':'.join(k)} {n} > {LIMITS[k[2]]}" for k, n in over)
    needed = {key for key, n in found if n > LIMITS[key[2]]}
    assert set(raised) <= needed, f"no longer needed in limits.toml: {set(raised) - needed}"


def test_no_global_statement():
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert not found


def test_environment_and_argv_are_read_in_cli_and_comm_only():
    private = {("os", "environ"), ("os", "getenv"), ("os", "putenv"), ("sys", "argv")}
    found = []
    for file in files():
        if file.relative_to(PACKAGE).parts[0] in ("cli", "comm"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in private:
                    found.append(
                        f"{file.relative_to(ROOT)}:{node.lineno} {node.value.id}.{node.attr}"
                    )
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module, alias.name) for alias in node.names}
                found += [f"{file.relative_to(ROOT)}:{node.lineno}" for _ in names & private]
    assert not found, "\n".join(found)


def public(tree: ast.Module):
    """The module, its public classes and functions, and their public methods."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    yield tree
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            inner = node.body if isinstance(node, ast.ClassDef) else []
            yield from (n for n in inner if isinstance(n, kinds) and not n.name.startswith("_"))


TELLS_TIME = {  # and nothing waits by: when an answer was made, clocks side by side, how old a leftover is
    "serve/http/app.py", "serve/http/replies.py", "train/launch/preflight.py", "comm/shm/shm.py",
}  # fmt: skip


def test_what_waits_does_so_by_a_clock_that_nobody_sets():
    wall = re.compile(r"\btime\.(time|time_ns|localtime|gmtime)\(|datetime\.(now|utcnow|today)")
    found = {str(f.relative_to(PACKAGE)) for f in files() if wall.search(f.read_text())}
    assert found == TELLS_TIME, found


def test_what_is_public_has_a_docstring():
    bare = [
        f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'module')}"
        for file in files()
        for node in public(ast.parse(file.read_text()))
        if not ast.get_docstring(node)
    ]
    assert not bare, "\n".join(bare)


def test_nothing_is_left_for_later():
    """No stub, no note to self, no path of somebody's machine."""
    words = "|".join(
        ["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error", "HA" + "CK"]
    )
    pattern = re.compile(rf"\b({words})\b|(?<![\w.])/(home|root|work|Users)/\w")
    texts = [
        *files(),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("tests/**/*.py"),
    ]
    found = [
        f"{file.relative_to(ROOT)}:{i}: {line.strip()[:80]}"
        for file in texts
        for i, line in enumerate(file.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
