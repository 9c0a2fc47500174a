"""Makes ernie-tiny: its text, tokenizer, weights, check and files, by one command. See --help."""

import sys

from tiny.run import make
from tiny.settings import parse

if __name__ == "__main__":
    sys.exit(make(parse()))
