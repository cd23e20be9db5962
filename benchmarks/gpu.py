"""`python -m benchmarks.gpu [--limit-s 300] [--row-s 15] [--json FILE] [--md FILE] [--rows NAME ...]`: one
GPU, by itself.

Ours beside transformers' models and a plain module, steps in turn (A B B A) on one device; what offload
and fp8 give; where the time of a step goes; what `simulate` says of the same plans. A step is timed from a
device that is idle to one that is idle again: median and quartiles. A peak is torch's
(max_memory_allocated), of each side beside what lay there before. MFU counts the model's FLOPs
(`model_causal`: a causal mask halves attention, recomputation counts nothing) over the data sheet's bf16
rate, and over the best product measured here. Same precision everywhere: fp32 masters, gradients and
moments, products in bf16.

A row that fails says why in a line, and the others go on; --limit-s ends it all. `--device cpu --tiny` runs
every row in small, to see that it runs: its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import gpu_sides as sides
from benchmarks.gpu_kernels import candidates
from benchmarks.gpu_sides import Env, Ours, Side, compare
from benchmarks.gpu_table import HEADER, lines_of, markdown
from benchmarks.gpu_trace import trace
from partita.base.errors import PartitaError
from partita.base.text import table
from partita.simulate.predict import simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job

DATA_SHEET = 989e12  # H100 and H200 SXM, dense bf16 FLOP/s
GRACE_S = 20.0  # beyond its time, until a row is cut off
DENSE = {
    "layers": 16, "hidden": 2048, "heads": 16, "kv_heads": 8, "ffn_hidden": 8192, "vocab": 32000,
}  # fmt: skip
HALF = {**DENSE, "layers": 8}
SPARSE = {
    "layers": 10, "hidden": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "ffn_hidden": 768,
    "vocab": 32000, "qk_norm": True, "experts": 64, "top_k": 8, "expert_ffn_hidden": 768,
}  # fmt: skip
SMALL = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab": 64}
TINY = {
    "dense": {**SMALL, "ffn_hidden": 48},
    "half": {**SMALL, "ffn_hidden": 48},
    "sparse": {**SMALL, "ffn_hidden": 16, "qk_norm": True, "experts": 4, "top_k": 2, "expert_ffn_hidden": 16},
}  # fmt: skip
LARGE = {"dense": DENSE, "half": HALF, "sparse": SPARSE}
Found = dict[str, Any]


class RowOverError(Exception):
    """A row took far longer than it may."""


def the_job(env: Env, kind: str, plan: str) -> Job:
    """A job of the benchmark's model of a kind."""
    samples, seq_len = (1, 32) if env.tiny else (2, 4096)
    return sides.job_of(env, (TINY if env.tiny else LARGE)[kind], plan, samples, seq_len)


def rated(env: Env, job: Job, found: Mapping[str, Found]) -> Found:
    """Tokens a second and MFU beside each side's figures."""
    train = job.train
    tokens = train.global_batch_size * train.seq_len
    flops = tokens * job.model.train_flops_per_token(train.seq_len, "model_causal")
    for one in found.values():
        if "step_s" in one:
            one["tokens_per_s"] = tokens / one["step_s"]
            one["mfu"] = flops / one["step_s"] / DATA_SHEET
            if best := env.found.get("matmul"):
                one["of_matmul"] = flops / one["step_s"] / best
    return {"parameters": job.model.parameters(), "tokens": tokens, "sides": dict(found)}


