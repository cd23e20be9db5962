"""One step under torch's profiler: where the device's time goes, and how long it has nothing to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_sides import Env, Step

# parts of kernels' names, the first that is found counts
KINDS = (
    ("attention", ("flash", "fmha", "attention", "cudnn_generated", "sdpa")),
    ("matmul", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "matmul", "splitk", "wgmma")),
    ("optimizer", ("adam", "multi_tensor")),
    ("sort, scatter", ("sort", "scan", "topk", "index", "gather", "scatter", "histogram")),
    ("softmax, loss", ("softmax", "logsumexp", "nll_loss", "cross_entropy")),
    ("copy, cast", ("copy", "memcpy", "cat")),
    ("zero", ("memset", "fill")),
    ("sum", ("reduce",)),
)
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
)  # fmt: skip
SHOWN = 25
Interval = tuple[float, float]


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name; what nobody knows is element-wise."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS if any(p in name for p in parts)), "element-wise")


def covered(intervals: Iterable[Interval]) -> float:
    """Length of a union."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def trace(env: Env, step: Step) -> dict[str, Any]:
    """Of one step: seconds by kind, launches, waits of the host, the idle share, the longest kernels."""
    plain_s = env.seconds(step)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if env.is_gpu else [])
    with profile(activities=activities) as seen:
        profiled_s = env.seconds(step)
    events = seen.events() or []
    device = DeviceType.CUDA if env.is_gpu else DeviceType.CPU
    found = [
        (e.name, e.time_range.start * 1e-6, e.time_range.end * 1e-6)
        for e in events
        if e.device_type == device and not getattr(e, "is_user_annotation", False)
        and not e.name.startswith(("ProfilerStep", "Optimizer.", "## "))
    ]  # fmt: skip
    kinds, counts, names = Counter[str](), Counter[str](), Counter[str]()
    for name, start, end in found:
        kinds[kind_of(name)] += end - start
        counts[name[:110]] += 1
        names[name[:110]] += end - start
    busy = covered((a, b) for _, a, b in found)
    span = max(b for *_, b in found) - min(a for _, a, _ in found) if found else 0.0
    own = Counter({e.key: e.self_cpu_time_total * 1e-6 for e in seen.key_averages()})
    waits = Counter(e.name for e in events if e.device_type == DeviceType.CPU and e.name in WAITS)
    return {
        "step_s": plain_s, "profiled_s": profiled_s, "busy_s": busy, "span_s": span,
        "idle_share": max(0.0, 1 - busy / plain_s) if plain_s else None,
        "kinds_s": dict(kinds.most_common()), "launches": len(found), "waits": dict(waits),
        "host_longest": [[n, s] for n, s in own.most_common(SHOWN)],
        "longest": [[n, s, counts[n]] for n, s in names.most_common(SHOWN)],
    }  # fmt: skip
