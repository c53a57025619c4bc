"""Audio to token shards, on Ray.

python launch/tokenize_audio.py CONFIG.yaml [dotted.key=value ...]; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.cli import tokenize

if __name__ == "__main__":
    sys.exit(tokenize())
