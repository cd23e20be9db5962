import re
from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from partita.base.errors import UsageError
from partita.spec.plan import (
    DEFAULT_ORDER,
    ContextPlan,
    DataPlan,
    MeshPlan,
    OffloadPlan,
    PipelinePlan,
    Plan,
    PrecisionPlan,
    RecomputePlan,
)
from partita.spec.plan_table import CHOICES, SCHEDULES, TARGETS, from_toml, to_toml

# a machine that is busy draws slowly
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
size = st.sampled_from([1, 1, 2, 3, 4, 8, 16])
schedules = st.sampled_from([*SCHEDULES, "v_1_2", "v_12_34"]) | st.text(min_size=1).map(
    lambda s: f"file:{s}"
)
contexts = st.builds(
    ContextPlan, st.sampled_from(["ring", "ulysses", "all_gather"]), st.integers(1, 4)
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    mesh = draw(
        st.builds(
            MeshPlan,
            size,
            size,
            size,
            size,
            size,
            size,
            size,
            st.booleans(),
            st.permutations(DEFAULT_ORDER).map(tuple) | st.just(DEFAULT_ORDER),
            size,
        )
    )
    context = draw(contexts)
    if draw(st.booleans()):
        inner = draw(st.sampled_from([d for d in range(1, mesh.cp + 1) if mesh.cp % d == 0]))
        context = ContextPlan("hybrid", inner)
    return Plan(
        mesh=mesh,
        pipeline=draw(
            st.builds(
                PipelinePlan,
                schedules,
                st.integers(1, 5),
                st.none() | st.integers(1, 99),
                st.lists(st.integers(0, 9), max_size=4).map(tuple),
            )
        ),
        data=draw(
            st.builds(
                DataPlan,
                st.integers(0, 3),
                st.booleans(),
                st.integers(0, 3),
                st.integers(1, 10**9),
                st.sampled_from(CHOICES["data", "accumulate"]),
            )
        ),
        context=context,
        recompute=draw(
            st.builds(
                RecomputePlan, st.sampled_from(CHOICES["recompute", "mode"]), st.integers(1, 4)
            )
        ),
        precision=draw(st.builds(PrecisionPlan, st.sampled_from(CHOICES["precision", "dtype"]))),
        offload=draw(
            st.builds(
                OffloadPlan,
                st.sampled_from(CHOICES["offload", "to"]),
                st.lists(st.sampled_from(TARGETS), unique=True).map(tuple),
            )
        ),
    )


@settings(UNHURRIED, max_examples=150)
@given(plans(), st.randoms(use_true_random=False))
@example(Plan(), None)
def test_line_and_table_are_the_plan(plan: Plan, random: object) -> None:
    line = str(plan)
    assert line.isascii()
    assert Plan.parse(line) == plan
    assert str(Plan.parse(line)) == line
    table = to_toml(plan)
    assert from_toml(table) == plan
    assert from_toml(table).pipeline.num_microbatches == plan.pipeline.num_microbatches
    assert re.fullmatch(r"[a-z0-9_-]{1,100}", plan.slug)
    if random and '"' not in line:
        words = line.split(" ")
        random.shuffle(words)  # type: ignore[attr-defined]
        assert Plan.parse("  ".join(words)) == plan


@settings(UNHURRIED)
@given(plans(), plans())
def test_equal_lines_are_equal_plans(a: Plan, b: Plan) -> None:
    assert (str(a) == str(b)) == (a == b)
    assert (a == b) <= (hash(a) == hash(b))


FULL = "pp4:zb_h1/16mb dp_replicate2 dp_shard4.zero3 cp2:ring tp8+sp ep8 recompute:selective bf16 offload:cpu"


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        (FULL, FULL),
        (" ".join(reversed(FULL.split())), FULL),
        ("", "1mb"),
        ("1mb", "1mb"),
        ("fp32", "1mb"),
        ("pp2", "pp2:1f1b"),
        ("pp2 4mb tp1 cp1", "pp2:1f1b/4mb"),
        ("dp4", "dp_replicate4"),
        ("dp4.zero1", "dp_shard4.zero1"),
        ("dp4 data.zero_stage=1", "dp_shard4.zero1"),
        ("dp8 ep8", "dp_shard8.zero0 ep8"),
        ("ep8 dp8.zero2", "dp_shard8.zero2 ep8"),
        ("dp2 dp_shard4", "dp_replicate2 dp_shard4.zero3"),
        ("dp2 ep4 dp_shard4", "dp_replicate2 dp_shard4.zero3 ep4"),
        ("dp4·zero1 recompute:full", "dp_shard4.zero1 recompute:full"),
        ("cp4:hybrid2x2", "cp4:hybrid2x2"),
        ("cp4 context.method=hybrid context.ulysses=4", "cp4:hybrid4x1"),
        ("pp4:interleaved_1f1bx2/8mb", "pp4:interleaved_1f1bx2/8mb"),
        ("pp4:zb_v", "pp4:zb_v"),
        ("pp4:v_1_2x2", "pp4:v_1_2"),
        ("pp4:dualpipev", "pp4:dualpipev"),
        ('pp4:"file:my.csv"/8mb', 'pp4:"file:my.csv"/8mb'),
        ('pp4:"a b·c/d.csv"x3', 'pp4:"file:a b\\u00b7c/d.csv"x3'),
        ("pp2 pipeline.split=5,3", "pp2:1f1b pipeline.split=5,3"),
        (
            "offload.targets=optimizer,activations offload:nvme",
            "offload:nvme offload.targets=optimizer,activations",
        ),
        ("order:pp,tp,cp,dp_shard,dp_replicate tp2", "tp2 order:pp,tp,cp,dp_shard,dp_replicate"),
        (
            "mesh.tp=2 mesh.sp=true data.reshard_after_forward=false",
            "tp2+sp data.reshard_after_forward=false",
        ),
        ("recompute.every=2 bf16 data.prefetch=0", "bf16 data.prefetch=0 recompute.every=2"),
        ("pipeline.schedule=gpipe", "pipeline.schedule=gpipe"),
    ],
)
def test_what_lines_mean(line: str, printed: str) -> None:
    assert str(Plan.parse(line)) == printed
    assert Plan.parse(printed) == Plan.parse(line)


