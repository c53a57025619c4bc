"""Benchmarks.

python launch/bench.py NAME [--rounds N]; NAME is one of: tokenize, train, load, predict, scale, gpu.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.bench import gpu, load, predict, scale, tokenize, train

BENCHMARKS = {
    "tokenize": tokenize.run,
    "train": train.run,
    "load": load.run,
    "predict": predict.run,
    "scale": scale.run,
    "gpu": gpu.run,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ratios measured side by side in one run; writes runs/bench/NAME.json")
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    given = parser.parse_args()
    BENCHMARKS[given.name](given.rounds)
