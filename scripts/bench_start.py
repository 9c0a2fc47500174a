"""Seconds from the command of scripts/serve.py to its first answer.

python scripts/bench_start.py --model configs/ernie-4.5-21b-a3b

Cold: with an empty folder for Triton's cache. Warm: once more, with what the first left there. Only
that cache is emptied: what the system keeps of Python's and torch's files stays, for this process
has read them before. Every flag but --timeout-s is serve.py's; weights are dummy ones unless it is
said otherwise. Prints a line of JSON last.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ernie_engine.bench.connection import Address
from ernie_engine.bench.environment import device_name
from ernie_engine.bench.report import json_line
from ernie_engine.bench.start import free_port, seconds_to_first_answer

SERVE = Path(__file__).with_name("serve.py")


def main() -> int:
    args, flags = _parse(sys.argv[1:])
    try:
        seconds = _measure(flags, args.timeout_s)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json_line("start", {"device": device_name(), "flags": flags}, seconds))
    return 0


def _measure(flags: Sequence[str], timeout_s: float) -> dict[str, float]:
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="ernie-start-") as folder:
        cache, log = Path(folder, "cache"), Path(folder, "log")
        cache.mkdir()
        for name in ("cold", "warm"):
            found = _one_start(flags, cache, log, timeout_s)
            print(f"{name}: {found:.1f} s", flush=True)
            seconds[f"{name}_s"] = found
    return seconds


def _one_start(flags: Sequence[str], cache: Path, log: Path, timeout_s: float) -> float:
    address = Address("127.0.0.1", free_port(), "/v1", None)
    command = [sys.executable, str(SERVE), "--load-format", "dummy", *flags]
    command += ["--host", address.host, "--port", str(address.port)]  # the later flag wins
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "ERNIE_API_KEY": ""}
    return seconds_to_first_answer(command, environment, address, log, timeout_s)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of each start")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    sys.exit(main())