def test_open_microbatches_equal_one_and_stay_open() -> None:
    assert Plan.parse("").pipeline.num_microbatches is None
    assert Plan.parse("1mb").pipeline.num_microbatches == 1
    assert Plan.parse("tp2") == Plan.parse("tp2 1mb")
    assert hash(Plan.parse("tp2")) == hash(Plan.parse("tp2 1mb"))
    assert Plan.parse("tp2") != Plan.parse("tp2 2mb")


def test_stages_a_rank() -> None:
    assert Plan.parse("pp4:zb_v").pipeline.virtual_stages == 2
    assert Plan.parse("pp4:interleaved_1f1bx3").pipeline.virtual_stages == 3
    assert Plan.parse("pp4:1f1b").pipeline.virtual_stages == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("pp4:zb_h9", "no schedule 'zb_h9'; did you mean 'zb_h2'"),
        ("tpp2", "did you mean 'tp2+sp'"),
        ("tp2 tp4", "'tp4' and 'tp2' both set mesh.tp"),
        ("tp2 tp2", "'tp2' stands twice"),
        ("pp2/4mb 8mb", "both set pipeline.num_microbatches"),
        ("bf16 fp32", "both set precision.dtype"),
        ("dp_replicate2.zero1", "dp_replicate has no zero stage"),
        ("dp_shard2.zero4", "4 is not within 0..3"),
        ("dp2.zero1 dp_shard4", "both set mesh.dp_shard"),
        ("cp4:hybrid", "cp4:hybrid2x2"),
        ("cp4:hybrid3x2", "6 ranks, cp is 4"),
        ("cp4:rong", "did you mean 'ring'"),
        ("mesh.tpp=3", "did you mean 'tp'"),
        ("mehs.tp=3", "did you mean 'mesh'"),
        ("mesh.tp=x", "a whole number"),
        ("mesh.sp=yes", "true or false"),
        ("pp0", "0 is not within"),
        ("tp99999999999999999999", "absurd"),
        ("tp9999999", "9999999 is not within"),
        ('pp2:"a', "never closed"),
        ("tp2é", "ASCII"),
        ("pp4:zb_vx3", "zb_v has 2 stages a rank"),
        ("recompute:half", "none, selective, full"),
        ("offload.targets=optimiser", "did you mean 'optimizer'"),
        ("order:tp,pp", "must name each of"),
        ("tp2+ps", "did you mean"),
        ("tp-1", "is not filled in; e.g. 'tp2+sp'"),
        ("tp2x2", "did you mean 'tp2+sp'? it is written tp<n>[+sp]"),
        ("model.hidden=4", "model is a table of the job"),
        ("auto", "`partita plan` without --plan searches"),
        ("train.seq_len=3 tp2", "train is a table of the job"),
        ("spam", "words are pp4:1f1b/8mb"),
        ("x" * 20_000, "at most 10000"),
    ],
)
def test_errors_teach(line: str, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        Plan.parse(line)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("sp", "tp2+sp"),
        ("tp4 +sp", "tp4+sp"),
        ("tp2sp", "tp2+sp"),
        ("cp2+sp tp4", "tp4+sp cp2"),
        ("zero3", "dp_shard2.zero3"),
        ("dp4 tp2 zero1", "dp_shard4.zero1 tp2"),
        ("dp4zero1", "dp_shard4.zero1"),
        ("tp2.zero1", "tp2 dp_shard2.zero1"),
        ("hsdp2x4", "dp_replicate2 dp_shard4.zero3"),
        ("pp2x2", "pp2:interleaved_1f1bx2"),
        ("pp2/8mb vpp2", "pp2:interleaved_1f1bx2/8mb"),
        ("PP2 TP2", "pp2 tp2"),
        ("tp 2", "tp2"),
        ("pp2:4mb", "pp2 4mb"),
        ("pp2/4mb:1F1B", "pp2:1f1b/4mb"),
        ("pp2:interleavedx2/4mb", "pp2:interleaved_1f1bx2/4mb"),
        ("gpipe pp2/4mb", "pp2:gpipe/4mb"),
        ("pp2,tp2", "pp2 tp2"),
        ("dp2 * tp2", "dp2 tp2"),
        ("4mb/pp2", "4mb pp2"),
        ("mb4", "4mb"),
        ("--tensor-parallel-size=2", "tp2"),
        ("fp32/bf16 tp2", "tp2 bf16"),
        ("mixed", "bf16"),
        ("full", "recompute:full"),
        ("offload:optimizer", "offload:cpu offload.targets=optimizer"),
        ("ring cp4", "cp4:ring"),
        ("ep8:etp2", "ep8 etp2"),
        ("seq_len=8 tp2", "tp2"),
        ("tp2 ddp4", "tp2 dp_replicate4"),
        ("bf16 fsdp8", "bf16 dp_shard8.zero3"),
        ("pp2 virtual_pipeline_model_parallel_size=2", "pp2:interleaved_1f1bx2"),
        ("pp2 --num-microbatches=8", "pp2 8mb"),
        ("pp0:interleavedx0/4mb", "pp2:interleaved_1f1bx2/4mb"),
        ("pp2x0", "pp2:interleaved_1f1bx2"),
        ("tp2 experts", "tp2 ep8"),
        ("tp2 order=pp,tp", "tp2 order:tp,cp,dp_shard,dp_replicate,pp"),
        ("single", "1mb"),
        ("cp2.ring", "cp2:ring"),
        ("fp32 fp32/bf16", "bf16"),
        ("4", "tp4"),
    ],
)
def test_a_near_miss_is_answered_with_a_rule_and_the_line_that_was_meant(
    line: str, meant: str
) -> None:
    with pytest.raises(UsageError) as found:
        Plan.parse(line)
    told = re.fullmatch(r"plan '(.*)': '(.*?)': (.+); e\.g\. '(.*)'", found.value.message)
    assert told
    assert (told[1], told[4]) == (line, meant)
    assert told[2] in line
    Plan.parse(meant)


