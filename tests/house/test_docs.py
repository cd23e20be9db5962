"""The Python of README and docs runs, the commands of README too, and every linked file is there."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import files_docs
import pytest
from layers import PACKAGE, ROOT, files

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    found = [(info.strip(), body) for info, body in FENCE.findall(page.read_text())]
    marked = [info for info, _ in found if info.startswith(f"{language} ")]
    assert not marked, f"{page.name}: a block is run or it is no {language}: {marked}"
    return [body for info, body in found if info == language]


def with_python(pages: list[Path]) -> list[Path]:
    return [page for page in pages if blocks(page, "python")]


@pytest.fixture
def folder(tmp_path):
    """A folder as a reader has it: the job files are there."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    return tmp_path


@pytest.mark.timeout(250)
@pytest.mark.parametrize("page", with_python(PAGES), ids=lambda page: page.stem)
def test_python_blocks_run(page, folder):
    """A page's blocks run in order, in one process. A starved machine takes minutes for ranks that some
    train on: that fails nothing, a page that hangs does."""
    script = folder / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    words = [sys.executable, "-W", "error::UserWarning", str(script)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def quick_commands() -> list[str]:
    """The lines of README that a reader types and that need no training."""
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    verbs = ("draw", "simulate", "plan")
    return [line for line in lines if line.startswith(tuple(f"partita {v} " for v in verbs))]


@pytest.mark.parametrize("line", quick_commands())
def test_readmes_commands_run(line, folder):
    words = [sys.executable, "-m", *shlex.split(line, comments=True)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_map_lists_every_file():
    """Each module stands by its name in the line of its unit, what lies deeper by its folder."""
    tree = (ROOT / "docs" / "map.md").read_text().split("```")[1]
    _, *parts = re.split(r"(?:^|\s)(\w+)/ +L\d+ ", tree)
    words: dict[str, set[str]] = {}
    for unit, names in zip(parts[::2], parts[1::2], strict=True):
        words.setdefault(unit, set()).update(re.findall(r"[\w*]+/?", names))
    missing = []
    for file in files():
        unit, *inner = file.relative_to(PACKAGE).parts
        if not inner or unit == "cli" or file.stem.startswith("__"):
            continue
        name = f"{inner[0]}/" if len(inner) > 1 else file.stem
        if not any(fnmatch.fnmatch(name, word) for word in words[unit]):
            missing.append(str(file.relative_to(PACKAGE)))
    assert not missing


def test_the_page_of_files_is_the_packages():
    assert files_docs.PAGE.read_text() == files_docs.page(), (
        "python tests/house/files_docs.py writes it"
    )
