import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.base.errors import UsageError
from partita.spec.job import DataSpec, Job, TrainSpec

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.toml"
TRAIN = {"global_batch_size": 16, "seq_len": 32}


def load(*overrides: str, **table: object) -> Job:
    return Job.load({"model": "tiny", "cluster": "8xh100", "train": TRAIN, **table}, *overrides)


def test_quickstart() -> None:
    job = Job.load(QUICKSTART)
    assert str(job.plan) == "pp2:1f1b/4mb tp2+sp bf16"
    assert job.problems() == []
    assert job.micro_batch_size == 2
    assert 6 * job.model.parameters() * job.train.tokens_per_step * job.train.steps <= 8e12
    assert 16 * job.model.parameters() >= 1.5 * job.cluster.memory_limit_bytes
    assert job.data == DataSpec("python-stdlib", "train:1024", 0.05)


def test_defaults_are_the_contracts() -> None:
    train = TrainSpec(16, 256)
    assert (train.optimizer, train.lr, train.betas, train.eps, train.momentum) == (
        "adamw",
        3e-4,
        (0.9, 0.95),
        1e-8,
        0,
    )
    assert (train.weight_decay, train.clip_grad_norm, train.warmup_steps, train.lr_schedule) == (
        0.1,
        1.0,
        0,
        "constant",
    )
    assert (
        train.min_lr,
        train.eval_every,
        train.checkpoint_every,
        train.keep_last,
        train.comm_timeout_s,
    ) == (0, 0, 0, 2, 60)
    assert DataSpec("tokens:a.npy").eval_fraction == 0


@pytest.mark.parametrize("other", ["data.source=tokens:a.npy", "data.eval_source=b.txt"])
def test_a_share_that_is_not_held_out_is_told(other: str) -> None:
    (told,) = Job.load(QUICKSTART, other, "data.eval_fraction=0.05").problems()
    assert told.severity == "warning" and "eval_fraction 0.05 holds nothing out" in told.message
    assert "data.eval_source" in told.message
    assert Job.load(QUICKSTART, other, "data.eval_fraction=0").problems() == []


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    job = Job.load(QUICKSTART, "cluster.memory_bytes=40e6", "model.layers=4", "data.mask=m.npy")
    path = tmp_path / "job.toml"
    path.write_text(job.to_toml())
    assert Job.load(path) == job
    assert tomllib.loads(job.to_toml())["plan"] == str(job.plan)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["plan=tp2 4mb"], "tp2 4mb"),
        (['plan="tp2 4mb"'], "tp2 4mb"),
        (["plan="], "16mb"),
        (["plan=1mb"], "1mb"),
        (["plan=pp2/4mb", "plan.pipeline.split=1,1"], "pp2:1f1b/4mb pipeline.split=1,1"),
        (["plan=pp2/4mb", "plan.pipeline.split=[1, 1]"], "pp2:1f1b/4mb pipeline.split=1,1"),
        (
            ["plan=pp2/4mb", "plan.pipeline.num_microbatches=2", "plan.precision.dtype=bf16"],
            "pp2:1f1b/2mb bf16",
        ),
        (["plan=pp2:zb_v/4mb", "plan.tp=2", "plan.mesh.sp=true"], "pp2:zb_v/4mb tp2+sp"),
        (["plan=dp4", "train.micro_batch_size=2"], "dp_replicate4 2mb"),
        (["plan=dp2 dp_shard2.zero1"], "dp_replicate2 dp_shard2.zero1 4mb"),
    ],
)
def test_plans_meet_the_job(overrides: list[str], line: str) -> None:
    job = load(*overrides)
    assert str(job.plan) == line
    assert job.plan.pipeline.num_microbatches is not None
    ways = job.plan.num_microbatches * job.plan.data_parallel_size
    assert job.micro_batch_size * ways == 16
    assert not [p for p in job.problems() if p.severity == "error"]


def test_plan_table() -> None:
    assert str(load(plan={"tensor_parallel_size": 2, "num_microbatches": 8}).plan) == "tp2 8mb"


@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 6),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 3),
)
def test_nearest_plans_are_legal(
    batch: int, replicate: int, shard: int, pp: int, tp: int, mb: int | None, micro: int | None
) -> None:
    line = f"dp_replicate{replicate} dp_shard{shard} pp{pp} tp{tp}" + (f" {mb}mb" if mb else "")
    job = load(
        "plan=" + line,
        f"train.global_batch_size={batch}",
        *([f"train.micro_batch_size={micro}"] if micro else []),
    )
    errors = [p for p in job.problems() if p.severity == "error"]
    legal = (
        replicate * shard * pp * tp <= 8
        and job.micro_batch_size * job.plan.num_microbatches * replicate * shard == batch
    )
    assert (not errors) == legal
    for problem in errors:
        if problem.nearest is None:
            assert micro
            assert batch % micro
        else:
            assert not [
                p for p in job.with_plan(problem.nearest).problems() if p.severity == "error"
            ]


def test_all_problems_at_once() -> None:
    problems = load("plan=pp4/3mb tp4 dp3.zero0", "model.max_seq_len=8").problems()
    assert [p.rule for p in problems] == ["world", "batch", "seq_len"]
    assert problems[0].message == "pp*dp_shard*tp = 4*3*4 = 48 ranks, the cluster has 8"
    assert problems[1].message.endswith("1*3*1*3 = 9, global_batch_size is 16")
    assert problems[2].severity == "warning"
    assert (
        load("plan=1mb", cluster="4xh100").problems()[0].message
        == "1 rank, 3 of 4 devices stay idle"
    )


