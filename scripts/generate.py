"""Continue a prompt, or chat in the terminal, streaming, with tokens/s.

python scripts/generate.py --model DIR "Once upon a time"
python scripts/generate.py --model DIR --chat "Who are you?"    one question
python scripts/generate.py --model DIR --chat                   a conversation; empty line ends it
"""

import argparse
import sys
import time
from typing import Any

from ernie_engine import Engine, EngineDeadError, SamplingParams, Stream
from ernie_engine.cli import add_engine_arguments, engine_fields


def main() -> int:
    args = _parser().parse_args()
    if args.prompt is None and not args.chat:
        print("error: give a prompt, or --chat for a conversation", file=sys.stderr)
        return 2
    try:
        params = SamplingParams(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=args.seed,
            stop=args.stop,
        )
        with Engine(**engine_fields(args)) as engine:
            if engine.rank == 0:
                _answer(engine, args, params)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _answer(engine: Engine, args: argparse.Namespace, params: SamplingParams) -> None:
    if args.chat and args.prompt is None:
        _converse(engine, params)
    elif args.chat:
        _show(engine.stream_chat([{"role": "user", "content": args.prompt}], params))
    else:
        print(args.prompt, end="", flush=True)
        _show(engine.stream(args.prompt, params))


def _converse(engine: Engine, params: SamplingParams) -> None:
    messages: list[dict[str, Any]] = []
    while question := _ask():
        messages.append({"role": "user", "content": question})
        answer = _show(engine.stream_chat(messages, params))
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def _show(stream: Stream) -> str:
    """Print an answer as it comes; then its speed and why it ended. Returns its text."""
    started, first, count, text, reason = time.perf_counter(), 0.0, 0, "", None
    with stream:
        for piece in stream:
            first = first or time.perf_counter() - started
            count += len(piece.token_ids)
            text += piece.text
            reason = piece.finish_reason
            print(piece.text, end="", flush=True)
    decoding = time.perf_counter() - started - first
    speed = f", then {(count - 1) / decoding:.1f} tokens/s" if count > 1 else ""
    print(
        f"\n[{len(stream.prompt_token_ids)} prompt tokens; first token after {first * 1e3:.0f} ms"
        f"{speed}; {count} tokens, finish_reason {reason}]"
    )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="?", help="text to continue, or with --chat a question")
    parser.add_argument("--chat", action="store_true", help="use the checkpoint's chat template")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="may be given repeatedly")
    add_engine_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
