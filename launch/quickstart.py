"""The whole way on a small corpus.

python launch/quickstart.py CONFIG.yaml [dotted.key=value ...]; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.cli import quickstart

if __name__ == "__main__":
    sys.exit(quickstart())
