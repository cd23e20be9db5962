"""What cells of a published row say of shards, experts' tensor parallelism and layers that run again; words
that nobody knows, and which rows were not predicted."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from partita.base.errors import UsageError
from partita.cli.main import application
from partita.parallel.read import replayed
from partita.simulate.published.cells import UnpredictableError, not_understood
from partita.simulate.published.rows import case
from partita.simulate.published.validate import predict, read_rows, score, summary
from partita.simulate.published.works import case_works, lay_case
from validation.scaling import scaling_lines, slope

FRESH = Path(__file__).parents[2] / "validation" / "fresh.csv"


@pytest.fixture(scope="module")
def fresh():
    return read_rows(FRESH)


def of(fresh, group, **cells):
    return next(
        r for r in fresh if r["group"] == group and all(r[c] == v for c, v in cells.items())
    )


def test_shards_over_as_many_ranks_as_stand_in_brackets(fresh):
    row = of(fresh, "internevo", n_gpus="64", zero_or_fsdp="zero1(8)")
    mesh = case(row).plan.mesh
    assert (mesh.dp_replicate, mesh.dp_shard) == (8, 8)
    whole = case({**row, "zero_or_fsdp": "zero1"}).plan.mesh
    assert (whole.dp_replicate, whole.dp_shard) == (1, 64)
    for wrong in ("zero1(3)", "hsdp(0)", "zero1(128)"):
        with pytest.raises(UnpredictableError, match="of 64 data parallel ranks"):
            case({**row, "zero_or_fsdp": wrong})


def test_experts_are_cut_by_tensor_parallelism_where_a_row_says_so(fresh):
    row = of(fresh, "nemo-grok-24.11", n_gpus="512", precision="bf16")
    assert case(row).plan.mesh.etp == 4
    assert case({**row, "etp": ""}).plan.mesh.etp == 1


def test_layers_run_again_but_for_some_ops(fresh):
    """MaxText's policies, by name: what is kept of them does not run again, what is not does."""
    row = of(fresh, "maxtext-dgxc", model_name="LLAMA3-70B", precision="bf16", n_gpus="128")
    found = case(row)
    assert found.recompute == "full" and found.spared == (
        "attention.wq",
        "attention.wk",
        "attention.wv",
    )
    laid = lay_case(found, found.plan)
    layer = next(b for b in laid.stages[0].blocks if b.name == "layer")
    again = {op.name for op in replayed(layer)}
    assert not again & set(found.spared)
    assert {"attention.rope_q", "attention.core", "attention.wo", "mlp.gate_up", "mlp.act"} <= again
    full, none = (case({**row, "recompute": text}) for text in ("full", "none"))
    assert predict(none) < predict(found) < predict(full)


@pytest.mark.parametrize(
    "text", ["full(but nothing)", "selective(foo)", "full(but attention.wq,x)"]
)
def test_a_word_of_recomputation_that_nobody_knows_is_told(fresh, text):
    row = {**of(fresh, "titan-h200"), "recompute": text}
    (told,) = not_understood(row)
    assert told.startswith(f"recompute = {text}: ")
    with pytest.raises(UnpredictableError, match="is not"):
        case(row)


def test_which_rows_were_not_predicted_is_told(tmp_path, fresh):
    table = tmp_path / "own.csv"
    lines = FRESH.read_text(encoding="utf-8").splitlines()[:3]
    bad = lines[2].replace(",tokens_per_s_per_gpu,", ",furlongs,")
    table.write_text("\n".join([*lines[:2], bad]) + "\n", encoding="utf-8")
    line = ["validate", str(table)]
    shown = CliRunner().invoke(application(line), line).stdout
    (told,) = (x for x in shown.splitlines() if "furlongs" in x)
    assert told.endswith("mpt-0002")
    line = [*line, "--json"]
    document = json.loads(CliRunner().invoke(application(line), line).stdout)
    assert document["not_predicted"] == {"a metric that is not known: furlongs": ["mpt-0002"]}


def test_columns_that_no_comma_parts_are_told(tmp_path):
    table = tmp_path / "own.csv"
    table.write_text("id;group;metric\n1;a;step_time_s\n", encoding="utf-8")
    with pytest.raises(UsageError, match="what stands between columns is a comma"):
        read_rows(table)


def test_keys_go_to_other_ranks_of_the_sequence_as_torchtitan_sends_them(fresh):
    """Gathered whole, of all heads (8 of 405B share a key), beside no compute."""
    row = of(fresh, "titan-405b-202412", cp="8")
    found = case(row)
    assert found.plan.context.method == "all_gather"
    works = case_works(found, lay_case(found, found.plan))
    layer = max(works.stages[1].parts, key=lambda p: p.times)
    sent = {c.bytes for c in layer.calls if c.axes == ("cp",) and c.phase == "F"}
    assert sent == {int(row["seq_len"]) // 8 * 128 * 2 * (128 // 8)}  # a rank's 16 heads under tp 8
    assert found.machine().software.overlaps_rings is False


def test_rows_of_nemo_on_up_to_2304_devices_hold_their_bounds(fresh):
    some = [
        r
        for r in fresh
        if r["group"].startswith(("nemo-dgxc-2", "nemo-grok-24", "nemo-grok-25.02"))
    ]
    some = [r for r in some if r["gpu_type"] == "H100" and r["n_gpus"] in ("64", "512", "2304")]
    scored, skipped = score(some)
    assert len(scored) > 30 and not skipped
    for line in summary(scored, {}):
        assert line["mape"] <= 0.12, line


def test_a_larger_run_of_the_same_share_is_a_series(fresh):
    """1 % a doubling measured, nothing predicted."""
    own = [
        r for r in fresh if r["group"] == "nemo-dgxc-24.11" and r["model_name"] == "Nemotron-15B"
    ]
    found = {r["id"]: (2.0, 2.0 * 1.01 ** (int(r["n_gpus"]).bit_length())) for r in own}
    lines = scaling_lines(FRESH, found)
    assert lines[2] == "| nemo-dgxc-24.11 | 2 | 16 to 2048 | +1.0% | +0.0% |"
    assert slope([(1.0, 3.0, 0.0), (2.0, 5.0, 0.0), (4.0, 9.0, 0.0)], 1) == pytest.approx(2)