def rates(env: Env) -> Found:
    """What the device reaches: products in bf16 and fp8, memory, copies to and from pinned memory."""
    size, each = (64, 0.01) if env.tiny else (8192, 0.4)
    x = torch.randn(size, size, device=env.device).to(torch.bfloat16)
    best = 2 * size**3 / repeated(env, lambda: x @ x.T, each)
    env.found["matmul"] = best
    found: Found = {"bf16_flops_per_s": best}
    try:
        y, one = x.to(torch.float8_e4m3fn), torch.ones((), device=env.device)
        run = lambda: torch._scaled_mm(y, y.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        found["fp8_flops_per_s"] = 2 * size**3 / repeated(env, run, each)
    except Exception as error:
        found["fp8_failed"] = sides.reason(error)
    count = 1 << (12 if env.tiny else 28)
    a = torch.zeros(count, device=env.device)
    found["memory_bytes_per_s"] = 2 * a.nbytes / repeated(env, lambda: a.add_(1.0), each)
    host = torch.zeros(count, pin_memory=env.is_gpu)
    up = repeated(env, lambda: a.copy_(host, non_blocking=True), each)
    down = repeated(env, lambda: host.copy_(a, non_blocking=True), each)
    found |= {"to_device_bytes_per_s": a.nbytes / up, "to_host_bytes_per_s": a.nbytes / down}
    env.found["link"] = a.nbytes / max(up, down)
    return found


def repeated(env: Env, call: sides.Step, at_least_s: float) -> float:
    """Median seconds of a call: batches of a few, each waited for."""
    each, times = 1 if env.tiny else 4, []
    end = time.monotonic() + at_least_s
    call()
    while len(times) < 3 or time.monotonic() < end:
        times.append(env.seconds(lambda: [call() for _ in range(each)]) / each)
    return median(times)


def dense(env: Env, plan: str = "1mb bf16") -> Found:
    """A Llama: ours and transformers'."""
    job = the_job(env, "dense", plan)
    asked = [
        Side("ours", lambda: sides.ours(env, job)),
        Side("transformers", lambda: sides.hugging_face(env, job)),
    ]
    found = rated(env, job, compare(env, asked))
    env.found[plan] = job, found["sides"]["ours"]
    return found


def recompute(env: Env) -> Found:
    """The same, every layer made again."""
    return dense(env, "1mb bf16 recompute:full")


def plain(env: Env, compiles: bool = False) -> Found:
    """The same model as anyone would write it."""
    job, name = the_job(env, "dense", "1mb bf16"), "plain compiled" if compiles else "plain"
    asked = [
        Side("ours", lambda: sides.ours(env, job)),
        Side(name, lambda: sides.plain(env, job, compiles)),
    ]
    return rated(env, job, compare(env, asked))


def compiled(env: Env) -> Found:
    """The plain module under torch.compile; only where it is asked for, since that takes a minute."""
    return plain(env, compiles=True)


def experts(env: Env) -> Found:
    """A Qwen3-MoE: ours and transformers' with its grouped products, which under autocast are
    fp32's: so once more all in bf16, without masters."""
    job = the_job(env, "sparse", "1mb bf16")
    asked = [
        Side("ours", lambda: sides.ours(env, job)),
        Side("transformers", lambda: sides.hugging_face(env, job)),
        Side("no masters", lambda: sides.hugging_face(env, job, narrow=True)),
    ]
    found = rated(env, job, compare(env, asked))
    env.found["experts"] = job, found["sides"]["ours"]
    return found


def fp8(env: Env) -> Found:
    """Half of the Llama's layers: bf16, fp8 with a scale a tensor, and a row."""
    plans = {
        "bf16": "1mb bf16",
        "fp8 tensor": "1mb fp8 precision.fp8_granularity=tensor",
        "fp8 row": "1mb fp8 precision.fp8_granularity=row",
    }
    jobs = {name: the_job(env, "half", plan) for name, plan in plans.items()}
    asked = [Side(n, lambda job=job: sides.ours(env, job)) for n, job in jobs.items()]
    found = rated(env, jobs["bf16"], compare(env, asked))
    for name, job in jobs.items():
        env.found[f"half {name}"] = job, found["sides"][name]
    return found


def offload(env: Env) -> Found:
    """Half of the layers again, gradients and optimizer on the host: the update's own time, and the bytes
    that it moves beside a pinned copy."""
    away = the_job(env, "half", "1mb bf16 offload:cpu")
    asked = [
        Side("here", lambda: sides.ours(env, the_job(env, "half", "1mb bf16"))),
        Side("on the host", lambda: sides.ours(env, away)),
    ]
    found = rated(env, away, compare(env, asked, rounds=6))
    env.found["offload"] = away, found["sides"]["on the host"]
    for side in asked:
        if isinstance(side.step, Ours):
            halves = [(env.seconds(side.step.forward_backward), env.seconds(side.step.update))]
            found["sides"][side.name] |= {
                "forward_backward_s": halves[0][0], "update_s": halves[0][1],
            }  # fmt: skip
    moved = 6 * away.model.parameters()  # fp32 gradients down, bf16 weights up
    last = found["sides"]["on the host"]
    if "update_s" in last:
        here = found["sides"]["here"].get("step_s", 0.0)
        more = max(last["step_s"] - here, 1e-9)
        last |= {"moved_bytes": moved, "moved_bytes_per_s_of_more": moved / more}
        last["of_pinned_copy"] = moved / more / env.found.get("link", float("nan"))
    return found


def where_time_goes(env: Env, kind: str = "dense") -> Found:
    """One step of ours and of transformers' under torch's profiler."""
    job, found = the_job(env, kind, "1mb bf16"), {}
    for name, make in (("ours", sides.ours), ("transformers", sides.hugging_face)):
        side = Side(name, lambda make=make: make(env, job))
        sides.build(env, side)
        found[name] = {"failed": side.failed}
        if side.step is not None:
            found[name] = trace(env, side.step)
        side.step = None
        env.clear()
    return {"traces": found}


def where_experts_go(env: Env) -> Found:
    """The same of the Qwen3-MoE."""
    return where_time_goes(env, "sparse")


def predictions(env: Env) -> Found:
    """Predicted over measured, of each plan that ran: by the data sheet, then by a calibration."""
    measured = {name: x for name, x in env.found.items() if isinstance(x, tuple)}
    clusters = {"preset": None}
    found: Found = {"predicted": {}}
    try:
        if env.tiny:
            raise RowOverError("a tiny run does not calibrate")
        from partita.tune.calibrate import calibrate

        start = time.perf_counter()
        clusters["calibrated"] = calibrate(Cluster.load(sides.cluster_of(env))).cluster
        found["calibration_s"] = time.perf_counter() - start
    except Exception as error:
        found["calibration_failed"] = sides.reason(error)
    for name, (job, one) in measured.items():
        if "step_s" not in one:
            continue
        lines = found["predicted"][name] = {}
        for which, cluster in clusters.items():
            asked = job if cluster is None else _on(job, cluster)
            try:
                said = simulate(asked)
                step_s = said.step_time_s or float("nan")
                peak = max((x.peak_bytes for x in said.ledgers), default=0)
                lines[which] = {
                    "step_s": step_s, "step_ratio": step_s / one["step_s"], "peak_bytes": peak,
                    "peak_ratio": peak / one["peak_bytes"] if one["peak_bytes"] else None,
                    "time": said.time,
                }  # fmt: skip
            except PartitaError as error:
                lines[which] = {"failed": sides.reason(error)}
    return found


def _on(job: Job, cluster: Cluster) -> Job:
    from dataclasses import replace

    return replace(job, cluster=cluster)


ROWS: dict[str, Callable[[Env], Found]] = {
    "rates": rates, "dense": dense, "plain": plain, "experts": experts, "fp8": fp8, "offload": offload,
    "predictions": predictions, "trace": where_time_goes, "trace experts": where_experts_go,
    "recompute": recompute, "kernels": candidates, "compiled": compiled,
}  # fmt: skip
ASKED = [name for name in ROWS if name not in ("kernels", "compiled")]
SECONDS = {"predictions": 90.0, "compiled": 90.0}  # rows that may take more


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises RowOverError in what takes longer, where a signal can."""

    def over(number: int, frame: object) -> None:
        raise RowOverError(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run(
    env: Env, names: Sequence[str], keep: Callable[[Found], None], row_s: float = 15.0
) -> Found:
    """Every row in turn, each for some `row_s`; `keep` is handed what is there after each."""
    found: Found = {"device": described(env), "rows": {}}
    for name in names:
        start = time.monotonic()
        env.row_s = SECONDS.get(name, row_s)
        env.begin()
        left = env.ends - start
        try:
            if left <= 3:
                raise RowOverError("no time was left")
            with alarm(min(env.row_s + GRACE_S, left)):
                row = ROWS[name](env)
        except Exception as error:
            row = {"failed": sides.reason(error)}
        row["took_s"] = time.monotonic() - start
        found["rows"][name] = row
        env.clear()
        keep(found)
    return found


def described(env: Env) -> Found:
    """The device and the software."""
    made = {"torch": torch.__version__, "python": platform.python_version()}
    if not env.is_gpu:
        return {"name": "cpu", **made}
    p = torch.cuda.get_device_properties(env.device)
    return {
        "name": p.name,
        "memory_bytes": p.total_memory,
        "units": p.multi_processor_count,
        **made,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, prints the table last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--row-s", type=float, default=15.0)
    parser.add_argument("--rows", nargs="*", default=ASKED, choices=list(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    asked = parser.parse_args(words)

    def keep(found: Found) -> None:
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1))
        if asked.md:
            asked.md.write_text(markdown(found))
        name, row = list(found["rows"].items())[-1]
        print(f"{name}: {row['took_s']:.1f} s {row.get('failed', '')}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        ends = time.monotonic() + asked.limit_s
        env = Env(sides.device_named(asked.device), Path(folder), asked.tiny, ends)
        found = run(env, asked.rows, keep, asked.row_s)
    print(found["device"])
    print(table(lines_of(found), header=HEADER))


if __name__ == "__main__":
    main()
