"""scripts/bench_start.py on a tiny model without weights, and servers that never answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_engine.bench.connection import Address
from ernie_engine.bench.start import free_port, seconds_to_first_answer
from tests.processes import is_alive

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_start.py"
LITTLE = ("--device", "cpu", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(4 << 20))


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ERNIE_API_KEY": "a key of the user's"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_cold_and_a_warm_start(tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    done = bench("--model", str(tmp_path), *LITTLE)
    assert done.returncode == 0, done.stderr
    cold, warm, last = done.stdout.splitlines()
    report = json.loads(last)
    assert report["bench"] == "start" and report["config"]["flags"][0] == "--model"
    assert cold == f"cold: {report['cold_s']:.1f} s" and warm == f"warm: {report['warm_s']:.1f} s"
    assert report["cold_s"] > 0.5 and report["warm_s"] > 0.5  # torch alone takes as long


def test_what_serve_refuses_is_told(tmp_path):
    done = bench("--model", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "nowhere" in done.stderr and "status 2" in done.stderr


def start(tmp_path: Path, program: str, timeout_s: float = 20.0) -> float:
    """Of a server that is `program`, which finds its port as sys.argv[1]; notes its own id."""
    port = free_port()
    noted = f"import os, sys; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    command = [sys.executable, "-c", noted + program, str(port)]
    address = Address("127.0.0.1", port, "/v1", None)
    return seconds_to_first_answer(command, os.environ, address, tmp_path / "log", timeout_s)


def has_ended(tmp_path: Path) -> bool:
    return not is_alive(int((tmp_path / "pid").read_text()))


def answering(*statuses: int) -> str:
    """One that answers with these, one after the other."""
    return f"""
import http.server
statuses = list({statuses})
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(statuses.pop(0))
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_loads_is_asked_again(tmp_path):
    assert 0 < start(tmp_path, answering(503, 503, 200)) < 20
    assert has_ended(tmp_path)


@pytest.mark.parametrize(
    ("program", "timeout_s", "message"),
    [
        ("print('no GPU here'); sys.exit(3)", 20.0, "status 3.*no GPU here"),
        ("import time; time.sleep(60)", 1.0, "timeout_s=1.0: no answer came"),
        (answering(503, 401), 20.0, "refused the request with 401: ok"),
    ],
)
def test_what_goes_wrong_is_told_and_the_server_is_ended(tmp_path, program, timeout_s, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        start(tmp_path, program, timeout_s)
    assert has_ended(tmp_path)
