"""The checker: what a user's schedule may get wrong is named, with rank, action and picture."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.base.errors import ScheduleError, UsageError
from partita.parallel.pp.rules import problems
from partita.schedule.check import check, over_limit
from partita.schedule.make import schedule
from partita.schedule.make.files import file_problems
from partita.schedule.passes import with_communication
from partita.schedule.rendezvous import waits
from partita.schedule.steps import repeat
from partita.schedule.text import parse_program, parse_schedule, print_ranks
from partita.schedule.versions import staleness, versions_held, versions_used
from partita.simulate.predict import request_of
from partita.spec.job import Job

NAMES = ["1f1b", "interleaved_1f1b", "looped_bfs", "zb_h1", "zb_v", "v_half", "dualpipe", "chimera"]


def make(name: str, p: int = 4, m: int = 8):
    v = 2 if name in ("interleaved_1f1b", "looped_bfs") else 1
    return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_no_rank_waits_for_ever_whatever_the_network_buffers(name, ahead):
    s = make(name)
    program = with_communication(s, ahead)
    assert check(s, program) == []
    assert waits(s, program, buffered=True) == waits(s, program, buffered=False) == []


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    rank=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    how=st.integers(0, 2),
)
def test_a_missing_a_doubled_and_a_foreign_action_are_seen(name, rank, seed, how):
    s = make(name)
    rows = [list(actions) for actions in s.ranks]
    place = seed % len(rows[rank])
    action = rows[rank][place]
    if how == 0:
        del rows[rank][place]
        rule = "complete"
    elif how == 1:
        rows[rank].insert(seed // 7 % len(rows[rank]), action)
        rule = "duplicate_free"
    else:
        rows[(rank + 1) % 4].append(rows[rank].pop(place))
        rule = "placed"
    found = {p.rule: p.message for p in check(replace(s, ranks=tuple(map(tuple, rows))))}
    assert str(action) in found[rule] and "^--" in found[rule]


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), rank=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_an_unpaired_message_is_seen(name, rank, seed):
    s = make(name)
    program = [list(actions) for actions in with_communication(s)]
    messages = [i for i, a in enumerate(program[rank]) if a.is_send or a.is_receive]
    place = messages[seed % len(messages)]
    dropped = program[rank].pop(place)
    found = {p.rule: p.message for p in check(s, program)}
    what, stage, microbatch = dropped.key
    assert f"{what} of microbatch {microbatch} for stage {stage}" in found["paired"]
    program[rank][place:place] = [dropped, dropped]
    assert "paired" in {p.rule for p in check(s, program)}


def test_a_file_may_bring_its_own_messages():
    s = make("1f1b", 2, 3)
    text = print_ranks(with_communication(s))
    made, program = parse_program(text)
    assert made.ranks == s.ranks and program == with_communication(s)
    assert check(made, program) == []
    assert parse_program(str(s))[1] is None


def test_an_update_waits_for_its_gradients():
    s = parse_schedule("0F0,0F1,0B0,0U1,0B1\n1F0,1B0,1F1,1B1,1U1")
    assert s.is_asynchronous
    (problem,) = check(s)
    assert problem.rule == "ordered" and "rank 0 runs 0U1" in problem.message
    assert check(parse_schedule("0F0,0F1,0B0,0U0,0B1,0U1\n1F0,1B0,1U0,1F1,1B1,1U1")) == []
    assert not parse_schedule("0F0,0B0,0U0").is_asynchronous


def test_a_deadlock_is_drawn_as_a_staircase():
    s = parse_schedule("0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1F2,1B0,1B2,1F1,1B1", name="mine")
    (problem,) = check(s)
    assert problem.message.splitlines() == [
        "deadlock",
        "  rank 0: 0B0 waits for 1B0",
        "  rank 1: 1F2 waits for 0F2",
        "  rank 0 | 0F0 0F1 <-- 0B0 waits for 1B0",
        "  rank 1 |     1F0 <-- 1F2 waits for 0F2",
    ]


def test_an_order_that_differs_on_the_two_ends_blocks_a_network_without_buffers():
    s = parse_schedule("0F0,0F1,0B0,0B1\n1F1,1F0,1B0,1B1")
    program = with_communication(s)
    assert waits(s, program, buffered=True) == []
    (problem,) = check(s)
    assert problem.rule == "alive" and "buffers nothing" in problem.message


def test_long_histories_begin_with_their_last_cells():
    rows = [f"0F{k}" for k in range(40)] + [f"0B{k}" for k in range(40)]
    other = [f"1F{k}" for k in range(38)] + ["1B39", "1F38", "1F39"] + [f"1B{k}" for k in range(39)]
    (problem,) = check(parse_schedule(",".join(rows) + "\n" + ",".join(other)))
    assert problem.rule == "ordered"
    other = (
        [f"1F{k}" for k in range(38)]
        + ["1B0"]
        + ["1F38", "1F39"]
        + [f"1B{k}" for k in range(1, 40)]
    )
    rows = (
        [f"0F{k}" for k in range(38)]
        + ["0B1", "0F38", "0F39", "0B0"]
        + [f"0B{k}" for k in range(2, 40)]
    )
    (problem,) = check(parse_schedule(",".join(rows) + "\n" + ",".join(other)))
    assert "... " in problem.message and max(map(len, problem.message.splitlines())) < 120


def test_memory_is_held_to_its_limit():
    s = make("1f1b")
    assert over_limit(s, 4.0) == []
    found = over_limit(s, 2.0)
    assert [p.rule for p in found] == ["memory"] * 2
    assert found[0].message.startswith("rank 0 holds 3 activations, the limit is 2, from 0F2 on")
    assert over_limit(make("zb_v"), 4.0) == [] and len(over_limit(make("zb_v"), 3.5)) == 4
    assert over_limit(s, 40.0, [10.0] * 4) == []
    assert "bytes" in over_limit(s, 39.0, [10.0] * 4, "bytes")[0].message


def test_a_stage_on_two_ranks_is_refused_with_its_stray_action():
    with pytest.raises(ScheduleError, match="stage 1 runs on ranks 0, 1") as error:
        parse_schedule("0F0,0F1,1F0,0B0,0B1\n1B0,1F1,1B1")
    picture = "  rank 0 | 0F0 0F1 1F0 0B0 0B1\n         |         ^-- 1F0 lies elsewhere"
    assert str(error.value).endswith(picture)


@pytest.mark.parametrize("cell", ["0F9999999999999", "9999999999999F0", "0F4"])
def test_a_number_beyond_all_actions_is_refused_at_once(cell):
    with pytest.raises(
        ScheduleError, match=rf"rank 0 runs {cell}, .* the file has 4 actions"
    ) as error:
        parse_schedule(f"0F0,{cell},0B0\n1F0")
    assert "^-- a number below 4 is wanted" in str(error.value)
    with pytest.raises(UsageError, match="is not an action"):
        parse_schedule("0F" + "9" * 5000)


@pytest.mark.parametrize("row, action, words", [
    ("0F0,0REDUCE,0B0", "0REDUCE", "before the gradient of 0B0"),
    ("0F0,0I0,0REDUCE,0W0", "0REDUCE", "before the gradient of 0W0"),
    ("0F0,0B0,0REDUCE,0REDUCE", "0REDUCE", "a second time"),
    ("0F0,0REDUCE0,0B0", "0REDUCE0", "where there is no gradient of it"),
    ("0F0,0B0,0U0,0REDUCE", "0REDUCE", "where there is no gradient of it"),
    ("0F0,0FREE0,0B0", "0FREE0", "before 0B0, which reads it"),
    ("0F0,0I0,0FREE0,0W0", "0FREE0", "before 0W0, which reads it"),
    ("0F0,0B0,0FREE0,0FREE0", "0FREE0", "a second time"),
    ("0OFFLOAD0,0F0,0B0", "0OFFLOAD0", "before its F"),
    ("0F0,0B0,0OFFLOAD0", "0OFFLOAD0", "behind 0B0"),
    ("0F0,0OFFLOAD0,0B0", "0OFFLOAD0", "with no RELOAD before its backward"),
    ("0F0,0OFFLOAD0,0OFFLOAD0,0RELOAD0,0B0", "0OFFLOAD0", "a second time"),
    ("0F0,0OFFLOAD0,0RELOAD0,0RELOAD0,0B0", "0RELOAD0", "a second time"),
    ("0F0,0RELOAD0,0B0", "0RELOAD0", "of what no OFFLOAD moved"),
    ("0F0,0OFFLOAD0,0B0,0RELOAD0", "0RELOAD0", "behind 0B0"),
    ("0F0,0RESHARD,0B0", "0B0", "after a RESHARD, with no UNSHARD between"),
    ("0F0,0B0,0RESHARD,0RESHARD", "0RESHARD", "before a use of whole weights"),
    ("0UNSHARD,0RESHARD,0UNSHARD,0F0,0B0", "0RESHARD", "before a use of whole weights"),
    ("0UNSHARD,0UNSHARD,0F0,0B0", "0UNSHARD", "though the weights are whole"),
    ("0F0,0UNSHARD,0B0", "0UNSHARD", "though the weights are whole"),
    ("0F0,0B0,0RESHARD,0UNSHARD", "0UNSHARD", "for nothing: no use of the weights follows"),
    ("0F0,0B0,0FREE7", "0FREE7", "of a stage or microbatch that does not exist"),
    ("0F0,0B0,1REDUCE", "1REDUCE", "of a stage that lies on rank 1"),
    ("0F0,0B0,1FREE0", "1FREE0", "of a stage that lies on rank 1"),
])  # fmt: skip
def test_a_misplaced_or_doubled_action_of_a_pass_is_seen(row, action, words):
    (problem,) = check(*parse_program(f"{row}\n1F0,1B0"))
    assert problem.rule == "ordered"
    first, list_of_rank, mark = problem.message.splitlines()
    assert first == f"rank 0 runs {action} {words}"
    assert list_of_rank == f"  rank 0 | {row.replace(',', ' ')}" and mark.endswith(f"^-- {words}")


@pytest.mark.parametrize("row", [
    "0UNSHARD,0F0,0RESHARD,0UNSHARD,0I0,0RESHARD,0W0,0REDUCE,0FREE0,0U0",
    "0F0,0OFFLOAD0,0RELOAD0,0B0,0REDUCE0,0RESHARD",
])  # fmt: skip
def test_actions_of_passes_may_stand_where_they_are_needed(row):
    made, program = parse_program(f"{row}\n1F0,1B0")
    assert check(made, program) == [] and program is not None


@pytest.mark.parametrize("text, line", [
    ("0F0,0F1,0B0,0B1\n\n1F0,1B0,1F1,1B1\n", 2),
    ("0F0,0B0\n1F0,1B0\n1REDUCE\n", 3),
    ("\n0F0,0B0", 1),
    ("0F0,0B0\n,,\n", 2),
])  # fmt: skip
def test_a_rank_that_computes_nothing_is_refused_with_its_line(text, line):
    with pytest.raises(ScheduleError, match=rf"mine, line {line}: rank {line - 1} has no action"):
        parse_schedule(text, "mine")
    assert parse_schedule("0F0,0B0\n1F0,1B0\n\n").num_ranks == 2


def test_a_plan_names_what_its_file_lacks(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n")
    plan = f'pp2:"file:{path}"/2mb'
    job = Job.of("quickstart", "laptop", plan, global_batch_size=2, seq_len=64)
    found = [p for p in problems(request_of(job)) if p.severity == "error"]
    (problem,) = found
    assert (problem.room, problem.rule) == ("pp", "complete")
    assert (
        problem.message.startswith("never done: 0B1\n")
        and "missing from here on" in problem.message
    )


@pytest.mark.parametrize("text, name, words", [
    ("0F0,0F1+0F2,0B0,0B1,0B2", "0F1+0F2", "a pair is an F first, then a B or an I"),
    ("0F0,0B0+0F1,0B1", "0B0+0F1", "a pair is an F first, then a B or an I"),
    ("0F0+0B0,0F1,0B1", "0F0+0B0", "0B0 needs 0F0: a pair is of two microbatches"),
    ("0F0,0F1+0I0+0W0,0B1", "0F1+0I0+0W0", "a pair is two actions"),
])  # fmt: skip
def test_a_pair_that_cannot_take_turns_is_drawn(text, name, words):
    (problem,) = check(parse_schedule(text))
    first, _, mark = problem.message.splitlines()
    assert problem.rule == "overlapped" and mark.endswith(f"^-- {words}")
    assert first == f"rank 0 runs {name} as one pair, but {words}"
    assert check(parse_schedule("0F0,0F1+0I0,0W0,0B1")) == []
    with pytest.raises(UsageError, match="0OFFLOAD1 overlaps nothing"):
        parse_schedule("0F0,0F1+0OFFLOAD1,0B0,0B1")


def test_updates_that_end_a_step_are_those_of_every_step(tmp_path):
    """As pipedream_2bw's, which says nothing of the versions it uses; one a stage, or none."""
    path = tmp_path / "mine.csv"
    path.write_text(str(make("pipedream_2bw", 3, 4)))
    assert make(f"file:{path}", 3, 4).ranks == make("1f1b", 3, 4).ranks
    for text, words in (
        ("0F0,0B0,0U0\n1F0,1B0", "rank 1 runs 1B0, and stage 1 has no update"),
        ("0F0,0F1,0B0,0B1,0U0,0U1", "rank 0 runs 0U1, and stage 0 has 2 updates"),
    ):
        (problem,) = file_problems(parse_schedule(text))
        assert words in problem.message and "^-- stage" in problem.message


