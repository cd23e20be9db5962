import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from partita.base.errors import UsageError
from partita.simulate.work import block_work
from partita.spec.families import program
from partita.spec.model import PRESETS, ModelSpec, RopeScaling
from partita.spec.model_hf import model_of
from partita.spec.program import Block

TINY: dict[str, Any] = {
    "family": "llama",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "ffn_hidden": 96,
    "vocab": 50,
    "max_seq_len": 16,
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("tinyllama-1.1b", 1_100_048_384),
        ("mixtral-8x7b", 46_702_792_704),
        ("mistral-7b", 7_241_732_096),
        ("qwen2-7b", 7_615_616_512),
        ("qwen2-72b", 72_706_203_648),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("qwen1.5-moe-a2.7b", 14_315_784_192),
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v2", 235_741_434_880),
        ("deepseek-v3", 671_026_419_200),
        ("gemma2-2b", 2_614_341_888),
        ("gemma2-9b", 9_241_705_984),
        ("gemma2-27b", 27_227_128_320),
        ("gemma3-270m", 268_098_176),
        ("gemma3-1b", 999_885_952),
        ("gemma3-4b", 3_880_263_168),
        ("gemma3-12b", 11_766_034_176),
        ("gemma3-27b", 27_009_346_304),
        ("phi3-mini", 3_821_079_552),
        ("phi4", 14_659_507_200),
        ("smollm3-3b", 3_075_098_624),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("gpt-neox-20b", 20_554_567_680),
        ("pythia-70m", 70_426_624),
        ("pythia-160m", 162_322_944),
        ("pythia-410m", 405_334_016),
        ("pythia-1b", 1_011_781_632),
        ("pythia-1.4b", 1_414_647_808),
        ("pythia-2.8b", 2_775_208_960),
        ("pythia-6.9b", 6_857_302_016),
        ("pythia-12b", 11_846_072_320),
        ("bloom-560m", 559_214_592),
        ("bloom-1b1", 1_065_314_304),
        ("bloom-1b7", 1_722_408_960),
        ("bloom-3b", 3_002_557_440),
        ("bloom-7b1", 7_069_016_064),
        ("bloom-176b", 176_247_271_424),
        ("quickstart", 2_755_008),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    model = ModelSpec.from_preset(name)
    assert model.parameters() == parameters
    assert f"{parameters:_}" in (PRESETS / f"{name}.toml").read_text()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt3-125m", 0.125), ("gpt3-350m", 0.356), ("gpt3-760m", 0.76), ("gpt3-1.3b", 1.3),
        ("gpt3-2.7b", 2.7), ("gpt3-6.7b", 6.7), ("gpt3-13b", 13), ("gpt3-175b", 174.604),
        ("megatron-8.3b", 8.3), ("mt-nlg-530b", 530), ("switch-base-128", 7),
        ("switch-c-2048", 1571),
    ],
)  # fmt: skip
def test_counts_that_were_published_rounded(name: str, billions: float) -> None:
    digits = len(str(billions).partition(".")[2])
    assert round(ModelSpec.from_preset(name).parameters() / 1e9, digits) == billions


@pytest.mark.parametrize(
    ("name", "columns", "billions"),
    [("base", 2 * 3072, 7.4), ("large", 2 * 4096, 26), ("xxl", 3 * 10240, 395)],
)
def test_switch_has_its_published_size_with_its_decoders_cross_attention(
    name: str, columns: int, billions: float
) -> None:
    """T5's decoder, half of the layers, attends to its encoder besides: four matrices. `columns`: of the
    matrices of an mlp as they were published with the size."""
    model = ModelSpec.from_preset(f"switch-{name}-128")
    cross = 4 * model.hidden * model.heads * model.head_dim * model.layers // 2
    mlps = model.layers // 2 * (1 + model.experts)
    wider = mlps * model.hidden * (3 * model.ffn_hidden - columns)
    digits = len(str(billions).partition(".")[2])
    assert round((model.parameters() + cross - wider) / 1e9, digits) == billions


