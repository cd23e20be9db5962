"""The benchmark of one GPU runs every row in small on a CPU, and goes on where one fails."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_sides import Env
from benchmarks.gpu_trace import covered, kind_of


def test_rows_run_in_small_and_one_that_fails_says_why(tmp_path, monkeypatch, capsys) -> None:
    def broken(env: Env) -> gpu.Found:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(gpu.ROWS, "recompute", broken)
    names = ["rates", "recompute", "offload", "predictions"]
    out = tmp_path / "found.json"
    gpu.main(["--device", "cpu", "--tiny", "--json", str(out), "--rows", *names])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == names
    assert rows["recompute"]["failed"] == "RuntimeError: no such kernel"
    assert all(x["step_s"] > 0 for x in rows["offload"]["sides"].values())
    assert rows["offload"]["sides"]["on the host"]["moved_bytes"] > 0
    assert rows["predictions"]["predicted"]["offload"]["preset"]["step_s"] > 0
    assert "no such kernel" in capsys.readouterr().out


def test_no_row_begins_when_the_time_is_up(tmp_path) -> None:
    env = Env(torch.device("cpu"), tmp_path, True, time.monotonic())
    kept: list[int] = []
    found = gpu.run(env, ["dense", "fp8"], lambda made: kept.append(len(made["rows"])))
    assert kept == [1, 2]
    assert all("no time was left" in row["failed"] for row in found["rows"].values())


def test_busy_is_a_union() -> None:
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.5, 5.6)]) == 4.0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matmul"),
        ("void pytorch_flash::flash_bwd_kernel<...>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "element-wise"),
        ("Memcpy DtoH (Device -> Pinned)", "copy, cast"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
