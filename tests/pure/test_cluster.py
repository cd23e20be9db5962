import re
from pathlib import Path
from typing import Any

import pytest

from partita.base.errors import UsageError
from partita.cli.main import run
from partita.spec.cluster import Cluster, Link
from partita.spec.hardware import find_hardware, hardware_rows
from partita.spec.model import ModelSpec

TWO_BOXES = """
name = "two boxes"
devices = 16
devices_per_node = 8
device = "h100"
memory_bytes = 80e9
memory_limit_fraction = 0.94
peak_flops = {bf16 = 989e12, fp32 = 67e12}
memory_bytes_per_s = 3.35e12
host_memory_bytes = 1e12
[[links]]
name = "nvlink"
devices = 8
bytes_per_s = 450e9
latency_s = 3e-6
[[links]]
name = "infiniband"
devices = 16
bytes_per_s = 50e9
latency_s = 1e-5
"""


def test_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(TWO_BOXES)
    cluster = Cluster.load(path)
    assert (cluster.devices, cluster.num_nodes, cluster.device) == (16, 2, "H100-80GB-SXM")
    assert cluster.memory_limit_bytes == 75_200_000_000
    assert cluster.host_memory_bytes == 10**12
    assert cluster.peak_flops["bf16"] == 989e12
    assert cluster.link_for([0, 7]).name == "nvlink"
    assert cluster.link_for((8, 15, 9)).name == "nvlink"
    assert cluster.link_for([7, 8]).name == "infiniband"
    assert cluster.link_for([3]).devices == 1
    assert (
        Cluster.from_toml(
            {"path": "cluster.toml", "memory_bytes": 40e9}, folder=tmp_path
        ).memory_bytes
        == 40e9
    )


@pytest.mark.parametrize(
    ("name", "devices", "device", "links"),
    [
        ("16384xh100", 16384, "H100-80GB-SXM", [(8, 450e9), (16384, 50e9)]),
        ("64xa100-80gb", 64, "A100-80GB", [(8, 300e9), (64, 25e9)]),
        ("64xA100", 64, "A100-80GB", [(8, 300e9), (64, 25e9)]),
        ("4xh100", 4, "H100-80GB-SXM", [(4, 450e9)]),
        ("144xgb200", 144, "GB200", [(72, 900e9), (144, 50e9)]),
        ("1xh100", 1, "H100-80GB-SXM", []),
        ("laptop", 4, "CPU", [(4, 2e9)]),
    ],
)
def test_presets(name: str, devices: int, device: str, links: list[tuple[int, float]]) -> None:
    cluster = Cluster.load(name)
    assert (cluster.devices, cluster.device) == (devices, device)
    assert [(x.devices, x.bytes_per_s) for x in cluster.links] == links
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    assert hash(cluster) == hash(Cluster.load(name))


def test_laptop_is_too_small_for_the_quickstart_on_one_rank() -> None:
    laptop, model = Cluster.from_preset("laptop"), ModelSpec.from_preset("quickstart")
    assert laptop.cores_shared == 2
    assert 16 * model.parameters() >= 1.5 * laptop.memory_limit_bytes
    assert 18 * model.parameters() / 4 < 0.5 * laptop.memory_limit_bytes


def test_hardware_is_published_with_sources() -> None:
    rows = hardware_rows()
    assert len(rows) >= 20
    assert all(row.source for row in rows.values())
    assert find_hardware("h100").memory_bytes == 80_000_000_000
    assert find_hardware("MI300x").peak_flops["fp8"] == 2610e12
    for name in rows:
        try:
            Cluster.from_preset(f"2x{name}")
        except UsageError as error:
            assert "published" in error.message  # nothing known about that link


def test_peaks_of_missing_precisions() -> None:
    v100 = Cluster.from_preset("8xv100")
    assert v100.peak("bf16") == v100.peak("fp16") == 125e12
    assert Cluster.from_preset("8xa100").peak("fp8") == 312e12
    assert v100.peak("fp64") == 15.7e12 / 2