def test_every_preset_round_trips() -> None:
    for name in ModelSpec.preset_names():
        model = ModelSpec.load(name)
        assert model.name == name
        assert ModelSpec.from_toml(model.to_toml()) == model
        assert hash(model)


def test_quickstart_keeps_its_budget() -> None:
    model = ModelSpec.from_preset("quickstart")
    assert 6 * model.parameters() * 100 * 16 * 256 <= 8e12


def test_flops_by_hand() -> None:
    model = ModelSpec(**{**TINY, "kv_heads": 2})
    matmul = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    attention = 2 * 2 * 16 * 64  # QK' and PV: 2 products, 2 FLOPs, 16 positions, 64 channels
    head = 2 * 50 * 64
    assert model.forward_flops_per_token(16, "model_full") == 2 * (matmul + attention) + head
    assert model.forward_flops_per_token(16) == 2 * (matmul + attention / 2) + head
    forward = model.forward_flops_per_token(16, "hw")
    assert model.train_flops_per_token(16, "hw") == 3 * forward
    assert model.train_flops_per_token(16, "hw", "full") == 4 * forward - head
    assert model.train_flops_per_token(16, "hw", "selective") == 3 * forward + 2 * attention
    assert model.train_flops_per_token(16, recompute="full") == 3 * model.forward_flops_per_token(
        16
    )


def test_a_window_bounds_the_keys_a_query_sees() -> None:
    """Window w of s keys: w(w+1)/2 + (s-w)w pairs, s w - w^2/2 without the diagonal's half."""
    whole = ModelSpec(
        family="llama", layers=1, hidden=8, heads=2, ffn_hidden=8, vocab=8, max_seq_len=64
    )
    narrow = replace(whole, sliding_window=16)
    per_pair = 4 * whole.hidden
    assert narrow.attention_flops_per_token(64) == per_pair * (16 * 64 - 16**2 / 2) / 64
    assert replace(whole, sliding_window=64).attention_flops_per_token(64) == per_pair * 32


def test_layers_that_differ_are_blocks_of_their_own_at_their_own_price() -> None:
    """Seven layers, two letters over and over: each kind one block; kernels of a window are shorter, and
    those without RoPE have no such op."""
    sizes = {**TINY, "layers": 7, "max_seq_len": 64}
    model = ModelSpec(**sizes, sliding_window=16, attention_pattern="sn", local_rope_theta=100.0)
    assert model.windows == (16, 0) and [model.rotates_at(i) for i in range(3)] == [
        True,
        False,
        True,
    ]
    blocks = program(model, 1, 64).blocks[1:-1]
    assert [b is blocks[i % 2] for i, b in enumerate(blocks)] == [True] * 7
    assert [any(op.name == "attention.rope_q" for op in b.ops()) for b in blocks[:2]] == [
        True,
        False,
    ]
    narrow, full = (
        next(k for k in block_work(typed(b), {}).forward if k.kind == "attention")
        for b in blocks[:2]
    )
    assert narrow.flops / full.flops == 0.25 * (2 - 0.25)
    mean = model.attention_flops_per_token(64) * 7
    each = (replace(model, **ONE, sliding_window=w).attention_flops_per_token(64) for w in (16, 0))
    assert mean == pytest.approx(sum(n * x for n, x in zip((4, 3), each, strict=True)))


ONE: dict[str, Any] = {"attention_pattern": "", "local_rope_theta": 0.0}