def test_positions_that_do_not_exist() -> None:
    gpt = {"family": "gpt2", "layers": 1, "hidden": 8, "heads": 2, "vocab": 9, "max_seq_len": 16}
    found = load(model=gpt, cluster="1xh100").problems()
    assert [(p.rule, p.severity) for p in found] == [("seq_len", "error")]


def test_paths_stand_relative_to_the_job(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('preset = "2xh100"')
    (tmp_path / "m.toml").write_text('preset = "tiny"')
    path = tmp_path / "My job.toml"
    path.write_text(
        '[model]\npath = "m.toml"\n[cluster]\npath = "c.toml"\n'
        '[data]\nsource = "tokens:d/a.npy"\ntokenizer = "t.json"\nmask = "/m.npy"\n'
        "[train]\nglobal_batch_size = 2\nseq_len = 8\n"
    )
    job = Job.load(path)
    assert job.data.source == f"tokens:{tmp_path}/d/a.npy"
    assert (job.data.tokenizer, job.data.mask) == (f"{tmp_path}/t.json", "/m.npy")
    assert (job.name, job.model.layers, job.cluster.devices) == ("My-job", 2, 2)
    strings = Job.load(
        {"model": str(tmp_path / "m.toml"), "cluster": str(tmp_path / "c.toml"), "train": TRAIN}
    )
    assert (strings.model.name, strings.cluster.devices) == ("tiny", 2)


def test_from_parts() -> None:
    job = Job.of(
        "llama3-405b", "16384xh100", "pp16/16mb tp8+sp dp128", global_batch_size=2048, seq_len=8192
    )
    assert job.problems() == []
    assert job.micro_batch_size == 1
    with pytest.raises(UsageError, match="seq_len: missing"):
        Job.of("tiny", "laptop", global_batch_size=1)


@pytest.mark.parametrize(
    ("override", "key", "text"),
    [
        ("plan=ttp2", "plan", "did you mean 'tp2+sp'"),
        ("plan=[1]", "plan", "expected"),
        ("plan.mesh.tpp=2", "plan.mesh.tpp", "did you mean 'tp'"),
        ("plan.tp", "plan.tp", "section.field=value"),
        ("trai.x=1", "trai", "did you mean 'train'"),
        ("train.lr=nan", "train.lr", "not a finite number"),
        ("train.lr=-1", "train.lr", "not within"),
        ("train.steps=many", "train.steps", "expected 'int', got 'str'"),
        ("train.betas=[0.9, 1.0]", "train.betas", "beta < 1"),
        ("train.optimizer=adamww", "train.optimizer", "did you mean 'adamw'"),
        ("train.keep_last=0", "train.keep_last", "not within"),
        ("model.layers=1000000000000", "model.layers", "not within"),
        ("model.heads=-1", "model.heads", "not within"),
        ("model.init=pretrained", "model.init", "model.path"),
        ("model.init=3", "model.init", "random, pretrained"),
        ("data.tokenizer=train:x", "data.tokenizer", "train:1024"),
        ("data.eval_fraction=2", "data.eval_fraction", "not within"),
        ("name=a/b", "name", "folder"),
        ("seed=-1", "seed", "not within"),
        (
            'train.track=["tensorbord"]',
            "train.track",
            "tensorboard, wandb, mlflow, which pip install",
        ),
        ("train.track=wandb", "train.track", 'a list is written ["wandb"]'),
        ("device=gpu", "device", "'gpu' is none of auto, cpu, cuda; did you mean 'cpu'"),
        ("cluster.preset=labtop", "cluster.preset", "did you mean 'laptop'"),
        ("cluster.path=no.toml", "cluster.path", "no such file"),
        ("model.adapter=nowhere", "model.adapter", "no such file"),
        ("plan.mesh=2", "plan.mesh", "write plan.section.field=value"),
        ("model.path=no", None, "no such file"),
    ],
)
def test_errors_name_file_and_key(
    tmp_path: Path, override: str, key: str | None, text: str
) -> None:
    path = tmp_path / "job.toml"
    path.write_text(QUICKSTART.read_text().replace('preset = "quickstart"', 'preset = "tiny"'))
    if ".path=" in override:
        stated = "tiny" if "model" in override else "laptop"
        path.write_text(path.read_text().replace(f'preset = "{stated}"', ""))
    with pytest.raises(UsageError) as error:
        Job.load(path, override)
    assert text in error.value.message
    if key:
        assert error.value.key == key
    if not override.startswith("plan."):
        assert "\n" not in error.value.message
        assert error.value.message.startswith(str(tmp_path))


def test_missing_sections() -> None:
    with pytest.raises(UsageError, match="model: missing"):
        Job.load({"train": TRAIN})
    with pytest.raises(UsageError, match="no such file"):
        Job.load("jobs/no-such-job.toml")


def test_no_torch_and_no_numpy_are_imported() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None; import partita; "
        f"job = partita.Job.load({str(QUICKSTART)!r}); print(job.plan)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.strip() == "pp2:1f1b/4mb tp2+sp bf16", done.stderr


def test_a_word_on_the_command_line_is_a_preset_or_a_path_as_in_the_file() -> None:
    job = load("cluster=2xh100", "model=llama3.2-1b", "model.layers=2")
    assert (job.cluster.devices, job.model.hidden, job.model.layers) == (2, 2048, 2)
    assert load('model="llama3-8b"').model.hidden == 4096
    with pytest.raises(UsageError, match=r"no\.toml"):
        load("cluster=no.toml")
