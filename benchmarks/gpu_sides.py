"""What `benchmarks.gpu` compares: a step of ours, of transformers' and of a plain module, on one device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plain import Checkpointed, Llama, loss_of
from partita.comm.protocol import Where
from partita.comm.recording import Recorder
from partita.comm.single import SingleWorld
from partita.parallel.laid import lay
from partita.simulate.predict import request_of
from partita.spec.job import Job
from partita.spec.layout import Box
from partita.spec.model import ModelSpec
from partita.train.build import Built, fill_unit, make_context, make_model, open_job_data
from partita.train.devices import use_gpu
from partita.train.update import make_update

Step = Callable[[], object]
ROUNDS, WARM = 12, 2  # turns at most, steps before them


@dataclass
class Env:
    """The device, where files lie, and when a row, or all, is over."""

    device: torch.device
    folder: Path
    tiny: bool
    ends: float  # of all, on the monotonic clock
    row_s: float = 15.0
    row_ends: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)  # what rows leave for the rows behind

    @property
    def is_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    def begin(self) -> None:
        """A row's time runs."""
        self.row_ends = min(self.ends, time.monotonic() + self.row_s)

    def over(self) -> bool:
        """Whether the row's is up."""
        return time.monotonic() > self.row_ends

    def wait(self) -> None:
        """Until the device has done all."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def held(self) -> int:
        """Bytes allocated now."""
        return torch.cuda.memory_allocated(self.device) if self.is_gpu else 0

    def peak(self) -> int:
        """Bytes allocated at most since `clear`."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_gpu else 0

    def clear(self) -> None:
        """Gives back what nobody holds; peaks begin anew."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, call: Step) -> float:
        """Wall seconds of a call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start


def device_named(name: str) -> torch.device:
    """`cpu`, or the first GPU, made ready as a rank's is."""
    return use_gpu(0) if name == "cuda" else torch.device("cpu")


def job_of(env: Env, model: dict[str, Any], plan: str, samples: int, seq_len: int) -> Job:
    """A job of random tokens on one device."""
    path = env.folder / f"tokens-{model['vocab']}.npy"
    if not path.exists():
        count = 8 * samples * seq_len + 1
        np.save(path, np.random.default_rng(0).integers(0, model["vocab"], count))
    table = {
        "name": "gpu", "plan": plan, "model": {"family": "llama", "max_seq_len": seq_len, **model},
        "cluster": {"preset": cluster_of(env)}, "device": env.device.type,
        "data": {"source": f"tokens:{path}"},
        "train": {
            "steps": 1000, "global_batch_size": samples, "micro_batch_size": samples,
            "seq_len": seq_len, "clip_grad_norm": 0.0,
        },
    }  # fmt: skip
    return Job.load(table)


def cluster_of(env: Env) -> str:
    """The preset of the device: H200 where it says so, else H100; the laptop's on a CPU."""
    if not env.is_gpu:
        return "laptop"
    return "1xh200" if "H200" in torch.cuda.get_device_name(env.device) else "1xh100"


@dataclass
class Ours:
    """A step of ours, data read ahead as the others' is; its two halves can be called alone."""

    built: Built
    batch: Any

    def __call__(self) -> None:
        self.forward_backward()
        self.update()

    def forward_backward(self) -> None:
        self.built.model.forward_backward(self.batch)

    def update(self) -> None:
        self.built.update.step()


def ours(env: Env, job: Job) -> Ours:
    """Weights are drawn on the device: norms are one, the rest is as transformers begins."""
    laid = lay(request_of(job))
    context = make_context(laid, job, SingleWorld(), Where(), Recorder(active=False), env.device)
    dice = torch.Generator(env.device).manual_seed(0)

    def value(name: str, box: Box) -> torch.Tensor:
        shape = [b - a for a, b in box]
        if "norm" in name:
            return torch.ones(shape, device=env.device)
        return torch.randn(shape, device=env.device, generator=dice).mul_(0.02)

    model = make_model(job, laid, context, lambda unit: fill_unit(unit, laid, context, value))
    built = Built(job, context, model, make_update(model, job.train), open_job_data(job))
    return Ours(built, built.batch(0))


