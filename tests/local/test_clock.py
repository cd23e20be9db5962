"""Spans of a step are when the device computed, not when the host ordered it: on a device that stands in."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from partita.comm.single import SingleWorld
from partita.record.transfer import Transfer
from partita.simulate.predict import simulate
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.clock import DeviceClock, HostClock, clock_of
from partita.train.recorder import StepRecorder, lane_of
from tests.local.test_allocation import TABLE


@dataclass
class Device:
    """Runs behind the host: what was ordered takes so many seconds, one after the other. Reading an event's
    time that the host has not waited for is an error, as on a GPU; so is waiting in a step."""

    host_s: float = 100.0
    free_s: float = 7.0  # on its own clock, which is not the host's
    in_step: bool = False
    waits: int = 0
    events: list[Event] = field(default_factory=list)

    def order(self, seconds: float) -> None:
        self.free_s += seconds

    def event(self) -> Event:
        self.events.append(Event(self))
        return self.events[-1]

    def wait(self) -> None:
        assert not self.in_step, "a step never waits for its device"
        self.waits += 1

    def clock(self) -> DeviceClock:
        return DeviceClock(self.event, self.wait, lambda: self.host_s)


@dataclass
class Event:
    device: Device
    at_s: float = -1.0
    waited: bool = False

    def record(self) -> None:
        self.at_s = self.device.free_s

    def synchronize(self) -> None:
        self.device.wait()
        self.waited = True

    def elapsed_time(self, end_event: Event) -> float:
        assert self.waited and end_event.waited
        return 1e3 * (end_event.at_s - self.at_s)


def test_a_stamp_is_when_the_device_came_to_it() -> None:
    device = Device()
    clock = device.clock()
    clock.begin()
    device.in_step = True
    stamps = [clock.stamp()]
    device.order(0.25)
    stamps.append(clock.stamp())
    device.in_step = False
    assert clock.read(stamps) == pytest.approx([100.0, 100.25])


def test_a_clock_of_a_cpu_is_the_hosts() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    assert isinstance(clock_of(torch.device("cuda", 0)), DeviceClock)
    clock.begin()
    first, then = clock.stamp(), clock.stamp()
    assert clock.read([first, then]) == [first, then]
    assert first <= then


def test_spans_of_a_recorded_step_are_the_devices(tmp_path) -> None:
    built, device = assemble(Job.load(TABLE), SingleWorld()), Device()
    recorder = StepRecorder(built, tmp_path, 1, device.clock())
    with recorder.step(0):
        device.in_step = True
        with recorder.span("data", "data"):
            batch = built.batch(0)
        device.order(0.5)
        built.model.forward_backward(batch)
        with recorder.span("U", "optimizer"):
            device.order(0.125)
        device.in_step = False
    spans = [s for s in recorder.record.spans if s.lane == "compute"]
    by_kind = {s.kind: s for s in spans}
    assert {"data", "F", "B", "U"} <= set(by_kind)
    assert by_kind["data"].start_s == by_kind["data"].end_s == pytest.approx(100.0)
    assert by_kind["F"].start_s == pytest.approx(100.5)
    assert by_kind["U"].duration_s == pytest.approx(0.125)
    assert all(s.step == 1 for s in spans)


LANES = [
    ("pp_down", "pp", "send", "blocks.1:send", "F"), ("pp_up", "pp", "send", "blocks.1:send", "B"),
    ("compute", "cp", "send", "blocks.1.attention.rope_k:ring", "F"),
    ("dp", "efsdp", "reduce_scatter", "blocks.1.unit[efsdp]:scatter", "step"),
    ("dp", "tp", "all_reduce", "blocks.1.unit[tp]:reduce", "step"),
    ("dp", "tied", "all_reduce", "embedding.table:tied", "step"),
    ("dp", "dp_replicate.dp_shard", "all_reduce", "step.count:reduce_from", "step"),
    ("ep", "ep", "all_to_all", "blocks.1.dispatch.send:all_to_all", "F"),
    ("ep", "etp", "all_gather", "blocks.1.dispatch.receive:gather_rows", "F"),
    ("tp", "tp", "all_gather", "blocks.1.attention.norm:gather_from", "F"),
]  # fmt: skip


@pytest.mark.parametrize(("lane", "axis", "op", "site", "phase"), LANES)
def test_a_transfer_lies_on_the_lane_of_what_it_moves(lane, axis, op, site, phase) -> None:
    assert lane_of(Transfer(0, axis, op, site, phase, 8)) == lane


@pytest.mark.parametrize("plan", ["1mb fp32", "1mb fp64", "1mb fp8"])
def test_a_run_and_its_prediction_divide_by_one_peak(plan: str) -> None:
    """Of H800s no fp32 is published, nor fp64."""
    job = Job.load({**TABLE, "plan": plan, "cluster": {"preset": "8xh800"}})
    told = simulate(job)
    assert told.step_time_s is not None and told.mfu is not None
    run = assemble(job, SingleWorld()).mfu(told.tokens_per_step / told.step_time_s)
    assert run == pytest.approx(told.mfu)
