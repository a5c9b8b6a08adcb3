"""The OpenAI-compatible server with the plugin on: chat completions that stream, clients that hang up, metrics."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

MODEL = os.environ.get(
    "REASONALLOC_TEST_MODEL", str(Path(__file__).parents[2] / "src/reasonalloc/reasoner/model")
)  # fmt: skip
PATIENCE = 600  # seconds that a server may take to start


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    (folder / "metrics").mkdir()
    environment = {
        **os.environ,
        "REASONALLOC": '{"method": "reasonalloc-head", "budget": 48, "interval": 32}',
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [
        # What `vllm serve` runs; that command itself does not start where the distribution is called vllm-cpu.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL,
        "--served-model-name", "tested", "--dtype", "float32",
        "--no-enable-prefix-caching", "--enforce-eager", "--max-model-len", "1024", "--port", str(port),
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process, log)
        yield address, log
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(address, process, log):
    for _ in range(PATIENCE):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def chat(address, tokens):
    body = {
        "model": "tested", "stream": True, "temperature": 0, "max_tokens": tokens, "ignore_eos": True,
        "messages": [{"role": "user", "content": "maps x1 x2 ; x2 x3 ; x3 x1 . x1 9"}],
    }  # fmt: skip
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers), timeout=300
    )


def pieces(stream):
    """The streamed parts of an answer's text."""
    for line in stream:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


def metrics(address):
    lines = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name.split("{")[0]] = found.get(name.split("{")[0], 0.0) + float(value)
    return found


def test_chat_streams_and_metrics_tell_that_tokens_were_forgotten(server):
    address, log = server
    with chat(address, 200) as stream:
        parts = list(pieces(stream))
    assert sum(bool(part) for part in parts) > 100, "it did not stream"
    with chat(address, 200) as stream:
        assert "".join(pieces(stream)) == "".join(parts)  # a busy machine cuts it elsewhere
    found = metrics(address)
    assert found["reasonalloc_evicted_tokens_total"] > 0
    assert found["reasonalloc_compressions_total"] > 0
    assert f"{int(found['reasonalloc_arenas'])} requests fit at once" in log.read_text()


def test_arenas_of_clients_that_hang_up_come_back(server):
    address, _ = server
    for _ in range(5):
        with chat(address, 900) as stream:
            next(pieces(stream))
    for _ in range(60):
        if metrics(address)["vllm:num_requests_running"] == 0:
            break
        time.sleep(1)
    found = metrics(address)
    assert found["vllm:num_requests_running"] == 0
    assert found["vllm:kv_cache_usage_perc"] == 0
