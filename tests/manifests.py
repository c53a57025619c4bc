"""Kubernetes manifests as kubectl renders them, the pods in them, and what a pod must not lack."""

import base64
import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ("local", "aws", "gpu-8x8", "gpu-8x8-jobset")
# https://kubernetes.io/docs/concepts/security/pod-security-standards/, profile Restricted
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of a kustomization; skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which has kustomize built in, is not here")
    return copy.deepcopy(_rendered(folder))


@functools.cache
def _rendered(folder: Path) -> list[dict[str, Any]]:
    line = ["kubectl", "kustomize", str(folder), "--load-restrictor=LoadRestrictionsNone"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(objects, *kinds: str):
    return [made for made in objects if made["kind"] in kinds]


def one(objects, kind: str, named: str):
    (found,) = (made for made in objects if (made["kind"], made["metadata"]["name"]) == (kind, named))
    return found


def name(made: dict[str, Any]) -> str:
    return f"{made['kind']}/{made['metadata']['name']}"


def pods(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and the spec of every pod that an object would make: wherever a spec has containers."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield path, node
        for key, value in node.items():
            yield from pods(value, f"{path}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from pods(value, f"{path}[{number}]")


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", []), *pod.get("ephemeralContainers", [])]


@dataclass(frozen=True)
class Pod:
    """A container of a manifest, with what Kubernetes puts into its environment."""

    container: dict[str, Any]
    objects: list[dict[str, Any]]
    labels: dict[str, str]

    def environment(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in self.container.get("envFrom", []):
            for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                if key in source:
                    found |= self._read(kind, source[key]["name"])
        for variable in self.container.get("env", []):
            value = self._value(variable, found)
            if value is not None:
                found[variable["name"]] = value
        return found

    def command(self, environment: dict[str, str]) -> list[str]:
        return [expand(word, environment) for word in self.container["command"]]

    def _read(self, kind: str, name: str) -> dict[str, str]:

        for made in self.objects:
            if (made["kind"], made["metadata"]["name"]) == (kind, name):
                plain = kind == "ConfigMap"
                return {
                    key: value if plain else base64.b64decode(value).decode() for key, value in made["data"].items()
                }
        return {}

    def _value(self, variable: dict[str, Any], before: dict[str, str]) -> str | None:
        if "value" in variable:
            return expand(variable["value"], before)
        source = variable["valueFrom"]
        if "fieldRef" in source:
            return self.labels[re.fullmatch(r"metadata\.labels\['(.+)'\]", source["fieldRef"]["fieldPath"])[1]]
        kind, key = ("ConfigMap", "configMapKeyRef") if "configMapKeyRef" in source else ("Secret", "secretKeyRef")
        value = self._read(kind, source[key]["name"]).get(source[key]["key"])
        assert value is not None or source[key].get("optional"), variable
        return value


def expand(text: str, environment: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], text)


def one_pod(
    objects: list[dict[str, Any]], kind: str, name: str, labels: dict[str, str] | None = None, path: str = ""
) -> Pod:
    """Return the only container of the pod of an object, or of its pod at a path."""
    (made,) = (made for made in objects if (made["kind"], made["metadata"]["name"]) == (kind, name))
    (pod,) = (pod for where, pod in pods(made) if path in where)
    (container,) = pod["containers"]
    return Pod(container, objects, labels or {})


def unrestricted(pod: dict[str, Any]) -> list[str]:
    """Return each way in which a pod breaks the profile `restricted` of the Pod Security Standards."""
    context = pod.get("securityContext", {})
    wrong = [f"{key} is true" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    for volume in pod.get("volumes", []):
        wrong += [f"volume {volume['name']}: {kind}" for kind in volume.keys() - VOLUMES - {"name"}]
    wrong += [f"sysctl {row['name']}" for row in context.get("sysctls", []) if row["name"] not in SYSCTLS]
    for container in containers(pod):
        wrong += [f"{container['name']}: {what}" for what in _of_container(container, context)]
    return wrong


def _of_container(container: dict[str, Any], of_pod: dict[str, Any]) -> list[str]:
    own = container.get("securityContext", {})
    both = of_pod | own
    capabilities = own.get("capabilities", {})
    rules = {
        "privileged": not own.get("privileged", False),
        "allowPrivilegeEscalation is not false": own.get("allowPrivilegeEscalation") is False,
        "capabilities are not all dropped": "ALL" in capabilities.get("drop", []),
        "capabilities are added": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
        "runAsNonRoot is not true": both.get("runAsNonRoot") is True,
        "runs as user 0": both.get("runAsUser") != 0,
        "no seccomp profile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
        "procMount": own.get("procMount", "Default") == "Default",
        "AppArmor is off": both.get("appArmorProfile", {}).get("type", "RuntimeDefault") != "Unconfined",
        "SELinux user or role": not {"user", "role"} & both.get("seLinuxOptions", {}).keys(),
        "host ports": not any(port.get("hostPort") for port in container.get("ports", [])),
        "host of a probe or hook": not any(handler.get("host") for handler in _handlers(container)),
    }
    return [what for what, kept in rules.items() if not kept]


def _handlers(container: dict[str, Any]) -> list[dict[str, Any]]:
    probes = [container.get(f"{kind}Probe", {}) for kind in ("liveness", "readiness", "startup")]
    hooks = list(container.get("lifecycle", {}).values())
    return [made.get(kind, {}) for made in (*probes, *hooks) for kind in ("httpGet", "tcpSocket")]


def unkept(pod: dict[str, Any]) -> list[str]:
    """Return each rule of our own that a pod breaks: resources, a root file system that is only read, room to write."""
    wrong = []
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for container in containers(pod):
        resources, mounts = container.get("resources", {}), container.get("volumeMounts", [])
        mounted = {mount["mountPath"] for mount in mounts}
        rules = {
            "no requests": {"cpu", "memory", "ephemeral-storage"} <= resources.get("requests", {}).keys(),
            "no limits": {"cpu", "memory", "ephemeral-storage"} <= resources.get("limits", {}).keys(),
            "root file system is not read-only": container.get("securityContext", {}).get("readOnlyRootFilesystem")
            is True,
            "nowhere to write": "/tmp" in mounted,
            "a mount without a volume": all(mount["name"] in volumes for mount in mounts),
        }
        wrong += [f"{container['name']}: {what}" for what, kept in rules.items() if not kept]
    for volume in volumes.values():
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            wrong.append(f"volume {volume['name']} has no sizeLimit")
    return wrong


def closed(schema: Any) -> Any:
    """Return a CRD's OpenAPI schema as a JSON schema that takes no key it does not name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key not in ("format", "description")}
    if made.pop("x-kubernetes-int-or-string", False):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in made and isinstance(made["properties"], dict) and made.get("type") == "object":
        open_ended = made.get("x-kubernetes-preserve-unknown-fields", False)
        made.setdefault("additionalProperties", open_ended)
        if made.pop("x-kubernetes-embedded-resource", False):
            made["properties"] |= {key: {} for key in ("apiVersion", "kind", "metadata")}
    return made


def custom_schemas(folder: Path) -> dict[tuple[str, str], Any]:
    """Return the schemas of the CustomResourceDefinitions in a folder, by apiVersion and kind."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        for made in yaml.safe_load_all(path.read_text()):
            spec = made["spec"]
            for version in spec["versions"]:
                schema = closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found
