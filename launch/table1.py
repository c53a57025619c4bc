"""Every task, arm and bitrate of the paper's Table 1, fanned out over Ray.

python launch/table1.py CONFIG.yaml [dotted.key=value ...]; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.cli import table1

if __name__ == "__main__":
    sys.exit(table1())
