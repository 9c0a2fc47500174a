"""Writes a random tiny ERNIE-4.5 checkpoint in the hub's format.

python scripts/make_checkpoint.py checkpoints/tiny-moe
python scripts/make_checkpoint.py checkpoints/tiny-dense --num-experts 0 --head-dim 64
"""

import argparse
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from ernie_engine.testing.checkpoints import CheckpointSpec, write_checkpoint


def main() -> int:
    args = vars(_parser().parse_args())
    folder = args.pop("folder")
    if folder.exists():
        print(f"error: {folder} is there already; choose another folder", file=sys.stderr)
        return 2
    try:
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was interrupted
        write_checkpoint(unfinished, CheckpointSpec(**args)).rename(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    """One option for each field of CheckpointSpec, with its name, type and default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write it; must hold no checkpoint")
    types = get_type_hints(CheckpointSpec)
    for field in fields(CheckpointSpec):
        option, kind = "--" + field.name.replace("_", "-"), types[field.name]
        text = f"default: {field.default}"
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(option, action=action, default=field.default, help=text)
        else:
            kind = next(iter(get_args(kind)), kind)  # int of `int | None`
            parser.add_argument(option, type=kind, default=field.default, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
