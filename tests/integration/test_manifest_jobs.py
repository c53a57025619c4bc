"""What the manifests' jobs ask for and do: nodes, GPUs, room, commands, and what happens when one ends."""

import json
import os
import re

import pytest
from manifests import (
    OVERLAYS,
    ROOT,
    containers,
    expand,
    name,
    of_kind,
    one,
    one_pod,
    pods,
    render,
)

from megascale.config import load_config
from megascale.downstream.table1_config import Table1Config
from megascale.tasks.finetune_config import FinetuneConfig
from megascale.tasks.pretrain_config import PretrainConfig
from megascale.tokenize.plan import TokenizeConfig

NODES = {"local": (2, None), "aws": (2, 1), "gpu-8x8": (8, 8), "gpu-8x8-jobset": (8, 8)}  # and GPUs of each
QUEUE = "kueue.x-k8s.io/queue-name"


@pytest.fixture(params=OVERLAYS)
def objects(request):
    return render(ROOT / "k8s" / "overlays" / request.param)


def test_ray_jobs_end_their_clusters_and_keep_work_off_the_head(objects):
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    jobs = of_kind(objects, "RayJob")
    assert {made["metadata"]["name"] for made in jobs} == {"tokenize", "table1"}
    for made in jobs:
        spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
        assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0 and spec["backoffLimit"] > 0
        assert cluster["rayVersion"] == pinned and cluster["authOptions"] == {"mode": "token"}
        assert cluster["enableInTreeAutoscaling"]
        (workers,) = cluster["workerGroupSpecs"]
        assert workers["minReplicas"] < workers["maxReplicas"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        images = {container["image"] for _, pod in pods(made) for container in containers(pod)}
        assert len(images) == 1 and f"-ray{pinned}" in images.pop()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nodes_and_gpus_are_those_of_the_overlay(overlay):
    objects = render(ROOT / "k8s" / "overlays" / overlay)
    nodes, gpus = NODES[overlay]
    asked = {}
    for made in objects:
        for _, pod in pods(made):
            for container in containers(pod):
                count = container["resources"]["limits"].get("nvidia.com/gpu")
                asked[f"{name(made)} {container['name']}"] = count
                tolerated = any(each["key"] == "nvidia.com/gpu" for each in pod.get("tolerations", []))
                assert tolerated == (count is not None), f"{name(made)} {container['name']}"
    without = {key for key in asked if "ray-head" in key or "submitter" in key}
    assert all((count is None) == (gpus is None or key in without) for key, count in asked.items())
    ranks = str(gpus or 1)
    for made in of_kind(objects, "TrainingRuntime"):
        assert made["spec"]["mlPolicy"]["numNodes"] == nodes and asked[f"{name(made)} node"] == ranks
    for made in of_kind(objects, "TrainJob"):
        assert made["spec"]["trainer"]["numProcPerNode"] == int(ranks)
    for made in of_kind(objects, "JobSet"):
        job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
        said = {row["name"]: row.get("value") for row in job["template"]["spec"]["containers"][0]["env"]}
        assert job["parallelism"] == job["completions"] == int(said["PET_NNODES"]) == nodes
        assert said["PET_NPROC_PER_NODE"] == ranks and asked[f"{name(made)} node"] == (gpus and ranks)
    images = {container["image"] for made in objects for _, pod in pods(made) for container in containers(pod)}
    assert len(images) == 1 and images.pop().startswith("megascale:" if overlay == "local" else "000000000000.dkr.ecr.")
    for made in of_kind(objects, "RayJob"):
        assert made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == {None: 2, 1: 8, 8: 64}[gpus]


@pytest.mark.parametrize("overlay", [each for each in OVERLAYS if each != "local"])
def test_a_role_takes_the_place_of_keys_on_eks(overlay):
    objects = render(ROOT / "k8s" / "overlays" / overlay)
    for made in objects:
        for _, pod in pods(made):
            assert all("secretRef" not in each for row in containers(pod) for each in row.get("envFrom", []))
    assert "eks.amazonaws.com/role-arn" in one(objects, "ServiceAccount", "megascale")["metadata"]["annotations"]


def test_object_store_of_ray_finds_room_in_shared_memory(objects):
    """Ray takes 30% of a container's memory, at most 10 GB, and goes to the disk where /dev/shm has less."""
    for made in of_kind(objects, "RayJob"):
        for _, pod in pods(made):
            for container in containers(pod):
                shared = [row["emptyDir"] for row in pod["volumes"] if row["name"] == "shm"]
                if container["name"] != "ray-job-submitter":
                    memory = gib(container["resources"]["limits"]["memory"])
                    assert gib(shared[0]["sizeLimit"]) >= min(0.3 * memory, 1e10 / 2**30)


def gib(quantity: str) -> float:
    return float(quantity.removesuffix("Gi"))


def test_configs_that_the_commands_name_take_what_they_override(objects):
    """Parsed by each job's own loader; the commands of `local` run in test_manifest_commands.py."""
    (settings,) = (made["data"] for made in of_kind(objects, "ConfigMap"))
    lines = [(FinetuneConfig, "finetune", one_pod(objects, "Job", "finetune").command(settings)[2:])]
    for made in of_kind(objects, "TrainJob", "JobSet"):
        told = settings | {"RUN": made["metadata"]["name"], "BITRATE_KBPS": "12"}
        for key in ("PRETRAIN_1K5_CONFIG", "PRETRAIN_12K_CONFIG"):
            words = [expand(word, told | {"PRETRAIN_CONFIG": settings[key]}) for word in command_of(made)]
            lines.append((PretrainConfig, "pretrain", words[words.index("k8s/pretrain.sh") + 1 :]))
    table = one(objects, "RayJob", "table1")["spec"]["entrypoint"]
    lines.append((Table1Config, "table1", re.sub(r"\$(\w+)", lambda found: settings[found[1]], table).split()[2:]))
    for kind in ("gtzan", "nsynth", "music_speech"):
        words = [settings["TOKENIZE_CONFIG"], f"source.kind={kind}", f"source.url={settings['AUDIO_URL']}/{kind}"]
        lines.append((TokenizeConfig, "tokenize", words))
    lines.append((TokenizeConfig, "tokenize", [settings["TOKENIZE_CONFIG"], *settings["SOURCE"].split()]))
    for schema, job, (path, *overrides) in lines:
        load_config(schema, job, str(ROOT / path), overrides)


def command_of(made):
    if made["kind"] == "TrainJob":
        return made["spec"]["trainer"]["command"]
    return next(pod["containers"][0]["command"] for _, pod in pods(made))


def test_a_pod_may_take_longer_to_stop_than_its_ranks_to_save(objects):
    grace = {
        name(made): pod["terminationGracePeriodSeconds"]
        for made in of_kind(objects, "JobSet", "TrainingRuntime", "Job")
        for _, pod in pods(made)
    }
    commands = [made["spec"]["trainer"]["command"] for made in of_kind(objects, "TrainJob")]
    for made in of_kind(objects, "JobSet"):
        commands += [container["command"] for _, pod in pods(made) for container in containers(pod)]
    assert len(commands) == 2 and min(grace.values()) > 300
    assert all(line[:2] == ["sh", "k8s/pretrain.sh"] for line in commands)
    assert "torchrun --shutdown-timeout=300 " in (ROOT / "k8s" / "pretrain.sh").read_text()


def test_mistakes_end_a_pretraining_and_lost_nodes_cost_none_of_its_restarts(objects):
    """As we read Kubernetes' pod_failure_policy.go, which words the message, and JobSet's rules, of which the first counts."""
    for made in of_kind(objects, "JobSet", "TrainingRuntime"):
        policy = made["spec"].get("template", made)["spec"]["failurePolicy"]
        (job,) = jobs_of(made)
        rules = job["podFailurePolicy"]["rules"]
        assert policy["maxRestarts"] > 0 and all(rule["action"] == "FailJob" for rule in rules)

        def action(ended, rules=rules, policy=policy):
            index = next((i for i, rule in enumerate(rules) if ended(rule)), None)
            reason = "BackoffLimitExceeded" if index is None else "PodFailurePolicy"
            message = f"Container node for pod a/b failed with exit code 1 matching FailJob rule at index {index}"
            for rule in policy["rules"]:
                patterns = rule.get("onJobFailureMessagePatterns", [""])
                if reason in rule["onJobFailureReasons"] and any(re.search(each, message) for each in patterns):
                    return rule["action"]
            return "RestartJobSet"

        codes = {
            code: action(lambda rule, code=code: code in rule.get("onExitCodes", {}).get("values", []))
            for code in (1, 2, 4, 75, 137)
        }
        again = "RestartJobSetAndIgnoreMaxRestarts"
        assert codes == {1: "RestartJobSet", 2: "FailJobSet", 4: "FailJobSet", 75: again, 137: "RestartJobSet"}
        assert action(lambda rule: "onPodConditions" in rule) == again


def jobs_of(made):
    """Return the specs of the jobs of a JobSet or of a runtime's."""
    spec = made["spec"].get("template", made)["spec"]
    return [each["template"]["spec"] for each in spec["replicatedJobs"]]


def test_jobset_says_what_the_trainer_would(tmp_path):
    """The same command, the same pod and the same restarts at both bitrates, whoever starts the nodes."""
    plain = render(ROOT / "k8s" / "base")
    (tmp_path / "kustomization.yaml").write_text(
        json.dumps(
            {
                "resources": [os.path.relpath(ROOT / "k8s" / "base", tmp_path.resolve())],
                "components": [os.path.relpath(ROOT / "k8s" / "components" / "jobset", tmp_path.resolve())],
            }
        )
    )
    with_sets = render(tmp_path)
    runtime = one(plain, "TrainingRuntime", "pretrain")["spec"]
    (theirs,) = (pod for _, pod in pods(runtime))
    assert of_kind(with_sets, "TrainJob", "TrainingRuntime") == []
    for job in of_kind(plain, "TrainJob"):
        made = one(with_sets, "JobSet", job["metadata"]["name"])
        assert made["metadata"]["labels"] == job["metadata"]["labels"]
        (ours,) = (pod for _, pod in pods(made))
        trainer, container = job["spec"]["trainer"], ours["containers"][0]
        assert container.pop("command") == trainer["command"]
        said = {variable["name"]: variable for variable in container.pop("env")}
        assert all(said[each["name"]] == each for each in trainer["env"] if each["name"] != "RUN")
        rest = {each["name"] for each in theirs["containers"][0]["env"]} | {each["name"] for each in trainer["env"]}
        assert {key for key in said if not key.startswith("PET_")} == rest
        own = {key: value for key, value in theirs["containers"][0].items() if key != "env"}
        assert container == own and ours | {"containers": []} == theirs | {"containers": []}
        assert made["spec"]["failurePolicy"] == runtime["template"]["spec"]["failurePolicy"]
        replicated, wanted = made["spec"]["replicatedJobs"][0], runtime["template"]["spec"]["replicatedJobs"][0]
        assert replicated["name"] == wanted["name"] == "node"
        nodes = runtime["mlPolicy"]["numNodes"]
        assert int(said["PET_NPROC_PER_NODE"]["value"]) == trainer["numProcPerNode"]
        job_spec = replicated["template"]["spec"]
        assert job_spec["parallelism"] == job_spec["completions"] == int(said["PET_NNODES"]["value"]) == nodes
        theirs_job = wanted["template"]["spec"]
        assert {key: job_spec[key] for key in theirs_job if key != "template"} == {
            key: theirs_job[key] for key in theirs_job if key != "template"
        }


@pytest.mark.parametrize("overlay", ["local", "aws"])
def test_kueue_holds_every_job_back(tmp_path, overlay):
    (tmp_path / "kustomization.yaml").write_text(
        json.dumps(
            {
                "resources": [os.path.relpath(ROOT / "k8s" / "overlays" / overlay, tmp_path.resolve())],
                "components": [os.path.relpath(ROOT / "k8s" / "components" / "kueue", tmp_path.resolve())],
            }
        )
    )
    jobs = of_kind(render(tmp_path), "RayJob", "JobSet", "TrainJob", "Job")
    assert len(jobs) == 5
    for made in jobs:
        assert made["metadata"]["labels"][QUEUE] == "megascale" and made["spec"]["suspend"] is True
        elastic = made["metadata"].get("annotations", {}).get("kueue.x-k8s.io/elastic-job")
        assert elastic == ("true" if made["kind"] == "RayJob" else None)


def test_every_step_can_be_applied_alone(objects):
    steps = {made["metadata"]["labels"]["app.kubernetes.io/component"] for made in objects}
    assert steps == {"shared", "tokenize", "pretrain-1k5", "pretrain-12k", "finetune", "table1"}
