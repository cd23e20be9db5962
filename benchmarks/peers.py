"""The peers: each a function that returns a step to time, on two ranks (or one)."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain import Checkpointed, Llama, loss_of
from partita.spec.model import ModelSpec

BATCH = 8
HF_EXPERTS = "grouped_mm"  # what transformers takes by itself


def inputs(s: ModelSpec, seq_len: int):
    """The global batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, s.vocab, (BATCH, seq_len + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _autocast(bf16: bool):
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def plain(s: ModelSpec, seq_len: int, bf16: bool, checkpointed: bool = False):
    """One rank, no parallelism."""
    model = Llama(s, seq_len, range(s.layers))
    if checkpointed:
        for i, layer in model.layers.items():
            model.layers[i] = Checkpointed(layer)
    return _alone(model, model, s, seq_len, bf16)


def recomputed(s: ModelSpec, seq_len: int, bf16: bool):
    """One rank, every layer checkpointed."""
    return plain(s, seq_len, bf16, checkpointed=True)


def hugging_face_experts(s: ModelSpec, seq_len: int, bf16: bool):
    """Transformers' Qwen2-MoE of the same sizes, one rank."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, num_hidden_layers=s.layers, num_experts=s.experts,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, num_experts_per_tok=s.top_k,
        moe_intermediate_size=s.expert_ffn_hidden, norm_topk_prob=True, use_cache=False,
        shared_expert_intermediate_size=s.shared_experts * s.expert_ffn_hidden,
        max_position_embeddings=seq_len, tie_word_embeddings=False, decoder_sparse_step=1,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    return _alone(model, lambda ids: model(ids).logits, s, seq_len, bf16)


def deepseek_experts(s: ModelSpec, seq_len: int, bf16: bool):
    """Transformers' DeepSeek-V2 MoE of the same sizes in every layer of the plain model, one rank."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = DeepseekV2Config(
        hidden_size=s.hidden, moe_intermediate_size=s.expert_ffn_hidden, n_routed_experts=s.experts,
        n_shared_experts=s.shared_experts, num_experts_per_tok=s.top_k, topk_method="greedy",
        routed_scaling_factor=s.router_scale, experts_implementation=HF_EXPERTS,
    )  # fmt: skip
    model = Llama(s, seq_len, range(s.layers))
    for layer in model.layers.values():
        layer.mlp = DeepseekV2Moe(config)
        for weight in layer.mlp.parameters():  # its stacked ones are memory as it came
            torch.nn.init.normal_(weight, std=0.02)
    return _alone(model, model, s, seq_len, bf16)


def _alone(model, logits_of, s: ModelSpec, seq_len: int, bf16: bool):
    """A step of one rank on the whole batch."""
    return _step(_optimizer(model), logits_of, *inputs(s, seq_len), bf16)


def _step(optimizer, logits_of, ids, targets, bf16: bool):
    """Forward, backward and update of one rank's share."""

    def step():
        optimizer.zero_grad(set_to_none=True)
        with _autocast(bf16):
            loss = loss_of(logits_of(ids), targets)
        loss.backward()
        optimizer.step()

    return step


def one_thread(s: ModelSpec, seq_len: int, bf16: bool):
    """The whole batch on rank 0, while the other rank waits."""
    return plain(s, seq_len, bf16) if dist.get_rank() == 0 else lambda: None


def ddp(s: ModelSpec, seq_len: int, bf16: bool):
    """DistributedDataParallel over both ranks."""
    model = DistributedDataParallel(
        Llama(s, seq_len, range(s.layers)), gradient_as_bucket_view=True
    )
    return _replicated(model, _optimizer(model), s, seq_len, bf16)


def zero1(s: ModelSpec, seq_len: int, bf16: bool):
    """DistributedDataParallel with ZeroRedundancyOptimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(
        Llama(s, seq_len, range(s.layers)), gradient_as_bucket_view=True
    )
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4, fused=True)
    return _replicated(model, optimizer, s, seq_len, bf16)


def zero3(s: ModelSpec, seq_len: int, bf16: bool):
    """FSDP2: every layer and the root fully_shard, bf16 gathers with fp32 reduction."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    dtype = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if bf16 else None)
    model = Llama(s, seq_len, range(s.layers))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _replicated(model, _optimizer(model), s, seq_len, False)


