"""README tells every reason for which a room refuses a plan: a new one is a line there."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOLD = {  # room and rule of an error -> words of README's list
    "cp method": "`cp` but for `halo`", "cp heads": "query heads", "ep dense": "without experts",
    "ep experts": "experts, or an image's", "ep fold": "`ep` · `etp` that", "ep tp": "unless `etp` is `tp`",
    "offload arena": "`cpu` or `nvme`",
    "offload shards": "are stage 3's", "offload fp8": "not fp8's in files",
    "pp layers": "fewer layers than stages", "pp split": "`pipeline.split`", "pp costs": "are `auto`'s",
    "pp copies": "`copies`", "pp schedule": "does not exist for these numbers", "sp seq_len": "`+sp` and",
    "pp zero_stage": "no ZeRO 2 or 3", "pp precision": "no fp16", "pp clip_grad_norm": "no clipping",
    "pp replay_every": "no `train.replay_every`",
    "pp tied": "no tied table", "pp microbatches": "does not exist for these numbers",
    "precision rounding": "under fp32", "split channels": "`split`, `halo` on sequences",
    "split groups": "groups and channels", "split axes": "without experts",
    "tp channels": "groups and channels",
    "tp heads": "query heads", "tp kv_heads": "key/value heads", "mesh world": "ranks than devices",
    "data batch": "a batch or",
}  # fmt: skip
JOBS = {
    "plan auto",
    "model seq_len",
    "model frozen",
    "model trainable",
    "data mlm",
}  # not the plan's


def refusals() -> set[str]:
    """Room and rule of every error that the rooms and the job's own check can raise."""
    files = [*(ROOT / "partita" / "parallel").rglob("*.py"), ROOT / "partita/spec/job_check.py"]
    found: set[str] = set()
    for call in (n for f in files for n in ast.walk(ast.parse(f.read_text()))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        words = [a.value for a in call.args if isinstance(a, ast.Constant)]
        warns = any(
            k.arg == "severity" and isinstance(k.value, ast.Constant) for k in call.keywords
        )
        if call.func.id in ("error", "Problem") and len(words) >= 2 and not warns:
            found.add(f"{words[0]} {words[1]}")
        elif call.func.id == "_divides":
            found.add(f"tp {words[0]}")
    return found


def asynchronous() -> set[str]:
    """Rules of pp/rules.py's table of what an asynchronous schedule cannot go with."""
    tree = ast.parse((ROOT / "partita/parallel/pp/rules.py").read_text())
    (made,) = (n for n in ast.walk(tree) if getattr(n, "name", "") == "_needs_flush")
    rows = next(n.iter for n in ast.walk(made) if isinstance(n, ast.For))
    assert isinstance(rows, ast.Tuple)
    return {f"pp {row.elts[1].value}" for row in rows.elts}


def test_readme_tells_every_reason() -> None:
    readme = (ROOT / "README.md").read_text()
    told = readme[readme.index("A plan is refused for") : readme.index("## Where to read on")]
    assert refusals() | asynchronous() == set(TOLD) | JOBS
    assert [rule for rule, words in TOLD.items() if words not in told] == []
