"""A job file, or a table, as a Job."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any, Literal

from partita.base.config import apply_overrides, decode, load_toml, parse_value
from partita.base.errors import UsageError
from partita.spec import plan_table, plan_text
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.lora import adapter_fields
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan
from partita.spec.train import DataSpec, TrainSpec

PARTS = ("model", "cluster")  # which one word may stand for


@dataclass(frozen=True)
class _File:
    """The top of a job file; plan, model and cluster have readers of their own."""

    model: dict[str, Any]
    train: TrainSpec
    name: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    plan: str | dict[str, Any] = ""
    survive: tuple[str, ...] = ()
    cluster: dict[str, Any] = field(default_factory=lambda: {"preset": "laptop"})
    data: DataSpec = field(default_factory=DataSpec)


def read_job(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Job:
    """The job of a file or table with overrides applied. Raises UsageError with file and key."""
    file, folder, table = None, Path(), source
    if not isinstance(table, Mapping):
        file, folder = str(source), Path(source).parent  # type: ignore[arg-type]
        table = load_toml(file)
    fields = [word for word in overrides if word.startswith("plan.")]
    rest = [_as_words(word) for word in overrides if not word.startswith("plan.")]
    table = apply_overrides(_in_tables(table), rest)
    stated = decode(_File, table, file=file)
    plan = _plan(stated.plan, fields, file)
    model, init, path, adapter = _model(stated.model, file, folder)
    try:
        return Job(
            model=model,
            cluster=Cluster.from_toml(stated.cluster, file=file, folder=folder),
            train=stated.train,
            plan=plan,
            auto=stated.plan == "auto",
            survive=stated.survive,
            data=stated.data.in_folder(folder),
            name=_name(file) if stated.name is None else stated.name,
            seed=stated.seed,
            device=stated.device,
            init=init,
            model_path=path,
            adapter_path=adapter,
            file=file,
        )
    except UsageError as error:
        if error.file is not None or error.key is None:
            raise
        raise _usage(file, error.key, error.message) from None


def _in_tables(table: Mapping[str, Any]) -> dict[str, Any]:
    """The file's table, model and cluster tables too where they are one word each."""
    words = {k: _as_table(v) for k, v in table.items() if k in PARTS and isinstance(v, str)}
    return {**table, **words}


def _as_words(word: str) -> str:
    """An override; of a model or a cluster that is one word, as a table in a line."""
    key, equals, text = word.partition("=")
    if not equals or key.strip() not in PARTS:
        return word
    value = parse_value(text.strip())
    if not isinstance(value, str):
        return word
    ((name, stated),) = _as_table(value).items()
    return f"{key}={{ {name} = {json.dumps(stated)} }}"


def _as_table(name: str) -> dict[str, str]:
    """A model or cluster given as one word: a path, or a preset's name."""
    return {"path" if name.endswith((".toml", ".json")) or "/" in name else "preset": name}


def _usage(file: str | None, key: str, text: str) -> UsageError:
    lead = f"{file}: " if file else ""
    return UsageError(f"{lead}{key}: {text}", file=file, key=key)


def _name(file: str | None) -> str:
    """A job without a name is called like its file."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", Path(file).stem)[:100] if file else "run"


def _plan(stated: str | dict[str, Any], fields: Sequence[str], file: str | None) -> Plan:
    """A plan from its line or table, then `plan.section.field=value` one by one."""
    if stated == "auto":
        if fields:
            text = f"'auto' chooses every field, {fields[0]} states one: write a plan instead"
            raise _usage(file, "plan", text)
        return Plan()
    if isinstance(stated, str):
        try:
            plan = Plan.parse(stated)
        except UsageError as error:
            lead = f"{file}: " if file else ""
            raise UsageError(f"{lead}{error.message}", file=file, key="plan") from None
    else:
        plan = plan_table.from_toml(stated, file=file)
    for word in fields:
        plan = _changed(plan, word)
    return plan


def _changed(plan: Plan, word: str) -> Plan:
    """The plan with one field changed."""
    key, equals, text = word.removeprefix("plan.").partition("=")
    place = plan_table.ALIASES.get(key.strip())
    section, _, name = ".".join(place).partition(".") if place else key.strip().partition(".")
    if not equals or not name:
        stated = f"plan.{key.strip()}"[:100]
        raise UsageError(f"'{word[:100]}': write plan.section.field=value", key=stated)
    value = parse_value(text.strip())
    if not isinstance(value, list):  # lists as TOML writes them, else as the line writes them
        try:
            section, name, value = plan_text.read_field(f"{section}.{name}={text.strip()}")
        except UsageError as error:
            error.key = f"plan.{section}.{name}"
            raise
    table = plan_table.to_toml(plan)
    table.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
    return plan_table.from_toml(table)


def _model(
    stated: Mapping[str, Any], file: str | None, folder: Path
) -> tuple[ModelSpec, Literal["random", "pretrained"], str | None, str | None]:
    """The model, how its weights start, the folder they lie in, and that of LoRA's."""
    table = {k: v for k, v in stated.items() if k not in ("init", "adapter")}
    adapter = None
    if "adapter" in stated:
        adapter = normpath(folder.absolute() / str(stated["adapter"]))
        table = {**adapter_fields(Path(adapter)), **table}
    init = stated.get("init", "random")
    if init not in ("random", "pretrained"):
        raise _usage(file, "model.init", f"{init!r} is none of random, pretrained")
    model = ModelSpec.from_toml(table, file=file, folder=folder)
    path = (
        normpath(folder.absolute() / table["path"])
        if init == "pretrained" and "path" in table
        else None
    )
    return model, init, path, adapter
