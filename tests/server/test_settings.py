"""Flags, the YAML file of the same names, and what is said at the start."""

import logging
import socket
import subprocess
import sys

import pytest

from ernie_engine.cli import arguments_of_file
from ernie_engine.engine_config import EngineConfig, ResolvedConfig
from ernie_engine.server import engine_process
from ernie_engine.server.banner import banner, base_url
from ernie_engine.server.engine_process import check_frames, listen, warn_if_open
from ernie_engine.server.settings import ServerConfig, make_settings
from tests.server.in_process import InProcess
from tests.server.process import ENVIRONMENT, ROOT

BAD = [
    {"port": -1},
    {"port": 65536},
    {"max_num_queued_reqs": 0},
    {"max_num_queued_tokens": 0},
    {"shutdown_timeout": -1.0},
    {"shutdown_timeout": float("nan")},
    {"stall_timeout": float("inf")},
    {"metrics_prefix": "a b"},
    {"metrics_prefix": "é"},
    {"served_model_name": ("a", "")},
]


@pytest.mark.parametrize("fields", BAD, ids=str)
def test_bad_values_name_their_field(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        ServerConfig(**fields)


def write(tmp_path, text: str):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return path


CONFIGS = [ServerConfig, EngineConfig]


def test_a_file_becomes_flags(tmp_path):
    path = write(
        tmp_path,
        "model: /models/x\nport: 8000\nenable_prefix_caching: false\nstrict_fields: true\n"
        "served_model_name: [a, -b]\ngpu_memory_utilization: 0.8\nmax_model_len: null\n",
    )
    assert arguments_of_file(path, CONFIGS) == [
        *("--model=/models/x", "--port=8000", "--no-enable-prefix-caching", "--strict-fields"),
        *("--served-model-name", "a", "-b", "--gpu-memory-utilization=0.8"),
    ]
    assert arguments_of_file(write(tmp_path, ""), CONFIGS) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_modellen: 5", "'max_modellen' is not an option"),
        ("[1, 2]", "name: value"),
        ("a: [", "config="),
        ("port: true", "port=True"),
        ("port: [1, 2]", "port="),
        ("strict_fields: 'yes'", "strict_fields='yes'"),
        ("model: {a: b}", "model="),
        ("served_model_name: [[a]]", "served_model_name="),
        ("model: !!python/object/apply:os.system ['true']", "config="),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        arguments_of_file(write(tmp_path, text), CONFIGS)


def serve(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/serve.py", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )


def test_what_cannot_be_served_is_said_before_anything_starts(tmp_path, tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = write(tmp_path, f"model: {tiny}\nport: {taken.getsockname()[1]}\n")
        ended = serve("--config", str(config))
    assert ended.returncode == 2 and "Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_broken_tokenizer_is_found_before_the_weights_are_loaded(tmp_path, tiny):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        engine_process.serve(EngineConfig(model=str(tmp_path), device="cpu"), ServerConfig(port=0))


def test_a_port_that_is_taken_or_a_strange_host():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ValueError, match="port="),
    ):
        listen(ServerConfig(port=taken.getsockname()[1]))
    with pytest.raises(ValueError, match="host="):
        listen(ServerConfig(host="no.such.host.invalid"))
    with listen(ServerConfig(port=0)) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    with listen(ServerConfig(host="::1", port=0)) as listener:
        assert listener.getsockname()[0] == "::1"


def test_defaults_are_this_machine_only_and_the_seeds_port():
    server = ServerConfig()
    assert (server.host, server.port, server.shutdown_timeout) == ("127.0.0.1", 30000, 10.0)


@pytest.mark.parametrize(
    ("host", "has_key", "warns"),
    [("127.0.0.1", False, False), ("::1", False, False), ("0.0.0.0", False, True),
     ("::", False, True), ("10.1.2.3", False, True), ("0.0.0.0", True, False)],
)  # fmt: skip
def test_an_open_address_without_a_key_is_warned_about(caplog, host, has_key, warns):
    with caplog.at_level(logging.WARNING):
        warn_if_open(ServerConfig(host=host), has_key)
    assert ("WITHOUT A KEY" in caplog.text) == warns


def test_the_banner_is_what_people_paste(tiny):
    here = InProcess(tiny, keys=["secret"], host="0.0.0.0")
    text = banner(here.front.settings, here.front.served)
    assert "http://127.0.0.1:30000/v1" in text and str(tiny) in text and "512" in text
    assert "OpenAI(base_url=" in text and "curl http" in text and "AnythingLLM" in text
    assert "secret" not in text and "Authorization: Bearer" in text
    settings = make_settings(ServerConfig(host="::1"), "m", 5, {})
    assert base_url(settings) == "http://[::1]:5"


def test_log_probabilities_must_fit_a_frame():
    fields = {"model": "m", "max_model_len": 100, "max_steps_in_flight": 1}
    fields |= {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    check_frames(ResolvedConfig(**fields, max_num_batched_tokens=8192, max_logprobs=1000))
    with pytest.raises(ValueError, match="max_logprobs=100000"):
        check_frames(ResolvedConfig(**fields, max_num_batched_tokens=8192, max_logprobs=100_000))
