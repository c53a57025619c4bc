"""The table's page: the table beside the paper's, confusion matrices, maps of embeddings."""

import numpy as np
from test_report import table

from megascale import table_page
from megascale.downstream.table import PAPER


def test_table1_report_is_table1_html(tmp_path):
    classes = [f"class {i % 12}" for i in range(60)]
    maps = [("gtzan, 1.5 kbps", np.random.default_rng(0).normal(size=(60, 2)), classes)]
    table_page.write_table1_report(str(tmp_path), table(("gtzan",)), PAPER, lambda: maps)
    assert {path.name for path in tmp_path.iterdir()} == {"table1.html", "confusion-gtzan.png", "embeddings.png"}