@settings(UNHURRIED)
@given(st.text(alphabet='pdtce_shardximb0123456789:./+·"= ,\\', max_size=40))
def test_any_line_is_a_plan_or_a_usage_error(line: str) -> None:
    try:
        plan = Plan.parse(line)
    except UsageError:
        return
    assert Plan.parse(str(plan)) == plan


def test_tables_take_other_names() -> None:
    table = {
        "tensor_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "sequence_parallel": True,
        "gradient_accumulation_steps": 8,
        "data_parallel_size": 2,
        "precision": {"dtype": "bf16"},
    }
    assert str(from_toml(table)) == "pp4:1f1b/8mb dp_replicate2 tp2+sp bf16"
    assert str(from_toml({"dp": 8, "expert_parallel_degree": 8})) == "dp_shard8.zero0 ep8"
    for bad, text in [
        ({"tp": 2, "mesh": {"tp": 2}}, "p.tp: mesh.tp is given twice"),
        ({"tensor_paralel_size": 2}, "unknown key"),
        ({"mesh": {"tpp": 2}}, "p.mesh.tpp: unknown key; did you mean 'tp'"),
        ({"mesh": 3}, "p.mesh: expected 'object'"),
        ({"tp": "2"}, "p.mesh.tp: expected 'int', got 'str'"),
        ({"tp": 0}, "p.mesh.tp: 0 is not within"),
        ({"pipeline": {"schedule": "zb_v", "virtual_stages": 3}}, "2 stages a rank"),
        ({"context": {"method": "rong"}}, "'rong' is none of"),
        (
            {"recompute": {"modules": ["nose"]}},
            "p.recompute.modules: no 'nose'; did you mean 'norm'",
        ),
        ({"cp": 4, "context": {"method": "hybrid", "ulysses": 3}}, "3 does not divide cp 4"),
    ]:
        with pytest.raises(UsageError, match=re.escape(text)) as error:
            from_toml(bad, file="j.toml", prefix="p")
        assert error.value.file == "j.toml"


