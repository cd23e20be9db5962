"""`partita launch`: what is written is read back by those who read it: bash, YAML, Python."""

import ast
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from partita.base.errors import PlanError, UsageError
from partita.cli.main import application
from partita.launch.launch import Launch, text
from partita.spec.job import Job

JOB = """
name = "Two_hosts"
device = "cpu"
plan = "dp_shard2.zero1 tp2+sp"
[model]
preset = "quickstart"
[cluster]
preset = "laptop"
devices_per_node = 2
[data]
source = "a text's file.txt"
tokenizer = "byte"
[train]
steps = 3
global_batch_size = 8
seq_len = 64
lr = 1e-3
"""
PLAN = "dp_shard2.zero1 tp2+sp 4mb"
STANDINS = {  # of Slurm's commands: each says what it was given
    "srun": 'printf "%s\\n" "$@" > srun.args; [ "$SRUN_RC" ] && exit $SRUN_RC; exec sleep ${SRUN_S:-0}',
    "scontrol": 'if [ "$1" = show ]; then echo n1; echo n2; else echo "$@" > scontrol.args; fi',
    "scancel": 'echo "$@" > scancel.args; pkill -P "$(cat bash.pid)" sleep',
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job's file.toml"
    path.write_text(JOB)
    return path


def written(job: Path, where: str, *stated: str) -> str:
    loaded = Job.load(str(job))
    return text(Launch.of(loaded, str(job), ["train.lr=2e-3"]), where, stated, job.parent)


def bash(job: Path, script: str, **more: str) -> subprocess.Popen[str]:
    """The script on a host that has stand-ins for Slurm's commands."""
    folder = job.parent
    for name, body in STANDINS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "run.sh").write_text(script)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", **more}
    env |= {"SLURM_JOB_ID": "7"}
    line = ["bash", "-c", 'echo $$ > bash.pid; exec bash "$0"', "run.sh"]
    return subprocess.Popen(line, cwd=folder, env=env, text=True, stdout=subprocess.DEVNULL)


def test_slurm_starts_torchrun_on_every_host(job: Path):
    script = written(
        job, "slurm", "partition=gpu", "exclusive=", "time=1:00:00", "python=/an env/python"
    )
    assert {"#SBATCH --nodes=2", "#SBATCH --partition=gpu", "#SBATCH --exclusive"} <= set(
        script.splitlines()
    )
    assert bash(job, script).wait(20) == 0
    args = (job.parent / "srun.args").read_text().splitlines()
    assert args[args.index("/an env/python") :] == [
        "/an env/python", "--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-id", "7-0", "--rdzv-endpoint", "n1:20007",
        "-m", "partita", "train", str(job), "train.lr=2e-3", f"plan={PLAN}",
    ]  # fmt: skip
    assert not (job.parent / "scontrol.args").exists()  # it ended by itself


def test_a_job_that_fails_each_time_it_starts_ends(job: Path):
    """Kubernetes waits longer each time; only a time limit queues it again."""
    assert bash(job, written(job, "slurm"), SRUN_RC="71", SLURM_RESTART_COUNT="1").wait(20) == 71
    assert not (job.parent / "scontrol.args").exists()
    *_, made = yaml.safe_load_all(written(job, "kubernetes", "image=i", "claim=c", "failures=4"))
    pod = made["spec"]["template"]["spec"]
    assert (made["spec"]["backoffLimit"], pod["restartPolicy"]) == (4, "Never")
    assert "--max-restarts=3" in pod["containers"][0]["command"]
    ray = written(job, "ray", "restarts=2")
    assert (
        "HOSTS, RANKS, RESTARTS, GRACE_S = 2, 2, 2, 120" in ray and ray.count("start.remote(") == 1
    )


@pytest.mark.parametrize(("attempt", "again"), [("0", True), ("10", False)])
def test_slurm_stops_the_step_before_its_time_and_queues_again(
    job: Path, attempt: str, again: bool
):
    more = {"SRUN_S": "20", "SLURM_RESTART_COUNT": attempt}
    process = bash(job, written(job, "slurm"), **more)
    while not (job.parent / "srun.args").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) != 0
    assert (job.parent / "scancel.args").read_text() == "--signal=TERM 7.0\n"
    assert (job.parent / "scontrol.args").exists() == again


