"""Several hosts on one machine: network namespaces on one bridge, each with a name and a clock of its own.

Needs root, `ip` and `unshare`; nothing of the machine's own network is touched: the bridge lies in a
namespace too. `tbf` limits a host's way out; the netem discipline is not needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "tc", "ss", "unshare")


def missing() -> str:
    """What keeps this machine from having hosts; empty when nothing does."""
    absent = [t for t in TOOLS if shutil.which(t) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    if os.geteuid() != 0:
        return "not root"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "ip", "link", "add", "type", "bridge"], capture_output=True
    )
    return "" if probe.returncode == 0 else "namespaces or bridges are not to be had"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Program:
    """What runs on a host; its words go to files, so that it never waits for a reader."""

    process: subprocess.Popen[bytes]
    out_file: Path
    err_file: Path

    def wait(self, seconds: float) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    @property
    def out(self) -> str:
        """What it has written on stdout so far."""
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        """What it has written on stderr so far."""
        return self.err_file.read_text()


class Hosts:
    """`count` hosts, 10.77.0.1 and on, on one bridge. As a context it is gone at the end with all it ran."""

    def __init__(self, count: int = 2) -> None:
        self.count, self._tag = count, f"pt{os.getpid()}"
        self.running: list[Program] = []
        self._names = Path(tempfile.gettempdir()) / f"{self._tag}-hosts"

    def name(self, host: int) -> str:
        """The namespace of a host; -1 is the switch's."""
        return f"{self._tag}-{'switch' if host < 0 else host}"

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def __enter__(self) -> Hosts:
        named = [f"{self.address(h)} host-{h}" for h in range(self.count)]
        self._names.write_text("\n".join(["127.0.0.1 localhost", *named, ""]))
        switch = self.name(-1)
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host in range(self.count):
            name = self.name(host)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "net0", "type", "veth", "peer", "name", f"port{host}",
               "netns", switch)  # fmt: skip
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "net0")
            ip("-n", switch, "link", "set", f"port{host}", "master", "bridge", "up")
            ip("-n", name, "link", "set", "net0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(self.count):
            for pid in self.pids(host):
                subprocess.run(["kill", "-9", str(pid)], capture_output=True)
        for program in self.running:
            program.process.kill()
            program.process.wait()
            program.out_file.unlink(missing_ok=True)
            program.err_file.unlink(missing_ok=True)
        self._names.unlink(missing_ok=True)
        for host in range(-1, self.count):
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True)

    def link(self, host: int, state: str) -> None:
        """Sets a host's link `up` or `down`."""
        ip("-n", self.name(host), "link", "set", "net0", state)

    def limit(self, bytes_per_s: float, latency: str = "50ms", burst: str = "256kb") -> None:
        """Every host's way out takes no more than that."""
        rate = f"{round(8 * bytes_per_s)}bit"
        for host in range(self.count):
            subprocess.run(
                ["tc", "-n", self.name(host), "qdisc", "replace", "dev", "net0", "root", "tbf",
                 "rate", rate, "burst", burst, "latency", latency], check=True,
            )  # fmt: skip

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        folder: Path | None = None,
        env: Mapping[str, str] | None = None,
        monotonic_s: int = 0,
    ) -> Program:
        """A program on a host, whose name is host-<n> and whose monotonic clock is ahead by so much."""
        clock = ["--time", "--monotonic", str(monotonic_s)] if monotonic_s else []
        inside = f'hostname host-{host}; mount --bind {self._names} /etc/hosts; exec "$@"'
        words = ["ip", "netns", "exec", self.name(host), "unshare", "--uts", "--mount", *clock,
                 "sh", "-c", inside, "sh", *command]  # fmt: skip
        out, err = (Path(tempfile.mkstemp(prefix=self.name(host))[1]) for _ in range(2))
        with out.open("w") as out_file, err.open("w") as err_file:
            process = subprocess.Popen(
                words,
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdout=out_file,
                stderr=err_file,
            )
        self.running.append(Program(process, out, err))
        return self.running[-1]

    def pids(self, host: int) -> list[int]:
        """All processes of a host."""
        found = subprocess.run(["ip", "netns", "pids", self.name(host)], capture_output=True)
        return [int(x) for x in found.stdout.split()]

    def listeners(self, host: int) -> list[tuple[str, int]]:
        """(address, pid) of every socket on which a process of the host listens."""
        words = ["ip", "netns", "exec", self.name(host), "ss", "-Hltnp"]
        found = []
        for line in subprocess.run(words, capture_output=True, text=True).stdout.splitlines():
            address, pid = line.split()[3], line.partition("pid=")[2].partition(",")[0]
            found.append((address, int(pid or 0)))
        return found
