"""What a published table has no column for and its authors' configurations state.

Those of NVIDIA-NeMo/Megatron-Bridge: scripts/performance/configs at v0.2.0 (container 25.11), v0.3.1
(26.02.01), v0.4.2 (26.04) and v0.5.0 (26.06); of NVIDIA/dgxc-benchmarking: launch.sh at 25.05.04; of
NVIDIA/NeMo: scripts/performance/llm at 25.04. A row's own column comes first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

Row = Mapping[str, str]
COLUMNS = ("group", "model_name", "gpu_type", "precision", "zero_or_fsdp")


@dataclass(frozen=True)
class Recipe:
    """again: modules that run again. leaves: layers whose activations go to the host. beside: experts'
    exchanges run beside the other microbatch's compute (overlap_moe_expert_parallel_comm). each: a plain
    all-to-all, where a token goes once to each of its experts (moe_token_dispatcher_type). micro: the
    microbatch size, where a row has that of another plan on its line (the page prints accumulations). eager:
    the host starts every kernel (cuda_graph_impl "none"). captured: none, where other rows of the era do
    (enable_cuda_graph). own_norms: an eager program's norm is a kernel
    (norm_type fused_rmsnorm of torchtitan's configurations until the summer of 2024)."""

    again: tuple[str, ...] = ()
    leaves: int = 0
    beside: bool = False
    each: bool = False
    micro: int = 0
    eager: bool = False
    captured: bool = False
    own_norms: bool = False


UNSTATED = Recipe()
EAGER = (
    "norm",
    "rotate",
    "gate",
)  # pieces of eager PyTorch; the norm first, which may be the program's own
LIGHT = ("layernorm", "moe_act")
# what a row's COLUMNS, joined by spaces, begin with -> what is stated of it; all that fit count
RECIPES = (
    (r"bridge-\S+ LLAMA3_70B GB200 fp8\S* fsdp", Recipe(leaves=40)),
    (r"bridge-\S+ LLAMA3_70B GB200 bf16 fsdp", Recipe(leaves=20)),
    (r"bridge-\S+ LLAMA3_70B GB300 fp8\S* fsdp", Recipe(leaves=20)),
    (r"bridge-\S+ LLAMA3_70B GB300 bf16 fsdp", Recipe(leaves=30)),
    (r"bridge-\S+ LLAMA3_70B B200 fp8\S* fsdp", Recipe(leaves=5)),
    (r"bridge-25.09 LLAMA3_70B GB200 mxfp8", Recipe(micro=1)),
    (r"bridge-skill Moonlight", Recipe(eager=True)),
    (r"nemo-grok-25.05 \S+ GB200", Recipe(captured=True)),
    (r"nemo-dsv3-25.05 \S+ GB200", Recipe(each=True)),
    (r"bridge-\S+ LLAMA3.1_405B G?B300 bf16 fsdp", Recipe(leaves=40)),
    (r"titan-2024a100 ", Recipe(own_norms=True)),
    (r"bridge-\S+ GPT OSS 120B (H100|GB200|B200) bf16", Recipe(again=LIGHT)),
    (r"bridge-\S+ GPT OSS 120B \S+ bf16", Recipe(each=True)),
    (r"bridge-\S+ Qwen3_235B_a22B (H100|B200)", Recipe(each=True)),
    (r"bridge-26.02\S* Qwen3_235B_a22B B300", Recipe(each=True)),
    (r"bridge-\S+ Qwen3_235B_a22B H100", Recipe(beside=True)),
    (r"bridge-25.11 Qwen3_235B_a22B B200", Recipe(beside=True)),
    (r"bridge-\S+ DeepSeekV3 H100", Recipe(beside=True)),
    (r"bridge-26.04.01 DeepSeekV3 B200 mxfp8", Recipe(beside=True)),
)


def recipe_of(row: Row) -> Recipe:
    """What configurations state of a row."""
    text, found = " ".join(row.get(c, "") for c in COLUMNS), UNSTATED
    for start, stated in RECIPES:
        if re.match(start, text):
            changes = {f.name: getattr(stated, f.name) for f in fields(stated)}
            found = replace(found, **{name: value for name, value in changes.items() if value})
    return found