def broken(name: str, how: int) -> str:
    """A file with one slip of the hand."""
    rows = [[str(a) for a in actions] for actions in make(name).ranks]
    row, place = rows[how % 4], 5 + how % 3
    if how == 0:
        del row[place]
    elif how == 1:
        row.insert(place, row[place])
    elif how == 2:
        rows[3].insert(2, row.pop(place))
    elif how == 3:
        row[0] = "9" + row[0]
    elif how == 4:
        row[place] = row[place][:-1] + "77"
    elif how == 5:
        row.insert(0, row.pop())
    elif how == 6:
        row[place] = row[place].replace("F", "X").replace("I", "X").replace("B", "X")
        row[place] = row[place].replace("W", "X")
    else:
        row.insert(place, f"{row[0][0]}REDUCE")
    return "\n".join(",".join(row) for row in rows)


@pytest.mark.parametrize("how", range(8))
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "zb_v", "looped_bfs"])
def test_a_slip_of_the_hand_is_drawn(name, how):
    """Missing, doubled, on another rank, of no stage, of no microbatch, too early, no action, a sum of half
    the gradients: refused with rank, action and picture."""
    try:
        said = [p.message for p in file_problems(*parse_program(broken(name, how)))]
    except (ScheduleError, UsageError) as error:
        said = [str(error)]
    assert said and all("  rank " in text and "^-- " in text for text in said)


