"""`python -m benchmarks.serving [FOLDER] [--turns 5] [--tokens 32] [--plan ""]`: beside transformers.

Without a folder: greedy decoding of random Llamas in one process on one thread, ours (`open_runner`, pages of
keys and values) and transformers' `generate` (its own cache) in turn, the same tokens from both:

    tokens a second of processor time, batches of 1 and 8, prompts of 32 tokens

With a Hugging Face folder: `partita serve FOLDER` and `transformers serve FOLDER --continuous-batching`
(which needs `pip install accelerate`), a process each, asked in turn by 1 and by 8 clients at once, every one
with a prompt of its own and streamed: tokens a second of wall and processor time, and the time to the first
text.

Ratios are our time over theirs, medians over turns with 95 % bootstrap intervals: below 1 ours is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from benchmarks.run import interval
from partita.base.text import table
from partita.serve.piece import Piece
from partita.serve.runner import open_runner

SIZES = {"tiny, 7 M": (256, 4), "small, 38 M": (512, 8)}  # hidden, layers
VOCAB, PROMPT, PAGE = 8192, 32, 16
START_S = 180.0


def models() -> Iterator[tuple[str, Any, str]]:
    """(name, transformers' model, its folder) of each size, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, (hidden, layers) in SIZES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128, intermediate_size=hidden * 11 // 4, vocab_size=VOCAB,
            max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            yield name, model, folder


def decoders(model: Any, runner: Any, prompts: list[list[int]], tokens: int) -> list[Callable]:
    """Ours and theirs: each gives the chosen ids [sequence][token]."""

    def ours() -> list[list[int]]:
        each = -(-(PROMPT + tokens) // PAGE)
        pages = [tuple(range(i * each, (i + 1) * each)) for i in range(len(prompts))]
        pieces = [Piece(tuple(p), 0, t) for p, t in zip(prompts, pages, strict=True)]
        found = [[t] for t in runner.run(pieces).argmax(-1).tolist()]
        for place in range(PROMPT, PROMPT + tokens - 1):
            pieces = [Piece((f[-1],), place, t) for f, t in zip(found, pages, strict=True)]
            for f, t in zip(found, runner.run(pieces).argmax(-1).tolist(), strict=True):
                f.append(t)
        return found

    def theirs() -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        return out[:, PROMPT:].tolist()

    return [ours, theirs]


def decode(turns: int, tokens: int) -> list[list[str]]:
    """A row for each size and batch."""
    torch.set_num_threads(1)
    rows = []
    for name, model, folder in models():
        pages = 8 * -(-(PROMPT + tokens) // PAGE)
        with closing(open_runner(folder, pages=pages, page_size=PAGE)) as runner:
            for batch in (1, 8):
                prompts = torch.randint(0, VOCAB, (batch, PROMPT)).tolist()
                both = decoders(model, runner, prompts, tokens)
                said = [call() for call in both]
                took: list[list[float]] = [[], []]
                for _ in range(turns):
                    for call, seconds in zip(both, took, strict=True):
                        began = time.process_time()
                        call()
                        seconds.append(time.process_time() - began)
                same = "yes" if said[0] == said[1] else "no"
                rows.append([name, str(batch), *_cells(took, batch * tokens), same])
    return rows


def _cells(took: Sequence[Sequence[float]], tokens: int) -> list[str]:
    """Ours and theirs (tokens a second; seconds where there are none), the ratio of times, its interval."""
    ratios = [a / b for a, b in zip(*took, strict=True)]
    low, high = interval(ratios)
    middle = [statistics.median(x) for x in took]
    shown = [f"{tokens / x:.1f}" if tokens else f"{x:.2f}" for x in middle]
    return [*shown, f"{statistics.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"]


@contextmanager
def server(line: list[str], url: str) -> Iterator[psutil.Process]:
    """A server's process, once it answers."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, env=env, stdout=log, stderr=log)
        try:
            end = time.monotonic() + START_S
            while True:
                try:
                    httpx.get(f"{url}/health", timeout=2)
                    break
                except httpx.HTTPError:
                    if time.monotonic() > end or process.poll() is not None:
                        log.seek(0)
                        raise SystemExit(
                            f"{' '.join(line)} did not start:\n{log.read().decode()[-2000:]}"
                        ) from None
                    time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def seconds_of(process: psutil.Process) -> float:
    """Processor seconds of a process and those it started."""
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def ask(url: str, model: str, number: int, tokens: int, told: list[tuple[float, int]]) -> None:
    """One streamed completion: (seconds to the first text, tokens)."""
    prompt = (
        f"Story {number}. Once upon a time, in a village by the sea, there was a little robot who"
    )
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, count = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = httpx.Response(200, content=line[6:]).json()
            if not first and any(c.get("text") for c in chunk.get("choices") or ()):
                first = time.perf_counter() - began
            if chunk.get("usage"):
                count = chunk["usage"]["completion_tokens"]
    told.append((first, count))


def load(url: str, model: str, process: psutil.Process, clients: int, tokens: int) -> list[float]:
    """Wall and processor seconds a token, and seconds to the first text, of so many clients at once."""
    told: list[tuple[float, int]] = []
    asked = [
        threading.Thread(target=ask, args=(url, model, i, tokens, told)) for i in range(clients)
    ]
    began, used = time.perf_counter(), seconds_of(process)
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    made = sum(count for _, count in told)
    if len(told) < clients or not made:
        raise SystemExit(f"{url} answered {len(told)} of {clients} with {made} tokens")
    wall, used = time.perf_counter() - began, seconds_of(process) - used
    return [wall / made, used / made, statistics.median(first for first, _ in told)]


def serve(folder: Path, turns: int, tokens: int, plan: str) -> list[list[str]]:
    """A row for each number of clients and figure."""
    ports = _free_port(), _free_port()
    urls = [f"http://127.0.0.1:{p}" for p in ports]
    here, theirs = sys.executable, str(Path(sys.executable).parent / "transformers")
    lines = [
        [here, "-m", "partita", "serve", str(folder), "--plan", plan, "--port", str(ports[0])],
        [theirs, "serve", str(folder), "--device", "cpu", "--continuous-batching", "--port", str(ports[1])],
    ]  # fmt: skip
    lines[0] += ["--backend", "processes"] if plan else []
    names, rows = [folder.name, str(folder)], []
    with server(lines[0], urls[0]) as ours, server(lines[1], urls[1]) as peer:
        for clients in (1, 8):
            found: list[list[list[float]]] = [[], []]
            for turn in range(turns + 1):
                for side, process in enumerate((ours, peer)):
                    took = load(urls[side], names[side], process, clients, tokens)
                    if turn:  # the first warms up
                        found[side].append(took)
            for at, figure in enumerate(("tokens/s", "tokens/CPU s", "s to the first text")):
                took = [[x[at] for x in side] for side in found]
                rows.append([figure, str(clients), *_cells(took, int(at < 2))])
    return rows


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--plan", default="")
    asked = parser.parse_args()
    sides = ["ours", "transformers", "ratio", "95 %"]
    if asked.folder is None:
        head = ["model", "batch", *sides, "same tokens"]
        print(table(decode(asked.turns, asked.tokens), head))
    else:
        head = ["figure", "clients", *sides]
        print(table(serve(asked.folder, asked.turns, asked.tokens, asked.plan), head))


if __name__ == "__main__":
    main()
