"""Token shards to a pretrained encoder, on DeepSpeed; also under deepspeed and torchrun.

python launch/pretrain.py CONFIG.yaml [dotted.key=value ...]; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megascale.cli import pretrain

if __name__ == "__main__":
    sys.exit(pretrain())
