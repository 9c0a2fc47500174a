"""Serve a checkpoint, hold a short conversation with it through the `openai` package, shut down.

python scripts/demo.py --model models/ernie-tiny "Hello!" "What is 12 + 30?"
"""

import argparse
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from openai import OpenAI

START_SECONDS = 120
SERVE = Path(__file__).with_name("serve.py")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    command = [sys.executable, str(SERVE), "--model", args.model, "--port", str(args.port)]
    with subprocess.Popen(command) as server:
        try:
            _wait_until_ready(server, args.port)
            _converse(args)
        finally:
            server.terminate()
    return server.returncode


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:  # refused, not ready yet, or connected and not answered in time
            time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {START_SECONDS} s")


def _converse(args: argparse.Namespace) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="EMPTY")
    messages: list[Any] = []
    for question in args.questions:
        print(f"\n> {question}")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _stream(client, args, messages)})


def _stream(client: OpenAI, args: argparse.Namespace, messages: list[Any]) -> str:
    """Print an answer as it comes, then its speed; returns it."""
    started, first, text, usage = time.perf_counter(), None, "", None
    for chunk in client.chat.completions.create(
        model=args.model,
        messages=messages,
        max_tokens=args.max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        first = first or time.perf_counter()
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
    assert first is not None and usage is not None
    decoding, count = time.perf_counter() - first, usage.completion_tokens
    speed = f", then {(count - 1) / decoding:.0f} tokens/s" if count > 1 else ""
    print(f"\n[{count} tokens; first after {(first - started) * 1e3:.0f} ms{speed}]")
    return text


if __name__ == "__main__":
    sys.exit(main())
