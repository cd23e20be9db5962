"""Whether what a job reads is here and as long as elsewhere, without reading it."""

from __future__ import annotations

from pathlib import Path

from partita.base.errors import UsageError
from partita.spec.job import Job
from partita.train.data.images import DIGITS, IMAGES, is_images
from partita.train.data.megatron import files_of, prefix_of
from partita.train.data.sources import text_files
from partita.train.data.streams import IDX, TOKENS

EVERY = ("*",)
READ = {  # of a folder
    "data.tokenizer": ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "model.path": ("config.json", "*.safetensors", "*.safetensors.index.json"),
}


def data_files(job: Job) -> list[Path]:
    """The files that training reads: sources, mask, documents, a tokenizer's file, weights it starts from.

    Raises UsageError for what does not exist or is not accepted, with the job's key.
    """
    data = job.data
    files = _source(data.source, "data.source")
    if data.eval_source:
        files += _source(data.eval_source, "data.eval_source")
    named = [("data.mask", data.mask), ("data.documents", data.documents)]
    if data.tokenizer != "byte" and not data.tokenizer.startswith("train:"):
        named.append(("data.tokenizer", data.tokenizer))
    if job.init == "pretrained":
        named.append(("model.path", job.model_path))
    for key, name in named:
        if name and not (key == "data.documents" and name == IDX):
            files += _named(name, key, READ.get(key, EVERY))
    return files


def _source(source: str, key: str) -> list[Path]:
    if is_images(source):
        return [] if source == DIGITS else _named(source.removeprefix(IMAGES), key)
    if source.startswith(TOKENS):
        return _named(source.removeprefix(TOKENS), key)
    prefix = prefix_of(source)
    return text_files(source, key) if prefix is None else list(files_of(prefix, key))


def _named(name: str, key: str, read: tuple[str, ...] = EVERY) -> list[Path]:
    """A file, or those of a folder that are read; none that is hidden."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = {p for pattern in read for p in path.glob(pattern) if p.is_file()}
        return sorted(p for p in found if not p.name.startswith("."))
    if not path.is_file():
        raise UsageError(f"{key} = {name!r}: no such file", file=name, key=key)
    return [path]
