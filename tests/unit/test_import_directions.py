"""Import directions: who may import whom (DESIGN, section 3), read from the syntax tree of every file.

launch -> tasks, tokenize, downstream, report -> train, data, model -> storage, tokens, seeding, log, config, errors
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Upper levels may import lower ones. Units of one level are strangers to each other, but for the two levels that are a
# row: there a unit may import those to its right.
LEVELS = (
    (
        "launch",
        "__main__",
        "checkpoint_commands",
        "export_commands",
        "doctor_command",
        "doctor_services",
        "doctor",
        "cli",
        "predict_command",
        "quickstart",
        "quickstart_report",
        "table_baselines",
        "table_embeddings",
        "table_page",
        "tokenize_report",
        "watch_page",
        "hear",
        "bench",
    ),
    ("tasks", "tokenize", "downstream", "report", "export"),
    ("train", "data", "model", "protocols"),
    (
        "cluster",
        "run_folder",
        "model_card",
        "hub",
        "storage",
        "local_disk",
        "retry",
        "spectrogram",
        "tokens",
        "seeding",
        "stopping",
        "ports",
        "log",
        "sinks",
        "corpora",
        "synthesis",
        "config",
        "errors",
        "megascale",
    ),
)
ROWS = (0, 3)
# of downstream/: splits and scores, which fine-tuning, the table and pages share; in LEVELS they are `protocols`
PROTOCOLS = (["protocols"], ["split_lists"], ["split_check"], ["scores"], ["intervals"])
ALSO_ALLOWED = {("protocols", "data")}  # splits and scores are about stored clips
ONLY_IMPORTERS = {
    "deepspeed": {"megascale/train/engine.py"},
    "ray": {"megascale/cluster.py"},
}
LEVEL_OF = {unit: number for number, units in enumerate(LEVELS) for unit in units}


def unit_of(module: str) -> str:
    """`megascale.data.index` -> data; the package itself -> megascale; a script of launch/ -> launch."""
    parts = module.split(".")
    if parts[0] != "megascale":
        return parts[0]
    if parts[1:2] == ["downstream"] and parts[2:3] in PROTOCOLS:
        return "protocols"
    return parts[1] if len(parts) > 1 else "megascale"


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(path: str, source: str, modules: set[str]) -> list[str]:
    """Every module that a file imports, wherever in it, absolute or relative, and by importlib with a literal name."""
    package = module_of(path).split(".") if path.endswith("__init__.py") else module_of(path).split(".")[:-1]
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import x` is an import of the module package.x, where there is one
            found += [f"{name}.{a.name}" if f"{name}.{a.name}" in modules else name for a in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append(str(node.args[0].value))
    return found


def may_import(importer: str, other: str) -> bool:
    if importer == other or (importer, other) in ALSO_ALLOWED:
        return True
    level, below = LEVEL_OF[importer], LEVEL_OF[other]
    if level == below:
        row = LEVELS[level]
        return level in ROWS and row.index(importer) < row.index(other)
    return level < below


def violations(sources: dict[str, str]) -> list[str]:
    """Return one line per import that goes the wrong way, given each file's path and text."""
    wrong = []
    modules = {module_of(path) for path in sources}
    for path, source in sources.items():
        for name in imported(path, source, modules):
            top = name.partition(".")[0]
            if top in ONLY_IMPORTERS and path not in ONLY_IMPORTERS[top]:
                wrong.append(f"{path} imports {name}")
            if top not in ("megascale", "launch"):
                continue
            importer, other = unit_of(module_of(path)), unit_of(name)
            unknown = {importer, other} - LEVEL_OF.keys()
            if unknown:
                wrong.append(f"{path} imports {name}: give {', '.join(sorted(unknown))} a place in LEVELS")
            elif not may_import(importer, other):
                wrong.append(f"{path} imports {name}")
    return wrong


def files() -> dict[str, str]:
    found = [path for folder in ("megascale", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def test_imports_point_down_only():
    sources = files()
    assert {"megascale/cli.py", "megascale/tokenize/job.py", "launch/pretrain.py"} <= sources.keys()
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("megascale/train/loop.py", "from megascale.data.loader import Batch"),
        ("megascale/train/loop.py", "from megascale import model"),
        ("megascale/train/loop.py", "from ..model.layers import Block"),
        ("megascale/train/loop.py", "def f():\n    import megascale.tasks.pretrain"),
        ("megascale/train/loop.py", "import importlib\nimportlib.import_module('megascale.model.layers')"),
        ("megascale/data/loader.py", "from megascale.tokenize.shards import build_shard"),
        ("megascale/model/layers.py", "from megascale.train import schedule"),
        ("megascale/tasks/finetune.py", "from megascale.downstream import table1"),
        ("megascale/tasks/finetune.py", "from megascale import report"),
        ("megascale/downstream/table1.py", "if True:\n    from megascale.tasks.finetune import run"),
        ("megascale/downstream/protocols.py", "from megascale.downstream.baselines import bag_of_codes"),
        ("megascale/downstream/protocols.py", "from megascale.model.layers import Block"),
        ("megascale/downstream/scores.py", "from megascale.downstream.table1 import run"),
        ("megascale/downstream/split_check.py", "from megascale.train.loop import fit"),
        ("megascale/data/index.py", "from megascale.downstream.scores import score"),
        ("megascale/downstream/intervals.py", "from megascale.downstream.table import choose"),
        ("megascale/report.py", "from megascale.cli import pretrain"),
        ("megascale/config.py", "from megascale.storage import join"),
        ("megascale/corpora.py", "from megascale import seeding"),
        ("megascale/__init__.py", "from megascale.errors import DataError"),
        ("megascale/quickstart_report.py", "from megascale.quickstart import run"),
        ("megascale/quickstart.py", "from megascale import cli"),
        ("megascale/tasks/pretrain.py", "import deepspeed.ops"),
        ("megascale/tokenize/shards.py", "def f():\n    from ray import get"),
        ("megascale/newcomer.py", "from megascale import storage"),
    ],
)
def test_an_import_that_goes_the_wrong_way_is_caught(path, line):
    assert violations(files() | {path: line}) != []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("megascale/tasks/finetune.py", "from megascale.downstream.protocols import split_clips"),
        ("megascale/tasks/finetune.py", "from megascale.downstream.scores import score"),
        ("megascale/downstream/protocols.py", "from megascale.data.index import StoredClip"),
        ("megascale/data/loader.py", "from .index import Manifest"),
        ("megascale/storage.py", "from megascale.config import Section"),
        ("megascale/corpora.py", "from megascale.config import Section"),
        ("megascale/cli.py", "from megascale import quickstart, report"),
    ],
)
def test_an_import_that_goes_the_right_way_passes(path, line):
    assert violations(files() | {path: line}) == []


def test_no_launch_script_is_named_like_a_stdlib_module():
    # a script's folder leads sys.path, so launch/tokenize.py would replace the stdlib's tokenize
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert "pretrain" in names
    assert names & sys.stdlib_module_names == set()
    assert "tokenize" in sys.stdlib_module_names, "the check would see the name that once broke `import ray`"
