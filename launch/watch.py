"""Downstream accuracy over the course of a pretraining run, while it goes on.

python launch/watch.py CONFIG.yaml [dotted.key=value ...]; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.cli import watch

if __name__ == "__main__":
    sys.exit(watch())
