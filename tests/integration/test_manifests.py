"""What kubectl would apply: each object against its API's schema, each pod against `restricted`."""

import os
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from manifests import (
    OVERLAYS,
    ROOT,
    containers,
    custom_schemas,
    name,
    of_kind,
    one,
    pods,
    render,
    unkept,
    unrestricted,
)

CORE = ("v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1")


@pytest.fixture(params=OVERLAYS)
def objects(request):
    return render(ROOT / "k8s" / "overlays" / request.param)


@pytest.fixture(scope="module")
def crds():
    """Set by whoever has them: `kubectl kustomize 'https://github.com/ray-project/kuberay/ray-operator/config/crd'`, …"""
    folder = os.environ.get("MEGASCALE_CRDS")
    if folder is None:
        pytest.skip("MEGASCALE_CRDS names no folder with the CustomResourceDefinitions of KubeRay, JobSet and Trainer")
    return custom_schemas(Path(folder))


# ------------------------------------------------------------------------------------------------------------- schemas


def test_core_objects_are_what_their_api_takes(objects):
    core = [made for made in objects if made["apiVersion"] in CORE]
    assert len(core) >= 14
    for made in core:
        kubernetes_validate.validate(made, "1.37", strict=True)
    made = one(objects, "Job", "finetune")
    made["spec"]["template"]["spec"]["containers"][0]["comand"] = ["python"]  # the negative control
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(made, "1.37", strict=True)


def test_custom_objects_are_what_their_definitions_take(objects, crds):
    custom = [made for made in objects if made["apiVersion"] not in CORE]
    assert {made["kind"] for made in custom} in ({"RayJob", "JobSet"}, {"RayJob", "TrainJob", "TrainingRuntime"})
    for made in custom:
        schema = crds[made["apiVersion"], made["kind"]]
        jsonschema.validate(made, schema)
        made["spec"]["shutdownAfterJobFinish"] = True  # the negative control: a key misspelt
        with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
            jsonschema.validate(made, schema)


def test_pods_of_custom_objects_are_what_the_core_api_takes(objects):
    """A CRD may leave out what Kubernetes knows of a pod: each is held against the API as a pod of its own."""
    found = [
        (name(made), pod)
        for made in of_kind(objects, "RayJob", "JobSet", "TrainingRuntime")
        for path, pod in pods(made)
    ]
    assert len(found) >= 7
    for named, pod in found:
        made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": pod}
        try:
            kubernetes_validate.validate(made, "1.37", strict=True)
        except kubernetes_validate.ValidationError as wrong:
            raise AssertionError(f"{named}: {wrong}") from wrong


# ---------------------------------------------------------------------------------------------------------------- pods


def test_every_pod_is_restricted_and_has_what_it_needs(objects):
    seen = 0
    for made in objects:
        for path, pod in pods(made):
            seen += 1
            assert unrestricted(pod) + unkept(pod) == [], f"{name(made)}{path}"
    assert seen >= 8
    for made in of_kind(objects, "RayJob"):  # the container that KubeRay puts into the head
        scaler = made["spec"]["rayClusterSpec"]["autoscalerOptions"]
        assert scaler["securityContext"]["readOnlyRootFilesystem"] and scaler["resources"].keys() == {
            "requests",
            "limits",
        }
        pod = {"securityContext": head(made)["securityContext"], "containers": [scaler | {"name": "autoscaler"}]}
        assert unrestricted(pod) == []


def head(rayjob):
    return rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def test_pod_without_a_security_context_is_found_out(objects):
    """The negative control, object by object."""
    for made in objects:
        for path, pod in pods(made):
            whole = pod.pop("securityContext")
            assert any("runAsNonRoot" in wrong for wrong in unrestricted(pod)), f"{name(made)}{path}"
            pod["securityContext"] = whole
            for container in containers(pod):
                own = container.pop("securityContext")
                assert any("allowPrivilegeEscalation" in wrong for wrong in unrestricted(pod)), container["name"]
                assert any("read-only" in wrong for wrong in unkept(pod)), container["name"]
                container["securityContext"] = own
            assert unrestricted(pod) == []


def test_token_of_the_service_account_is_only_where_ray_scales(objects):
    assert one(objects, "ServiceAccount", "megascale")["automountServiceAccountToken"] is False
    for made in objects:
        for path, pod in pods(made):
            assert pod["serviceAccountName"] == "megascale"
            assert pod["automountServiceAccountToken"] is (".headGroupSpec." in path), f"{name(made)}{path}"


def test_secrets_are_only_referred_to(objects):
    assert of_kind(objects, "Secret") == []
    for made in objects:
        for _, pod in pods(made):
            for container in containers(pod):
                for variable in container.get("env", []):
                    assert not re.search("KEY|SECRET|TOKEN", variable["name"]) or "valueFrom" in variable
                for source in container.get("envFrom", []):
                    assert source.get("secretRef", {"optional": True})["optional"]
    (settings,) = of_kind(objects, "ConfigMap")
    assert not any(re.search("KEY|SECRET|PASSWORD", key) for key in settings["data"])


def test_namespace_refuses_what_is_not_restricted(objects):
    labels = one(objects, "Namespace", "megascale")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    namespaced = [made for made in objects if made["kind"] != "Namespace"]
    assert {made["metadata"]["namespace"] for made in namespaced} == {"megascale"}


# -------------------------------------------------------------------------------------------------- network, disruption


def test_nothing_comes_in_or_goes_out_but_through_a_hole_that_somebody_needs(objects):
    policies = {made["metadata"]["name"]: made["spec"] for made in of_kind(objects, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    networks = {}
    for made in of_kind(objects, "RayJob", "JobSet", "TrainingRuntime"):
        for template in templates(made):
            networks.setdefault(made["kind"], set()).add(template["metadata"]["labels"]["megascale/network"])
    assert networks.pop("RayJob") == {"ray"} and list(networks.values()) == [{"ranks"}]
    operator = policies["ray"]["ingress"][1]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    # which both ways to install KubeRay's operator label it with
    labelled = {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    assert operator["from"] == [{"namespaceSelector": {}, "podSelector": labelled}]
    for network in ("ray", "ranks"):
        peer = {"podSelector": {"matchLabels": {"megascale/network": network}}}
        spec = policies[network]
        assert spec["podSelector"] == peer["podSelector"]
        assert spec["ingress"][0] == {"from": [peer]} and spec["egress"] == [{"to": [peer]}]
    assert all("ingress" not in policies[each] for each in ("names", "web", "default-deny"))


def templates(node):
    """Yield every pod template: what has metadata and a spec with containers."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield node
        for value in node.values():
            yield from templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from templates(value)


def test_a_drain_waits_for_heads_and_for_rank_0(objects):
    budgets = {made["metadata"]["name"]: made["spec"] for made in of_kind(objects, "PodDisruptionBudget")}
    assert all(spec["minAvailable"] == 1 for spec in budgets.values())
    for made in of_kind(objects, "RayJob"):
        wanted = budgets.pop(f"{made['metadata']['name']}-head")["selector"]["matchLabels"]
        labels = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
        assert wanted.items() <= (labels | {"ray.io/node-type": "head"}).items()
    for made in of_kind(objects, "JobSet", "TrainJob"):
        wanted = budgets.pop(f"{made['metadata']['name']}-rank-0")["selector"]["matchLabels"]
        assert wanted == {
            "jobset.sigs.k8s.io/jobset-name": made["metadata"]["name"],
            "batch.kubernetes.io/job-completion-index": "0",
        }
    assert budgets == {}
