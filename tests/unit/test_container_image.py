"""k8s/Dockerfile and what it is built from, as far as it can be told without building it."""

import re

from manifests import ROOT


def stages() -> dict[str, str]:
    text = re.sub(r"^#.*\n", "", (ROOT / "k8s" / "Dockerfile").read_text(), flags=re.M)
    parts = re.split(r"^FROM (\S+)(?: AS (\S+))?$", text, flags=re.M)[1:]
    return {parts[i + 1]: parts[i] + "\n" + parts[i + 2] for i in range(0, len(parts), 3)}


def test_image_is_pinned_by_digest_runs_as_nobody_and_has_no_compiler_on_cpus():
    made = stages()
    (base,) = (stage for stage in made.values() if stage.startswith("$"))
    assert base.startswith("${PYTHON_IMAGE}@${PYTHON_DIGEST}")
    assert re.search(r"^ARG PYTHON_DIGEST$", (ROOT / "k8s" / "Dockerfile").read_text(), re.M), "it has no default"
    for target in ("cpu", "cuda"):
        stage, lineage = made[target], made[target]
        while (parent := stage.split("\n")[0]) in made:
            stage = made[parent]
            lineage = stage + lineage
        assert lineage.rstrip().endswith("USER 1000:1000")
        assert bool(re.search(r"g\+\+|gcc|clang|build-essential|cmake", lineage)) == (target == "cuda")


def test_build_context_holds_what_the_image_copies_and_nothing_else():
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    taken = {line[1:] for line in rest if line.startswith("!")}
    assert first == "*" and taken <= {"configs", "launch", "megascale", "k8s"} | {
        path.name for path in ROOT.glob("*.*") if path.is_file()
    } | {"LICENSE"}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "k8s" / "Dockerfile").read_text(), re.M)
    assert set(" ".join(copied).split()) - {"."} <= taken and {"launch", "configs", "k8s"} <= taken


def test_python_of_the_image_is_one_that_the_project_takes():
    version = re.search(r"python:(\d+)\.(\d+)", (ROOT / "k8s" / "Dockerfile").read_text()).groups()
    least = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    assert tuple(map(int, version)) >= tuple(map(int, least))
