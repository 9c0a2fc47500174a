"""Serve a checkpoint to OpenAI clients.

python scripts/serve.py --model DIR
python scripts/serve.py --config FILE.yaml      the same names as the flags, with _ for -
"""

import argparse
import logging
import sys
from pathlib import Path

from ernie_engine import EngineConfig, EngineDeadError
from ernie_engine.cli import add_arguments, add_engine_arguments, arguments_of_file, chosen_fields
from ernie_engine.server.engine_process import serve
from ernie_engine.server.settings import ServerConfig


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        args = _parse(sys.argv[1:])
        server = ServerConfig(**chosen_fields(args, ServerConfig))
        return serve(EngineConfig(**chosen_fields(args, EngineConfig)), server)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Flags win over the file's values, for they come later."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, metavar="FILE", help="YAML file with options")
    known, rest = first.parse_known_args(arguments)
    if known.config is not None:
        rest = arguments_of_file(known.config, [ServerConfig, EngineConfig]) + rest
    parser = argparse.ArgumentParser(
        description=__doc__,
        parents=[first],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser, ServerConfig, "server")
    add_engine_arguments(parser)
    return parser.parse_args(rest)


if __name__ == "__main__":
    sys.exit(main())
