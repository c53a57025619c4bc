"""Compressed audio, token shards or raw audio to labels and embeddings, as JSON lines.

python launch/predict.py MODEL INPUT …; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.cli import predict

if __name__ == "__main__":
    sys.exit(predict())
