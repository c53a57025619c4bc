"""launch/pretrain.py that writes down which clips each update got, and a digest of each one's crop, mask and drop.

RECORD names a folder; each rank appends to its own file there.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megascale import cli  # noqa: E402
from megascale.data.loader import Batch, PretrainBatches  # noqa: E402
from megascale.log import rank  # noqa: E402

served = PretrainBatches.micro_batches


def recorded(self: PretrainBatches, step: int) -> list[Batch]:
    batches = served(self, step)
    rows = [
        hashlib.sha256(b"".join(batch[name][i].numpy().tobytes() for name in sorted(batch))).hexdigest()
        for batch in batches
        for i in range(len(batch["codes_BTQ"]))
    ]
    with (Path(os.environ["RECORD"]) / f"rank-{rank()}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "clips": list(zip(self.keys(step), rows, strict=True))}) + "\n")
    return batches


PretrainBatches.micro_batches = recorded  # type: ignore[method-assign]
sys.exit(cli.pretrain())