def plain(env: Env, job: Job, compiles: bool = False) -> Step:
    """benchmarks/plain.py under autocast."""
    with env.device:
        model = Llama(job.model, job.train.seq_len, range(job.model.layers))
    model.to(env.device)
    if job.plan.recompute.mode == "full":
        for i, layer in model.layers.items():
            model.layers[i] = Checkpointed(layer)
    call = torch.compile(model) if compiles else model
    return _autocast_step(env, job, model, call)


def hugging_face(env: Env, job: Job, narrow: bool = False) -> Step:
    """transformers' Llama, or Qwen3-MoE where there are experts, of the same sizes under autocast; `narrow`:
    all in bf16 without masters, as its grouped products are fp32's under autocast."""
    with env.device:
        model = _hugging_face_model(job.model, job.train.seq_len)
    model.to(env.device, torch.bfloat16 if narrow else None).train()
    if job.plan.recompute.mode == "full":
        name = "activation_checkpointing_enable"  # versions before it have the other
        begin = getattr(model, name, None) or model.gradient_checkpointing_enable
        begin({"use_reentrant": False})
    return _autocast_step(env, job, model, lambda ids: model(ids).logits, not narrow)


def _hugging_face_model(s: ModelSpec, seq_len: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    same: dict[str, Any] = {
        "vocab_size": s.vocab, "hidden_size": s.hidden, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
        "max_position_embeddings": seq_len, "tie_word_embeddings": False, "use_cache": False,
        "rms_norm_eps": s.norm_eps, "attn_implementation": "sdpa",
    }  # fmt: skip
    if not s.experts:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=s.ffn_hidden, **same))
    sparse = {
        "num_experts": s.experts, "num_experts_per_tok": s.top_k, "norm_topk_prob": True,
        "moe_intermediate_size": s.expert_ffn_hidden, "decoder_sparse_step": 1,
        "intermediate_size": s.expert_ffn_hidden, "experts_implementation": "grouped_mm",
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sparse, **same))


def _autocast_step(
    env: Env, job: Job, model: torch.nn.Module, logits_of: Callable, casts: bool = True
) -> Step:
    """fp32 weights, gradients and moments, products in bf16, torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    train, kind = job.train, env.device.type
    dice = torch.Generator().manual_seed(0)
    shape = (train.global_batch_size, train.seq_len + 1)
    ids = torch.randint(0, job.model.vocab, shape, generator=dice).to(env.device)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16, enabled=casts):
            loss = loss_of(logits_of(ids), targets)
        loss.backward()
        optimizer.step()
        float(loss.detach())  # as a loop that shows it

    return step


@dataclass
class Side:
    """One of those that take turns, and what was found of it."""

    name: str
    make: Callable[[], Step]
    step: Step | None = None
    peak_bytes: int = 0
    times: list[float] = field(default_factory=list)
    first_s: float = 0.0  # building and the first step
    failed: str = ""

    def figures(self) -> dict[str, Any]:
        """For the file."""
        if self.failed or not self.times:
            return {"failed": self.failed or "no time was left"}
        low, high = _quartiles(self.times)
        return {
            "step_s": statistics.median(self.times), "quartiles_s": [low, high],
            "steps": len(self.times), "peak_bytes": self.peak_bytes, "first_s": self.first_s,
        }  # fmt: skip


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def build(env: Env, side: Side) -> None:
    """Makes a side and warms it up; its peak is what it takes beside what was there."""
    env.clear()
    before, start = env.held(), time.perf_counter()
    try:
        side.step = side.make()
        for i in range(WARM):
            env.seconds(side.step)
            if not i:
                side.first_s = time.perf_counter() - start
        side.peak_bytes = env.peak() - before
    except Exception as error:  # a row that fails says so, and the others go on
        side.step, side.failed = None, reason(error)
    if side.failed:
        env.clear()


def compare(env: Env, sides: Sequence[Side], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Steps in turn, the order turned round each time, until the row's time is up."""
    for side in sides:
        if env.over():
            side.failed = "no time was left"
        else:
            build(env, side)
    live = [s for s in sides if s.step is not None]
    for turn in range(2 if env.tiny else rounds):
        if env.over() and turn >= 2:
            break
        for side in live[:: 1 if turn % 2 == 0 else -1]:
            assert side.step is not None
            side.times.append(env.seconds(side.step))
    return {side.name: side.figures() for side in sides}


def reason(error: BaseException) -> str:
    """One line."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"
