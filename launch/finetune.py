"""A checkpoint, or new weights, to a classifier and its scores.

python launch/finetune.py CONFIG.yaml [dotted.key=value ...]; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.cli import finetune

if __name__ == "__main__":
    sys.exit(finetune())