def typed(block: Block) -> Block:
    """Every tensor in fp32."""
    return replace(block, tensors={n: t.typed("fp32") for n, t in block.tensors.items()})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_pattern": "sx", "sliding_window": 4}, "letters beside s, f and n"),
        ({"attention_pattern": "sf"}, "'sf' with sliding_window 0"),
        ({"attention_pattern": "f", "sliding_window": 4}, "'f' with sliding_window 4"),
        ({"attention_pattern": "fff"}, "3 letters for 2 layers"),
        ({"local_rope_theta": 100.0}, "a window, which this model has not"),
        ({"family": "gpt2", "attention_pattern": "n"}, "n leaves RoPE out"),
    ],
)
def test_a_pattern_that_cannot_be(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        ModelSpec(**{**TINY, **changes})


def test_flops_are_six_times_parameters() -> None:
    """The rule of thumb of the scaling-law papers, for a short sequence."""
    model = ModelSpec.from_preset("llama3-8b")
    lookup = model.vocab * model.hidden
    assert model.train_flops_per_token(1, "model_full") == pytest.approx(
        6 * (model.parameters() - lookup), rel=1e-3
    )


def test_what_follows_from_other_fields() -> None:
    gpt = ModelSpec(family="gpt2", layers=1, hidden=32, heads=2, vocab=10, max_seq_len=8)
    assert (gpt.kv_heads, gpt.head_dim, gpt.ffn_hidden, gpt.tied) == (2, 16, 128, True)
    llama = ModelSpec(**TINY)
    assert (llama.kv_heads, llama.head_dim, llama.tied) == (4, 16, False)
    wider = ModelSpec.from_toml({"preset": "tiny", "hidden": 128, "heads": 8})
    assert (wider.head_dim, wider.kv_heads, wider.name) == (16, 2, "tiny changed")
    assert ModelSpec.from_toml({"preset": "gpt2", "heads": 6}).kv_heads == 6


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"layers": 10**12}, "layers"),
        ({"heads": -1}, "heads"),
        ({"hidden": 65}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv_heads": -2}, "kv_heads"),
        ({"vocab": 0}, "vocab"),
        ({"ffn_hidden": 0}, "ffn_hidden"),
        ({"head_dim": 15}, "head_dim"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"dropout": 0.5}, "dropout"),
        ({"rope_scaling": {"factor": -1.0}}, "rope_scaling.factor"),
        ({"famly": 1}, "famly"),
        ({"experts": 4, "top_k": 1, "expert_every": 3}, "expert_every"),
        ({"experts": 4, "top_k": 1, "expert_every": 0}, "expert_every"),
        ({"expert_every": 2}, "expert_every"),
        ({"family": "gpt3"}, "family"),
        ({"family": "gpt2", "kv_heads": 2}, "kv_heads"),
        ({"family": "gpt2", "head_dim": 8}, "head_dim"),
        ({"family": "gpt2", "dropout": 1.0}, "dropout"),
        ({"family": "bloom", "kv_heads": 2}, "kv_heads"),
        ({"family": "gpt_neox", "rotary_pct": 0.2}, "rotary_pct"),
        ({"family": "gpt_neox", "rotary_pct": 1.5}, "rotary_pct"),
        ({"family": "gpt_neox", "dropout": 0.1}, "dropout"),
        ({"family": "gpt2", "rotary_pct": 0.5}, "rotary_pct"),
        ({"experts": 2, "top_k": 1, "norm_placement": "both"}, "norm_placement"),
        ({"attention_softcap": -1.0}, "attention_softcap"),
        ({"family": "gpt2", "gelu": "erf"}, "gelu"),
        ({"family": "bloom", "parallel_residual": True}, "parallel_residual"),
        ({"family": "gpt2", "rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"preset": "llama3-9b"}, "preset"),
        ({"preset": 3}, "preset"),
        ({"preset": "tiny", "path": "x"}, "path"),
    ],
)
def test_absurd_models_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError) as error:
        ModelSpec.from_toml({**TINY, **change}, file="job.toml")
    assert error.value.key == f"model.{key}"
    assert error.value.message.startswith(f"job.toml: model.{key}: ")
    assert error.value.file == "job.toml"


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "vocab_size": 50,
    "n_inner": None,
    "activation_function": "gelu_new",
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def write(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_hugging_face_llama(tmp_path: Path) -> None:
    expected = ModelSpec(
        **{**TINY, "kv_heads": 2, "norm_eps": 1e-6, "rope_theta": 5e5, "name": tmp_path.name},
        rope_scaling=RopeScaling(factor=8.0),
    )
    assert ModelSpec.load(write(tmp_path, LLAMA)) == expected
    old = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    new = {
        **old,
        "rope_parameters": {**LLAMA["rope_scaling"], "rope_theta": 5e5},
    }  # as transformers 5 writes
    assert ModelSpec.from_hf_config(write(tmp_path, new)) == expected
    plain = ModelSpec.load(write(tmp_path, old) / "config.json")
    assert (plain.rope_theta, plain.rope_scaling, plain.tied) == (10_000.0, None, False)
    yarn = {**old, "rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}}
    long = ModelSpec.load(write(tmp_path, yarn)).rope_scaling
    assert long == RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16)  # the model's
    changed = ModelSpec.from_toml({"path": tmp_path.name, "layers": 5}, folder=tmp_path.parent)
    assert changed.layers == 5


def test_hugging_face_gpt2(tmp_path: Path) -> None:
    said = {
        "_num_labels": 1,
        "_model_name_or_path": "gpt2",
        "task_specific_params": {"text-generation": {"do_sample": True}},
    }
    model = ModelSpec.load(write(tmp_path, GPT2 | said))
    assert model == ModelSpec(
        family="gpt2", layers=2, hidden=32, heads=2, vocab=50, max_seq_len=16, name=tmp_path.name
    )


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {**LLAMA, "model_type": "qwen3", "attention_bias": True},
            "attention_bias: True is not supported; accepted: False",
        ),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        (
            {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; accepted: 'default', 'linear', 'llama3', 'yarn'",
        ),
        (
            {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
            "rope_scaling.attention_factor: 1.5",
        ),
        (
            {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "long_factor": [1.0]}},
            "rope_scaling.long_factor: [1.0]",
        ),
        ({**LLAMA, "rope_scaling": 3}, "an object is wanted"),
        ({**LLAMA, "num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({**LLAMA, "num_attention_heads": "4"}, "num_attention_heads"),
        ({**LLAMA, "model_type": "mamba"}, "'mamba' is not supported; llama, mistral, mixtral"),
        ({**GPT2, "embd_pdrop": 0.1}, "embd_pdrop: 0.1"),
        ({**GPT2, "attn_pdrop": 0.1}, "attn_pdrop: 0.1 differs from resid_pdrop (0.0)"),
        ({k: v for k, v in GPT2.items() if k != "attn_pdrop"}, "attn_pdrop: 0.1"),
        ({**GPT2, "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({**LLAMA, "sliding_window": 512}, "sliding_window: 512"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "save them dequantized first"),
        ({**LLAMA, "logits_scaling": 8.0, "qk_norm": True}, "qk_norm: True is not known"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2"}, "config.json: n_layer: missing, and it has no default\n"),
        (
            {**LLAMA, "model_type": "gpt2"},
            "hidden_size: 64 is not read: model_type gpt2 has it as n_embd",
        ),
        (
            {**LLAMA, "num_attention_heads": 5},
            "hidden_size 64 is not divisible by num_attention_heads 5",
        ),
        (
            {
                **LLAMA,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": "9",
                },
            },
            "rope_scaling.original_max_position_embeddings: expected 'int'",
        ),
        ({**LLAMA, "mlp_only_layers": 3}, "mlp_only_layers: a list is wanted, not 3"),
        ({**LLAMA, "rope_scaling": {"type": []}}, "rope_type: [] is not supported"),
        ({"hidden_size": 4}, "model_type: missing; llama, "),
        ({"model_type": ["llama"]}, "is not supported"),
        ([], "object is wanted"),
    ],
)
def test_hugging_face_refusals(tmp_path: Path, config: Any, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)) as error:
        ModelSpec.load(write(tmp_path, config))
    assert "config.json" in (error.value.file or "")


def test_hugging_face_experts_that_a_config_leaves_out(tmp_path: Path) -> None:
    """As transformers fills them in: such a folder is no dense model."""
    plain = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    found = [
        ModelSpec.load(write(tmp_path, {**plain, "model_type": kind}))
        for kind in ("mixtral", "qwen3_moe")
    ]
    assert [(m.experts, m.top_k) for m in found] == [(8, 2), (128, 8)]
    assert [m.expert_ffn_hidden for m in found] == [found[0].ffn_hidden, 768]


def test_load_names_the_nearest_preset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'llama3-8b'"):
        ModelSpec.load("llama3-8")
    with pytest.raises(UsageError, match="no such file"):
        ModelSpec.load(tmp_path / "config.json")
    path = tmp_path / "m.toml"
    path.write_text('[model]\npreset = "tiny"\nlayers = 3\n')
    assert ModelSpec.load(path).layers == 3
    path.write_text('preset = "tiny"\nlayrs = 3\n')
    with pytest.raises(UsageError, match=r"m\.toml: layrs: unknown key; did you mean 'layers'"):
        ModelSpec.load(path)


MOE = {
    "family": "llama",
    "layers": 3,
    "hidden": 8,
    "heads": 2,
    "ffn_hidden": 12,
    "vocab": 7,
    "max_seq_len": 4,
}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"top_k": 2}, "top_k"),
        ({"experts": 4}, "top_k"),
        ({"experts": 4, "top_k": 5}, "top_k"),
        ({"experts": 4, "top_k": 2, "dense_layers": 3}, "dense_layers"),
        ({"experts": 4, "top_k": 2, "router_groups": 3}, "router_groups"),
        ({"experts": 6, "top_k": 3, "router_groups": 3}, "router_top_groups"),
        ({"experts": 4, "top_k": 2, "capacity_factor": 0.0}, "capacity_factor"),
        ({"experts": 4, "top_k": 2, "family": "gpt2"}, "experts"),
    ],
)
def test_experts_that_cannot_be(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError) as error:
        ModelSpec.from_toml({**MOE, **fields})
    assert error.value.key == f"model.{key}"


