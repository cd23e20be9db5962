"""docs/job.md has every key of a job file with its default, and every preset; its own job fits."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import partita as pt
from partita.cli.drawing import Drawing
from partita.schedule.clock import clock
from partita.spec import cluster_read, job_read
from partita.spec.hardware import ALIASES, hardware_rows
from partita.spec.image import ImageSpec
from partita.spec.model import ModelSpec
from partita.spec.model_parts import Latent, RopeScaling
from partita.spec.plan import Plan
from partita.spec.plan_table import CHOICES, MODULES, SCHEDULES, TARGETS
from partita.spec.prices import Prices
from partita.spec.reliability import Jitter, Reliability
from partita.spec.train import DataSpec, TrainSpec

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "job.md").read_text()
TABLES: dict[str, type] = {
    "Top": job_read._File,
    "[model]": ModelSpec,
    "[model.rope_scaling]": RopeScaling,
    "[model.latent]": Latent,
    "[model.image]": ImageSpec,
    "[data]": DataSpec,
    "[train]": TrainSpec,
    "[plan]": Plan,
    "[cluster]": cluster_read._File,
    "[[cluster.links]]": cluster_read._Link,
    "[[cluster.nodes]]": cluster_read._Node,
    "[cluster.reliability]": Reliability,
    "[cluster.jitter]": Jitter,
    "[cluster.prices]": Prices,
}


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """Key -> default and text, of the table under a heading."""
    part = PAGE.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    found = re.findall(r"^\| `([\w.]+)` \| `?([^|`]+)`? \| ([^\n]*)\|$", part, re.MULTILINE)
    return {key: (default.strip(), text) for key, default, text in found}


def keys(kind: type, before: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, default (MISSING, or as TOML has it) and type of each field, those of a plan's sections too."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        made = f.default_factory() if f.default_factory is not MISSING else f.default
        if kind is Plan:
            yield from keys(type(made), f"{f.name}.")
        else:
            made = {} if is_dataclass(made) else list(made) if isinstance(made, tuple) else made
            yield before + f.name, made, hints[f.name]


def choices(key: str, kind: Any) -> tuple[str, ...]:
    """The words that a key may hold, where they are few."""
    named = {"offload.targets": TARGETS, "recompute.modules": MODULES}
    named |= {".".join(place): words for place, words in CHOICES.items()}
    inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
    literal = get_args(inner) if get_origin(inner) is Literal else ()
    return named.get(key, literal)


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_stands_there_with_its_default(heading):
    told = rows(heading)
    wanted = list(keys(TABLES[heading]))
    assert list(told) == [key for key, *_ in wanted]
    for key, default, kind in wanted:
        shown, text = told[key]
        if default is MISSING or default is None:
            assert shown == ("required" if default is MISSING else "-"), key
        else:
            assert tomllib.loads(f"v = {shown}")["v"] == default, key
        absent = [word for word in choices(key, kind) if word not in f"{shown} {text}"]
        assert not absent, key


def test_every_preset_and_device_is_named():
    for heading, names in (
        ("[model]", ModelSpec.preset_names()),
        ("[cluster]", [*hardware_rows(), *ALIASES]),
    ):
        part = PAGE.split(f"\n### {heading}\n")[1].split("\n| key")[0]
        assert set(names) <= set(re.findall(r"[\w.-]+", part)), heading


def test_the_first_job_is_read_and_fits(tmp_path):
    """The page's own file, and the plans that its commands name."""
    (tmp_path / "mine.toml").write_text(PAGE.split("```toml\n")[1].split("```")[0])
    for line in [None, *re.findall(r'plan="(.*?)"', PAGE.split("```sh\n")[1].split("```")[0])]:
        job = pt.Job.load(tmp_path / "mine.toml", *([f"plan={line}"] if line else []))
        assert pt.simulate(job).fits
    assert job.data.source == str(tmp_path / "mine.txt")


def test_the_grammar_of_a_line_names_every_word():
    part = PAGE.split("\n## The plan's line\n")[1].split("\n## ")[0]
    words = [*CHOICES["precision", "dtype"], *CHOICES["context", "method"], "split", "ep", "etp"]
    assert not [w for w in words if not re.search(rf"\b{w}", part)]
    schedules = (DOCS / "schedules.md").read_text()
    assert not [name for name in SCHEDULES if name not in schedules]


def test_the_json_page_names_every_field_of_a_prediction_and_of_a_drawing():
    """docs/json.md."""
    told = set(re.findall(r"`(\w+)`", (DOCS / "json.md").read_text()))
    document = pt.simulate(
        pt.Job.of("tiny", "8xh100", "tp2", global_batch_size=1, seq_len=8)
    ).to_json()
    fields = {*document, *document["memory"], *document["memory"]["per_rank"][0], *document["time"]}
    schedule = pt.schedule("1f1b", num_ranks=2, num_microbatches=2)
    drawing = Drawing(schedule, clock(schedule)).document()
    assert {*fields, *document["traffic"][0], *drawing} - {"format"} <= told
