"""What a rank computes on: the CPU, or the GPU of its place on its host.

A rank on a GPU keeps weights, activations and their collectives there (nccl); the step's 8-byte sums,
data and checkpoints stay with the CPU (gloo). No layer names a device: it computes where its weights are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from partita.base.errors import UsageError
from partita.comm.processes import for_gpu, torchrun_rank
from partita.spec.job import Job


def computes_on_gpu(job: Job) -> bool:
    """Whether the job's ranks compute on GPUs: asked for, or `auto` where the cluster has them and so has
    this host. Raises UsageError where `cuda` is asked for and torch sees none."""
    if job.device == "auto":
        return job.cluster.device != "CPU" and torch.cuda.is_available()
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device = 'cuda': torch {torch.__version__} sees no GPU on this host; accepted here: auto, cpu",
            key="device",
        )
    return job.device == "cuda"


def device_of(job: Job, rank: int) -> torch.device:
    """The rank's device. Raises UsageError where the host has fewer GPUs than ranks."""
    if not computes_on_gpu(job):
        return torch.device("cpu")
    place = torchrun_rank()
    local, have = rank if place is None else place[2], torch.cuda.device_count()
    if local >= have:
        raise UsageError(
            f"rank {rank} is number {local} on its host, which has {have} GPUs: each rank needs its own",
            key="device",
        )
    return use_gpu(local)


def use_gpu(number: int) -> torch.device:
    """The GPU of that number on this host, for this process (and this thread) from now on: fp32 is fp32, not
    TF32, whose 10 bits cuDNN's convolutions would take; sums of 16-bit products are not rounded midway; and
    backward runs in the thread that asks for it."""
    for_gpu()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.autograd.set_multithreading_enabled(False)
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def shared_device(job: Job) -> torch.device:
    """What all thread ranks of this process compute on: the CPU, or its first GPU, where the job computes on
    GPUs."""
    return use_gpu(0) if computes_on_gpu(job) else torch.device("cpu")


def reading_device(job: Job) -> torch.device:
    """What one rank computes on that reads what a run of the job has left, perhaps on another host: where
    that has no GPU, the CPU."""
    if job.device == "cuda" and not torch.cuda.is_available():
        job = replace(job, device="cpu")
    return shared_device(job)