def deepspeed(stage: int):
    """DeepSpeed's ZeRO on its CPU accelerator, in the group there is; its first start compiles its own
    shared-memory collectives (80 s)."""

    def make(s: ModelSpec, seq_len: int, bf16: bool):
        import deepspeed

        rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_SIZE=ranks)
        deepspeed.init_distributed(dist_backend="gloo")
        model = Llama(s, seq_len, range(s.layers))
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(model),
            config={
                "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # torch's fused one, as everybody's here
                "zero_optimization": {"stage": stage},
                "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
            },
        )
        ids, targets = (t.chunk(2)[dist.get_rank()] for t in inputs(s, seq_len))

        def step():
            engine.backward(loss_of(engine(ids), targets))
            engine.step()

        return step

    return make


def _replicated(model, optimizer, s: ModelSpec, seq_len: int, bf16: bool):
    """A step on this rank's half of the batch."""
    ids, targets = (t.chunk(2)[dist.get_rank()] for t in inputs(s, seq_len))
    return _step(optimizer, model, ids, targets, bf16)


def tensor(s: ModelSpec, seq_len: int, bf16: bool):
    """parallelize_module: column- and row-wise linears, vocabulary-parallel embedding and loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    model = Llama(s, seq_len, range(s.layers))
    plan: dict = {
        "table": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for i in range(s.layers):
        for name in ("attention.wq", "attention.wk", "attention.wv", "mlp.gate", "mlp.up"):
            plan[f"layers.{i}.{name}"] = ColwiseParallel()
        for name in ("attention.wo", "mlp.down"):
            plan[f"layers.{i}.{name}"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizers = [torch.optim.AdamW(ps, lr=1e-4, fused=True) for ps in (sharded, whole)]
    ids, targets = inputs(s, seq_len)

    def step():
        model.zero_grad(set_to_none=True)
        with _autocast(bf16), loss_parallel():
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            loss.backward()
        for optimizer in optimizers:  # the fused kernel does not mix the two kinds
            optimizer.step()

    return step


# torch's schedule, stages a rank, and whether they lie as a V (else in turn)
SCHEDULES = {
    "gpipe": ("ScheduleGPipe", 1, False),
    "1f1b": ("Schedule1F1B", 1, False),
    "interleaved": ("ScheduleInterleaved1F1B", 2, False),
    "zero bubble": ("ScheduleInterleavedZeroBubble", 2, False),
    "zbv": ("ScheduleZBVZeroBubble", 2, True),
    "dualpipev": ("ScheduleDualPipeV", 2, True),
}


def pipeline(kind: str):
    """torch.distributed.pipelining with microbatches of one sample and the same layer split."""

    def make(s: ModelSpec, seq_len: int, bf16: bool):
        from torch.distributed import pipelining

        name, virtual, vee = SCHEDULES[kind]
        rank, stages = dist.get_rank(), 2 * virtual
        each = s.layers // stages
        mine = [rank, stages - 1 - rank] if vee else [rank + 2 * i for i in range(virtual)]
        models = [
            Llama(s, seq_len, range(i * each, (i + 1) * each), first=i == 0, last=i == stages - 1)
            for i in mine
        ]
        made = [
            pipelining.PipelineStage(m, i, stages, torch.device("cpu"))
            for m, i in zip(models, mine, strict=True)
        ]
        kind_of = getattr(pipelining.schedules, name)
        schedule = kind_of(made if virtual > 1 else made[0], BATCH, loss_fn=loss_of)
        optimizer = _optimizer(torch.nn.ModuleList(models))
        ids, targets = inputs(s, seq_len)
        first, last = 0 in mine, stages - 1 in mine

        def step():
            optimizer.zero_grad(set_to_none=True)
            with _autocast(bf16):
                given = (ids,) if first else ()
                schedule.step(*given, **({"target": targets} if last else {}))
            optimizer.step()

        return step

    return make
