"""`python -m tests.fuzz`."""

import argparse

import tests.fuzz
from tests.fuzz import KINDS, main

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=tests.fuzz.__doc__)
parser.add_argument("kind", choices=KINDS)
parser.add_argument("--cases", type=int, default=1000)
parser.add_argument("--seed", type=int, default=0)
raise SystemExit(main(**vars(parser.parse_args())))