def test_nodes_that_differ() -> None:
    nodes = [
        {"count": 2, "device": "h100", "devices": 8},
        {"count": 3, "device": "a100", "devices": 4},
    ]
    cluster = Cluster.from_toml({"nodes": nodes})
    assert (cluster.devices, cluster.num_nodes, cluster.devices_per_node) == (28, 5, 8)
    assert [cluster.node_of(r) for r in (0, 7, 8, 16, 19, 20, 27)] == [0, 0, 1, 2, 2, 3, 4]
    assert cluster.peak("bf16") == 312e12
    assert cluster.memory_bytes == 80_000_000_000
    assert cluster.link_for([16, 19]).bytes_per_s == 300e9
    assert cluster.link_for([19, 20]).name == "inter-node"
    assert cluster.nodes[0].device == "H100-80GB-SXM"
    assert Cluster.from_toml(cluster.to_toml()) == cluster


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"preset": "labtop"}, "cluster.preset: no cluster preset 'labtop'; did you mean 'laptop'"),
        ({"preset": "8xh10"}, "no device 'h10'; did you mean 'h100'"),
        ({"preset": "0xh100"}, "cluster.devices: "),
        ({"preset": 8}, "cluster.preset: a string is wanted"),
        ({"preset": "laptop", "path": "a.toml"}, "preset or path, not both"),
        ({"devices": 8}, "cluster.device: missing"),
        ({"device": "h100"}, "cluster.devices: missing"),
        ({"devices": -1, "device": "h100"}, "cluster.devices: -1 is not within"),
        (
            {"devices": 8, "device": "h100", "memory_byts": 3},
            "memory_byts: unknown key; did you mean 'memory_bytes'",
        ),
        (
            {"devices": 8, "device": "h100", "memory_bytes": float("inf")},
            "memory_bytes: inf is not a finite",
        ),
        ({"devices": 8, "device": "h100", "memory_bytes": 1.5}, "memory_bytes: expected 'int"),
        (
            {"devices": 8, "device": "h100", "memory_limit_fraction": 2},
            "memory_limit_fraction: 2.0 is not within",
        ),
        (
            {"devices": 8, "device": "h100", "peak_flops": {"bf17": 1e12}},
            "no precision 'bf17'; did you mean 'bf16'",
        ),
        (
            {"devices": 8, "device": "h100", "links": [{"bytes_per_s": -1}]},
            "links[0].bytes_per_s: -1.0 is not",
        ),
        (
            {"devices": 8, "device": "h100", "links": [{"bytes_per_s": 1, "devices": 4}]},
            "joins 4 of 8 devices",
        ),
        ({"devices": 8, "nodes": [{"device": "h100", "devices": 8}]}, "nodes replace devices"),
        ({"nodes": [{"device": "h1000", "devices": 8}]}, "nodes[0].device: no device 'h1000'"),
        ({"devices": 4096, "device": "gh200"}, "state [[links]]"),
        (
            {"devices": 8, "device": "4090"},
            "one that is no row takes the nearest row's name, and memory_bytes",
        ),
    ],
)
def test_errors_teach(table: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)) as error:
        Cluster.from_toml(table, file="job.toml")
    assert error.value.message.startswith("job.toml: cluster.")


def test_inner_tiers_come_first() -> None:
    links = (Link("outer", 8, 1e9, 0.0), Link("inner", 4, 1e9, 0.0))
    with pytest.raises(UsageError, match="inner tiers come first"):
        Cluster("x", 8, 4, "CPU", 10**9, {"fp32": 1e9}, 1e9, links)


def test_what_is_wrong_in_a_file_that_a_job_names_is_told_of_that_file(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('devics = 3\ndevice = "h100"')
    table = {"path": "c.toml"}
    with pytest.raises(UsageError, match=r"c\.toml: devics: unknown key"):
        Cluster.from_toml(table, file="job.toml", folder=tmp_path)
    (tmp_path / "c.toml").write_text('devices = 3\ndevice = "h100"')
    with pytest.raises(UsageError, match=r"^job\.toml: cluster\.devices: 0 is not"):
        Cluster.from_toml({**table, "devices": 0}, file="job.toml", folder=tmp_path)


def test_all_that_is_wrong_is_told_at_once(tmp_path, capsys) -> None:
    file = tmp_path / "c.toml"
    wrong = {
        "memory_byts": "= 4", "device": "= 'h100x'", "memory_limit_fraction": "= 3", "slower": "= -1",
        "peak_flops.bf17": "= 1e12", "links": "= [{bytes_per_s = 0, latency_s = -1}]",
        "reliability.device_mtbf_s": "= 0", "reliability.restart_s": "= -1", "jitter.slow_factor": "= 0.5",
    }  # fmt: skip
    file.write_text("devices = 4\n" + "".join(f"{k} {v}\n" for k, v in wrong.items()))
    words = ["simulate", "tiny", str(file), "--plan", "tp2", "--global-batch-size", "4"]
    assert run([*words, "--seq-len", "4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    told = " ".join(x.split(": ")[1] for x in lines[:-1])
    names = [*wrong, "links[0].bytes_per_s", "links[0].latency_s"]
    assert not [n for n in names if n not in told and n != "peak_flops.bf17"] and "bf17" in str(
        lines
    )
    assert lines[-1] == f"partita: {lines[0]} (and {len(lines) - 2} more above)"
    assert len(lines) == 11 and "missing" not in str(lines)


@pytest.mark.parametrize(
    ("nodes", "keys"),
    [
        ([{"device": "h1", "devices": 8}, {"device": "a100", "devices": 0}], (0, 1)),
        ([{"device": "h100", "devices": 0, "count": 0, "memory_bytes": 1}], (0, 0, 0)),
    ],
)
def test_all_nodes_are_told_at_once(nodes, keys) -> None:
    with pytest.raises(UsageError) as error:
        Cluster.from_toml({"nodes": nodes, "memory_limit_fraction": 2}, file="job.toml")
    lines = error.value.message.splitlines()
    assert [line.split("nodes[")[1][0] for line in lines[:-1]] == [str(k) for k in keys]
    assert "memory_limit_fraction" in lines[-1]