@pytest.mark.parametrize("how", range(8))
@pytest.mark.parametrize("name", ["dualpipe", "chimera"])
def test_a_slip_in_a_file_of_both_ways_is_drawn(name, how):
    """Where microbatches go is read off those that are whole."""
    test_a_slip_of_the_hand_is_drawn(name, how)


@pytest.mark.parametrize("text", [
    "0F0,1F1,1B1,0B0\n1F0,1B0,0F1,0B1\n2F0,2B0,2F1,2B1",  # stage 2 has no second copy
    "0F0,1F1,1B1,0B0,0F2,1F2,1B2,0B2\n0F1,1F0,1B0,0B1",  # microbatch 2 goes neither way
])  # fmt: skip
def test_stages_on_two_ranks_that_are_no_two_ways_are_refused(text):
    with pytest.raises(
        ScheduleError, match=r"stage 0 runs on ranks 0, 1.* ranks r and p-1-r of an even p"
    ):
        parse_schedule(text)


def test_a_file_of_both_ways_ends_its_step_with_its_updates():
    rows = "0F0,1F1,1B1,0B0,0U0,1U1", "0F1,1F0,1B0,0B1,0U1,1U0"
    assert file_problems(parse_schedule("\n".join(rows))) == []
    later = "0F2,1F3,1B3,0B2,0U2,1U3", "0F3,1F2,1B2,0B3,0U3,1U2"
    both = "\n".join(map(",".join, zip(rows, later, strict=True)))
    (problem,) = file_problems(parse_schedule(both))
    assert problem.rule == "asynchronous"
    assert "runs 0U0, and updates a stage of two copies under way" in problem.message


