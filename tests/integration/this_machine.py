"""A cloud of one machine for Ray's cluster launcher: its commands run here, in place of over ssh, with $HOME as set.

Ray loads it by `provider: {type: external, module: this_machine.ThisMachine}`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider

_NODE = "this-machine"


class ThisMachine(NodeProvider):
    """Knows one node, and its tags from one command to the next."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._tags = Path.home() / "tags.json"

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        fits = self._tags.exists() and tag_filters.items() <= self.node_tags(_NODE).items()
        return [_NODE] if fits else []

    def is_running(self, node_id: str) -> bool:
        return self._tags.exists()

    def is_terminated(self, node_id: str) -> bool:
        return not self._tags.exists()

    def node_tags(self, node_id: str) -> dict[str, str]:
        return json.loads(self._tags.read_text())

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._tags.write_text(json.dumps(self.node_tags(node_id) | tags))

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        self._tags.write_text(json.dumps(tags))

    def external_ip(self, node_id: str) -> str:
        return "127.0.0.1"

    def internal_ip(self, node_id: str) -> str:
        return "127.0.0.1"

    def get_command_runner(self, *args: Any, **kwargs: Any) -> CommandRunnerInterface:
        return _Shell()


class _Shell(CommandRunnerInterface):
    def run(self, cmd: str | None = None, timeout: int = 120, exit_on_fail: bool = False, **kwargs: Any) -> str:
        done = subprocess.run(["bash", "-c", cmd or "true"], cwd=Path.home(), timeout=timeout, check=False)
        if done.returncode != 0:
            if exit_on_fail:
                sys.exit(done.returncode)
            raise subprocess.CalledProcessError(done.returncode, str(cmd))
        return ""

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        where = Path(os.path.expanduser(target))
        where.parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_dir():
            left_out = shutil.ignore_patterns(*(options or {})["rsync_exclude"])
            shutil.copytree(source, where, dirs_exist_ok=True, ignore=left_out)
        else:
            shutil.copy(source, where)

    def run_init(self, *, as_head: bool, file_mounts: dict[str, str], sync_run_yet: bool) -> None:
        return None
