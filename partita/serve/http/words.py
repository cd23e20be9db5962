"""What a folder says of text: its tokenizer, whether that begins a prompt, and which ids end an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from partita.base.errors import DataError
from partita.serve.continued import source_of
from partita.serve.weights import StepWeights, found
from partita.train.data.tokenizer import Tokenizer

ENDS = ("generation_config.json", "config.json")
KEY = "eos_token_id"


@dataclass(frozen=True)
class Words:
    """`special`: prompts begin as the tokenizer's file says (a <s>, mostly), as transformers has it; a run
    of ours was trained on texts as they are. `ends`: the ids that end an answer. `name`: the run's or the
    folder's; `device`: the run's, where this host has it."""

    name: str
    tokenizer: Tokenizer
    special: bool
    ends: tuple[int, ...]
    device: str = "cpu"


def words_of(folder: Path) -> Words:
    """Of a Hugging Face folder its own, of a checkpoint its job's. Raises UsageError where there is no
    tokenizer."""
    spec, weights = found(folder)
    source = source_of(folder)
    tokenizer = source.tokenizer
    if isinstance(weights, StepWeights):
        run = weights.folder.absolute().parent.parent.name
        return Words(run, tokenizer, False, tokenizer.end, source.device)
    stated = [i for name in ENDS for i in _ends(folder / name) if i < spec.vocab]
    ends = tuple(dict.fromkeys([*stated, *tokenizer.end]))
    return Words(folder.absolute().name, tokenizer, True, ends, source.device)


def _ends(path: Path) -> list[int]:
    """The ids that a file of the folder says end an answer."""
    if not path.is_file():
        return []
    try:
        stated = json.loads(path.read_text(encoding="utf-8")).get(KEY)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object: {error}", file=str(path)) from error
    several = stated if isinstance(stated, list) else [stated]
    return [i for i in several if type(i) is int and i >= 0]
