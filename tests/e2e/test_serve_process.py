"""`partita serve` as a process: it tells its address, answers, and a SIGTERM lets requests end."""

import json
import re
import shutil
import signal
import ssl
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from tiny_folder import tiny_folder

from partita.base.errors import UsageError
from partita.serve.http.server import Secret

ROOT = Path(__file__).parents[2]


@contextmanager
def process(*words):
    line = [sys.executable, "-m", "partita", "serve", *map(str, words), "--port", "0", "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as started:
        try:
            told = started.stdout.readline()
            assert told, started.stderr.read()
            yield started, json.loads(told)
        finally:
            started.kill()


@pytest.mark.slow
def test_a_stop_lets_requests_end(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    with (
        process(folder, "--pages", "64") as (server, told),
        httpx.Client(base_url=told["address"]) as client,
    ):
        assert (told["format"], told["model"], told["pages"]) == (1, "tiny", 64)
        assert told["pages_bytes"] > 0 < told["weights_bytes"] and "predicted_itl_s" in told
        page = (ROOT / "docs" / "serve.md").read_text()
        block = re.search(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
        code = block.replace("http://127.0.0.1:8000", told["address"])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert done.returncode == 0 and len(done.stdout) > 1, done.stderr.decode()
        body = {"prompt": "the cat", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert (
            json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{told['address']}/health")
        assert server.wait(30) == 0, server.stderr.read()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_it_serves_https(tmp_path):
    folder, key, certificate = tiny_folder(tmp_path / "tiny"), tmp_path / "key", tmp_path / "pem"
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    made = [*line, *names, "-keyout", key, "-out", certificate]
    subprocess.run(made, check=True, capture_output=True)
    with pytest.raises(UsageError, match="no certificate and its key"):
        Secret.of(certificate, None)
    with process(folder, "--ssl-certfile", certificate, "--ssl-keyfile", key) as (server, told):
        assert told["address"].startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=certificate)
        body = {"prompt": "the cat", "max_tokens": 2}
        reply = httpx.post(f"{told['address']}/v1/completions", json=body, verify=trusted)
        assert reply.json()["usage"]["completion_tokens"] == 2
        server.terminate()
        assert server.wait(30) == 0


@pytest.mark.slow
def test_what_takes_too_long_is_cut_off_and_a_taken_port_is_told(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    with process(folder, "--drain-timeout", "0") as (server, told):
        port = told["address"].rpartition(":")[2]
        line = [sys.executable, "-m", "partita", "serve", str(folder), "--port", port]
        other = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert other.returncode == 2 and "--port 0 takes a free one" in other.stderr
        assert "Traceback" not in other.stderr
        body = {"prompt": "the cat", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 8}
        events = []
        with httpx.stream("POST", f"{told['address']}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                events.extend(lines)
        assert "data: [DONE]" not in events
        assert server.wait(30) == 0


@pytest.mark.slow
def test_a_killed_rank_ends_streams_as_failed_and_health_tells_it(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    words = (folder, "--plan", "tp2", "--backend", "processes")
    with process(*words) as (server, told), httpx.Client(base_url=told["address"]) as client:
        body = {"prompt": "the cat", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 64}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            ranks = [p for c in psutil.Process(server.pid).children() for p in c.children()]
            ranks[-1].kill()
            events = [line for line in lines if line]
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed" and "rank" in error["message"]
        assert "data: [DONE]" not in events
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        server.terminate()
        assert server.wait(30) == 0
        assert not any(p.is_running() for p in ranks)