ONE = "1F0,1B0,1U0,1F1,1B1,1U1"


@pytest.mark.parametrize("text, words, mark", [
    (f"0F0,0F1,0B0,0U0,0B1\n{ONE}", "0 runs 0B1, and no 0U follows", "no 0U follows"),
    (f"0F0,0F1,0B0,0B1,0U1\n{ONE}", "1 runs 1U1, and stage 1 has 2 updates, stage 0 has 1", "stage 1 has 2"),
    (f"0F0,0F1,0B0,0B1,0U1,0U0\n{ONE}", "0 runs 0U0, and no gradient to take", "no gradient to take"),
    (f"0F0,0F1,0F2,0B0,0U0,0B1,0B2,0U1\n{ONE},1F2,1B2,1U2",
     "0 runs 0U1, and takes gradients up to 0B2", "takes gradients up to 0B2"),
    (f"0F0,0F1+0B0,0U0,0B1,0U1\n{ONE}", "0 runs 0F1, and stands in a pair", "stands in a pair"),
    (f"0F0,0F1,0U0,0B0,0B1,0U1\n{ONE}", "0 runs 0U0 before what it needs from itself", "too early"),
])  # fmt: skip
def test_updates_under_way_that_cannot_stand_there_are_drawn(text, words, mark):
    """Each takes the gradients since the one before, none is lost, stages have equally many."""
    found = file_problems(parse_schedule(text))
    (problem,) = [p for p in found if f"rank {words}" in p.message]
    assert f"^-- {mark}" in problem.message.splitlines()[-1]