def test_every_field_can_be_said_as_a_word() -> None:
    for section in fields(Plan):
        default = getattr(Plan(), section.name)
        for f in fields(default):
            value = getattr(default, f.name)
            if (section.name, f.name) in CHOICES:
                other: object = CHOICES[section.name, f.name][-1]
            elif isinstance(value, bool):
                other = not value
            else:
                other = {
                    "order": DEFAULT_ORDER[::-1],
                    "schedule": "gpipe",
                    "split": (1, 2) if section.name == "pipeline" else 2,
                    "targets": ("optimizer",),
                    "modules": ("norm", "act"),
                    "costs": ("33_35_32x7", "36_39_36", "2"),
                    "num_microbatches": 4,
                    "zero_stage": 1,
                }.get(f.name, 2)
            plan = replace(Plan(), **{section.name: replace(default, **{f.name: other})})
            if isinstance(other, tuple):
                said = ",".join(map(str, other))
            else:
                said = str(other).lower() if isinstance(other, bool) else str(other)
            assert Plan.parse(f"{section.name}.{f.name}={said}") == plan


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("dp_shard8.FULL_SHARD", "dp_shard8.zero3"),
        ("dp8.full_shard bf16", "dp_shard8.zero3 bf16"),
        ("dp_shard8.SHARD_GRAD_OP", "dp_shard8.zero3 data.reshard_after_forward=false"),
        ("dp_shard8.NO_SHARD", "dp_shard8.zero0"),
        ("dp_replicate2 dp_shard4.HYBRID_SHARD", "dp_replicate2 dp_shard4.zero3"),
    ],
)
def test_fsdp_strategies_are_spellings_of_zero_stages(theirs, ours) -> None:
    assert Plan.parse(theirs) == Plan.parse(ours)
    with pytest.raises(UsageError, match="not understood"):
        Plan.parse(theirs.replace("SHARD", "SHARDS").replace("full_shard", "full_shards"))
