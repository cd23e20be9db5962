"""A row of a table of published runs as a job that can be predicted, or the reason why it cannot.

Columns are those of validation/measurements.csv. What a row says is taken as it stands; what it leaves out
follows one rule for all rows (a vocabulary not printed is GPT-2's, a microbatch not printed is 1). Nothing
here looks at the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from partita.base.errors import PlanError
from partita.cost.empirical import HOST_S
from partita.cost.machine import Machine, machine_of, software_of
from partita.parallel.room import Request
from partita.simulate.published.cells import (
    GATED,
    PLAIN,
    Row,
    UnpredictableError,
    is_eager,
    is_gpt,
    method,
    named,
    not_understood,
    number,
    value_of,
)
from partita.simulate.published.plan import plan_of, recompute_of
from partita.simulate.published.recipes import EAGER, UNSTATED, Recipe, recipe_of
from partita.spec.cluster import Cluster, Link
from partita.spec.frozen import Frozen
from partita.spec.hardware import find_hardware
from partita.spec.job import ADAPTERS
from partita.spec.model import Convention, Latent, ModelSpec
from partita.spec.plan import Plan

STEP_METRICS = ("step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu")
GPT2_VOCAB = 50257
LORA_RANK = 32  # Megatron-Bridge's default; adapters are below 1 % of the work
DROPOUT = 0.1  # of GPT models before fused attention

# from container 26.06 on, in mxfp8: one graph holds the step, and what experts multiply is one kernel, where
# configurations of Megatron-Bridge v0.5.0 say cuda_graph_impl full_iteration and cutedsl_fused_grouped_mlp;
# Kimi's does not yet
WHOLE = r"bridge-(26\.0[6-9]|26\.1|2[7-9])\S* (DeepSeekV3|Qwen3_\S+|GPT OSS 120B) mxfp8"
# ERA_COLUMNS, joined by spaces -> software era, by their beginning
ERA_COLUMNS = ("group", "model_name", "precision", "zero_or_fsdp")
ERAS = (
    ("(mt-nlg|bloom|palm MT)\\S* .*bf16", "deepspeed-bf16"), ("(vtrain|neox)", "megatron-deepspeed"),
    ("(korthikanti|megascale)", "megatron-2022"),
    ("sc21-t2.* zero3", "deepspeed-2021"), ("sc21", "megatron-2021"), ("megatron-v1", "megatron-2019"),
    ("megatron-", "megatron-2021"), ("zb-", "megatron-2023"), ("vocabpar", "megatron-flash"),
    ("llama3", "meta-2024"),
    ("titan", "torchtitan"), ("pytorch-fsdp", "fsdp-2022"),
    ("nemo-(24\\.0[1-7]|longseq )", "nemo-2024"), ("nemo-", "nemo-2024-09"),
    ("mcore-flagperf", "megatron-core"), ("internevo", "internevo"),
    ("mcore", "megatron-2024"), ("bridge-25", "bridge-2025"), (WHOLE, "bridge-2026"),
    ("bridge-", "bridge-2026-02"), ("deepseek", "deepseek-2024"),
    ("maxtext", "xla"), ("palm", "xla"), ("mpt", "mosaic-2023"), (r".* [fh]sdp\S*$", "fsdp"),
)  # fmt: skip
# eras of Megatron-LM and of what is built on it
MEGATRON = ("megatron", "nemo", "bridge", "deepspeed")
DEVICES = {
    "V100-32GB(DGX-2)": "V100-32GB", "V100-32GB(DGX-2H)": "V100-32GB", "V100": "V100-32GB",
    "H100": "H100-80GB-SXM", "B200": "B200-SXM", "B300": "B300-SXM", "TPUv3?": "TPUv3",
}  # fmt: skip
# what public configurations say and the table has no column for
PADDED = 128  # to so many times tp: Megatron-LM's make_vocab_size_divisible_by
UNPADDED = ("vtrain-single",)  # vTrain's src/model/gpt_modeling.py: vocab_size // world_size
VOCABS = (("zb-", 32000),)  # SentencePiece; with it their sizes are the 14.6 and 28.3 B printed
SPREAD = ("vocab-1", "vocab-2", "interlaced")  # methods that cut the vocabulary over the stages
HEAD_DIMS = {
    "Qwen3": 128, "GPT OSS": 64, "DeepSeek": 192, "Kimi": 192, "Moonlight": 192,
}  # fmt: skip
# of models with latent attention, by public configurations: numbers a query is made of (0: of the token),
# leading layers without experts, shared experts; all have 512 numbers of keys and values, 64 rotated
LATENT = {"DeepSeek": (1536, 3, 1), "Kimi": (1536, 1, 1), "Moonlight": (0, 1, 2)}
BIASED = "GPT OSS"
NETWORKS = {
    "vtrain": 12.5e9,
    "maxtext-a3": 12.5e9,
    "internevo": 6.25e9,
}  # bytes/s a device between nodes, as notes say
RACK = 64  # devices of an NVLink rack that runs use


@dataclass(frozen=True)
class Case:
    """A published configuration: what is asked of the simulator."""

    model: ModelSpec
    plan: Plan
    cluster: Cluster
    software: str
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    matmul_dtype: str  # '' where it is the plan's
    frozen: bool  # all weights but small adapters (LoRA): no weight gradients
    spread: bool  # embedding and head lie on all stages, cut along the vocabulary
    recompute: str  # for the FLOPs of the hw convention: none | selective | full
    again: tuple[str, ...] = ()  # what selective recomputation names (works.py)
    spared: tuple[str, ...] = ()  # ops of layers that run again but for these
    cast_bytes: int = 0  # as the row's scales are made; 0 where it does not say
    stated: Recipe = UNSTATED  # what configurations say and no column does
    eager: bool = False  # each op is a kernel: no compiler, no program's own kernels
    biased: bool = False  # experts have biases, which their program adds apart

    def request(self, plan: Plan) -> Request:
        """What the rooms are asked for this case under a plan; with LoRA all but the adapters is frozen."""
        frozen = ADAPTERS if self.model.lora_rank else Frozen()
        return Request(plan, self.model, self.seq_len, self.micro_batch_size, frozen=frozen)

    def machine(self, constants: Mapping[str, Any] | None = None) -> Machine:
        """The cluster with the constants of its device and its software."""
        found = machine_of(self.cluster, self.software, constants)
        era, stated = found.software, self.stated
        era = replace(
            era,
            overlaps_exchanges=stated.beside,
            host_s=0.0 if stated.captured else HOST_S if stated.eager else era.host_s,
            cast_bytes=self.cast_bytes or era.cast_bytes,
            sends_rows_once=era.sends_rows_once and not stated.each,
            starts_experts=era.starts_experts and not stated.eager,
            small_kernels=(era.small_kernels or stated.eager) and not stated.captured,
            eager=EAGER[stated.own_norms :] if self.eager else (),
        )
        return replace(found, software=era)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch_size * self.seq_len


def software(row: Row) -> str:
    """The software era of a row: of its group, and of what DeepSpeed trains in bf16 or under ZeRO-3."""
    name = " ".join(row.get(c, "") for c in ERA_COLUMNS)
    return next((era for start, era in ERAS if re.match(start, name)), "current")


def refusal(error: PlanError) -> str:
    """Which rules of which rooms a plan breaks."""
    rules = dict.fromkeys(f"{p.room}: {p.rule}" for p in error.problems if p.severity == "error")
    return f"refused, {', '.join(rules)}"


def case(row: Row) -> Case:
    """The row as a case. Raises UnpredictableError with the reason."""
    if row["quality"] == "C":
        raise UnpredictableError("quality C")
    if told := not_understood(row):
        raise UnpredictableError("; ".join(told))
    if method(row) not in ("", "baseline", "redis", *SPREAD):
        raise UnpredictableError(f"a method that is not described: {method(row)}")
    seq, batch, stated = number(row, "seq_len"), global_batch(row), recipe_of(row)
    own = {"microbatch_size": str(stated.micro)} if stated.micro else {}
    spec, (plan, micro) = model(row, seq), plan_of({**row, **own}, batch)
    return Case(
        spec,
        plan,
        cluster(row),
        software(row),
        seq,
        micro,
        batch,
        _matmuls(row),
        "LoRA" in row["notes"],
        method(row) in SPREAD,
        recompute_of(row),
        _named(row, "selective") if row["recompute"] else stated.again,
        _named(row, "full"),
        _cast_bytes(row),
        stated,
        is_eager(row),
        row["model_name"].startswith(BIASED) and software_of(software(row)).starts_each_expert,
    )


def global_batch(row: Row) -> int:
    """Sequences of a step; where they are not printed and there is no pipeline, a microbatch a rank."""
    if row.get("global_batch") or not row.get("microbatch_size") or number(row, "pp", 1) > 1:
        return number(row, "global_batch")
    return number(row, "microbatch_size") * number(row, "dp")


def model(row: Row, seq: int) -> ModelSpec:
    """The model of a row, in one of the families."""
    mlp, name = row["mlp"], row["model_name"]
    if mlp not in (*PLAIN, *GATED):
        raise UnpredictableError(f"architecture outside the families: {mlp or 'not stated'}")
    experts: dict[str, Any] = {}
    if row.get("experts", "") not in ("", "0"):
        ffn = number(row, "moe_ffn_hidden")
        counts = {"experts": number(row, "experts"), "top_k": number(row, "topk")}
        experts = {**counts, "expert_ffn_hidden": ffn}
    family = "gpt2" if is_gpt(row) else "llama"
    made = next((v for start, v in LATENT.items() if name.startswith(start)), None)
    if made is not None:
        experts |= {"dense_layers": made[1], "shared_experts": made[2]}
        experts["latent"] = Latent(kv=512, rope=64, v=128, q=made[0])
    drops = family == "gpt2" and not software_of(software(row)).flash
    heads = number(row, "heads")
    return ModelSpec(
        family=family, layers=number(row, "layers"), hidden=number(row, "hidden"), heads=heads,
        kv_heads=number(row, "kv_heads", heads), vocab=_vocab(row),
        max_seq_len=seq, name=name, dropout=DROPOUT if drops else 0.0,
        ffn_hidden=_ffn(row, experts.get("expert_ffn_hidden")), **experts,
        lora_rank=LORA_RANK if "LoRA" in row["notes"] else 0,
        qk_norm=name.startswith("Qwen3"),
        head_dim=next((d for start, d in HEAD_DIMS.items() if name.startswith(start)), 0),
    )  # fmt: skip


def _vocab(row: Row) -> int:
    """As many as the head's matmul has: padded where the software does."""
    group, tp = row["group"], number(row, "tp", 1)
    known = next((v for start, v in VOCABS if group.startswith(start)), GPT2_VOCAB)
    vocab = number(row, "vocab", known)
    if group.startswith(UNPADDED):
        return vocab // tp * tp
    each = PADDED * tp if software(row).startswith(MEGATRON) else 1
    return -(-vocab // each) * each


def _ffn(row: Row, default: int | None) -> int:
    """The width of the feed-forward. Without a gate (a squared ReLU; Falcon's GELU, whose keys are few) two
    matrices of width f are the weights and the FLOPs of a gated three of width 2f/3."""
    width = number(row, "ffn_hidden", default)
    return width * 2 // 3 if row["mlp"] in PLAIN and not is_gpt(row) else width


def _named(row: Row, mode: str) -> tuple[str, ...]:
    """The modules or ops that a row's recomputation names, where it is of that mode."""
    return tuple(word for of, word in named(row["recompute"]) if of == mode)


def _matmuls(row: Row) -> str:
    return "fp4" if row["precision"].startswith("nvfp4") else ""


def _cast_bytes(row: Row) -> int:
    """Bytes that move as an element becomes one of 8 bits or fewer. By a scale of the tensor as it is now
    (fp8-cs, nvfp4) it is read once more; written once where matmuls take either way (Blackwell), but for
    blocks that are scaled along what is summed (mxfp8)."""
    text = row["precision"]
    if text.startswith("fp8-cs"):
        return 6 if row["gpu_type"].startswith("H") else 5
    return 5 if text.startswith("nvfp4") else 0


def cluster(row: Row) -> Cluster:
    """The devices of a row with their published links; the network of a source where it is stated."""
    devices = number(row, "n_gpus")
    hardware = find_hardware(DEVICES.get(row["gpu_type"], row["gpu_type"]))
    node = min(number(row, "gpus_per_node", hardware.node_devices), devices)
    domain = node
    if hardware.domain_devices > hardware.node_devices:
        known = RACK if hardware.domain_devices == 72 else hardware.domain_devices
        domain = min(node if node > hardware.node_devices else known, devices)  # or a slice's own
    links = []
    if domain > 1:
        links.append(
            Link(hardware.intra_name, domain, hardware.intra_bytes_per_s, hardware.intra_latency_s)
        )
    if domain < devices:
        network = next((b for g, b in NETWORKS.items() if row["group"].startswith(g)), None)
        rate = network or hardware.inter_bytes_per_s
        links.append(Link("network", devices, rate, hardware.inter_latency_s))
    return Cluster(
        f"{devices}x{hardware.name}", devices, node, hardware.name, hardware.memory_bytes,
        hardware.peak_flops, hardware.memory_bytes_per_s, tuple(links),
    )  # fmt: skip


def measured_seconds(row: Row, found: Case, convention: Convention) -> float:
    """The row's value as the seconds of a step, its FLOPs counted by `convention`."""
    value, devices = value_of(row), found.cluster.devices
    if row["metric"] == "step_time_s":
        return value
    if row["metric"] == "tokens_per_s_per_gpu":
        return found.tokens / (value * devices)
    per_token = found.model.train_flops_per_token(found.seq_len, convention, found.recompute)
    rate = value * 1e12 if row["metric"] == "tflops_per_gpu" else 0.0
    if row["metric"] == "mfu":
        rate = value / 100 * found.cluster.peak("bf16")
    return per_token * found.tokens / (rate * devices)