def test_experts_count_in_parameters_and_only_the_chosen_in_flops() -> None:
    dense = ModelSpec.from_toml(MOE)
    moe = ModelSpec.from_toml(
        {
            **MOE,
            "experts": 4,
            "top_k": 2,
            "shared_experts": 1,
            "expert_ffn_hidden": 5,
            "dense_layers": 1,
        }
    )
    expert, router, mlp = 3 * 8 * 5, 4 * 8, 3 * 8 * 12
    assert moe.parameters() - dense.parameters() == 2 * (5 * expert + router - mlp)
    more = moe.forward_flops_per_token(4) - dense.forward_flops_per_token(4)
    assert more == 2 * 2 * (3 * expert + router - mlp)
    assert (
        ModelSpec.from_toml({**moe.to_toml(), "router_bias": True}).parameters()
        == moe.parameters() + 8
    )


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (
            {"layers": 0, "dropout": 2.0, "norm_eps": 3.0, "ffn_hidden": 0},
            ["layers", "ffn_hidden", "dropout", "norm_eps", "dropout"],
        ),
        (
            {"rope_theta": 0.5, "experts": 4, "top_k": 9, "router_groups": 3, "lora_rank": 10**4},
            ["rope_theta", "top_k", "router_groups", "lora_rank"],
        ),
        ({"top_k": 2, "z_loss": 1.0, "lora_alpha": 2.0}, ["top_k", "z_loss", "lora_alpha"]),
    ],
)
def test_all_that_is_wrong_is_told_at_once(change: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        ModelSpec.from_toml({**TINY, **change}, file="job.toml")
    told = [line.split(": ")[1] for line in error.value.message.splitlines()]
    assert told == [f"model.{key}" for key in keys] == list(error.value.keys)


def test_groups_of_experts_that_are_missing_are_named_as_their_config_has_them() -> None:
    config = {
        "model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "vocab_size": 64,
        "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    with pytest.raises(UsageError) as told:
        model_of(config, Path("config.json"))
    assert told.value.keys == ("n_group", "topk_group")
