"""The entry of `python -m leangpt.train` and `torchrun -m leangpt.train`: `leangpt train` under another name."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