def test_kubernetes_holds_the_job_and_starts_a_pod_a_host(job: Path):
    said = written(job, "kubernetes", "image=me/partita:1", "claim=runs", "memory=8Gi")
    config, service, made = yaml.safe_load_all(said)
    assert config["data"]["job.toml"].strip() == JOB.strip()
    assert {x["metadata"]["name"] for x in (config, service, made)} == {"two-hosts"}
    spec = made["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["completions"], spec["parallelism"]) == (2, 2)
    command = container["command"]
    assert "--rdzv-endpoint=two-hosts-0.two-hosts:29500" in command
    assert command[-3:] == ["/etc/partita/job.toml", "train.lr=2e-3", f"plan={PLAN}"]
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "8Gi"}
    shown = ["sh", "-c", command[2].replace('exec "$0"', "echo")]  # the shell's own part of it
    line = subprocess.run(shown, env={"JOB_COMPLETION_INDEX": "0"}, capture_output=True, text=True)
    assert line.stdout == "-m torch.distributed.run --rdzv-conf is_host=1\n"


def test_ray_script_is_python(job: Path):
    tree = ast.parse(written(job, "ray", "port=4000"))
    found = {
        t.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for t in node.targets
        if isinstance(t, ast.Name) and t.id in ("FOLDER", "JOB", "WORDS")
    }
    assert found == {
        "FOLDER": str(job.parent), "JOB": str(job), "WORDS": ["train.lr=2e-3", f"plan={PLAN}"]
    }  # fmt: skip


def test_a_gpu_job_asks_for_gpus(job: Path):
    job.write_text(
        JOB.replace('"cpu"', '"cuda"').replace('"laptop"\ndevices_per_node = 2', '"16xh100"')
    )
    job.write_text(
        job.read_text().replace("dp_shard2.zero1", "dp_shard8.zero1").replace("= 8\n", "= 64\n")
    )
    assert "#SBATCH --gpus-per-node=8\n" in written(job, "slurm")
    assert "--gpus-per-node" not in written(job, "slurm", "gres=gpu:h100:8")
    assert "nvidia.com/gpu: 8" in written(job, "kubernetes", "image=i", "claim=c")
    assert '"GPU": RANKS' in written(job, "ray")


def test_all_that_is_wrong_is_told_at_once(job: Path):
    with pytest.raises(UsageError) as told:
        written(job, "kubernetes", "imag=me", "port=0", "port")
    every = [told.value.message, *(x for _, x in told.value.others)]
    for words in (
        "did you mean 'image'?",
        "port = '0'",
        "not 'port'",
        "--set image=",
        "--set claim=",
    ):
        assert sum(words in x for x in every) == 1
    with pytest.raises(UsageError, match="slurm, kubernetes, ray, not slrm; did you mean 'slurm'"):
        written(job, "slrm")


def test_ranks_that_do_not_fill_nodes_are_refused(job: Path):
    job.write_text(JOB.replace("dp_shard2.zero1 tp2+sp", "pp3:gpipe/4mb"))
    with pytest.raises(UsageError, match=r"has 3 ranks, a node of laptop 2 devices.* 2 or 4 ranks"):
        written(job, "slurm")


def test_the_verb_judges_the_plan_and_writes_a_file(job: Path):
    def asked(*words: str):
        line = ["launch", "slurm", str(job), *words]
        return CliRunner().invoke(application(line), line)

    out = job.parent / "run.sh"
    document = json.loads(asked("--out", str(out), "--json").stdout)
    assert (document["hosts"], document["ranks_per_host"], document["plan"]) == (2, 2, PLAN)
    assert out.read_text() == document["text"]
    assert isinstance(asked("--plan", "tp3").exception, PlanError)
    assert asked("cluster.memory_bytes=1000000", "--force").exit_code == 0