def test_a_file_says_which_weights_its_microbatches_use(tmp_path):
    """F uses what the U before it have made, and B the same; a step of it ends empty, and the next begins
    with the newest. PipeDream's list runs ahead as PipeDream does."""
    path, text = (
        tmp_path / "mine.csv",
        "0F0,0F1,0F2,0B0,0U0,0B2,0B1,0U1\n1F0,1B0,1U0,1F1,1F2,1B2,1B1,1U1",
    )
    path.write_text(text)
    made = make(f"file:{path}", 2, 3)
    assert (made.versions, made.is_asynchronous, made.runs_ahead) == ("stated", True, False)
    assert versions_used(made) == {(0, 0): 0, (0, 1): 0, (0, 2): 0, (1, 0): 0, (1, 1): 1, (1, 2): 1}
    assert versions_held(made) == [2, 1] and staleness(made) == [1, 0]
    assert [str(a) for a in repeat(made, 2).ranks[1]] == [
        *text.splitlines()[1].split(","), "1F3", "1B3", "1U3", "1F4", "1F5", "1B5", "1B4", "1U4",
    ]  # fmt: skip
    path.write_text(str(make("pipedream", 3, 4)))
    assert replace(make(f"file:{path}", 3, 4), name="pipedream") == make("pipedream", 3, 4)


def test_between_an_input_half_and_its_weight_half_no_version_is_held():
    """A W multiplies what F kept by a gradient; its own gradient is as old as its F's weights."""
    made = parse_schedule("0F0,0F1,0I1,0I0,0W0,0U0,0F2,0W1,0I2,0W2,0U2")
    assert file_problems(made) == []
    assert versions_held(made) == [1] and staleness(made) == [1]
