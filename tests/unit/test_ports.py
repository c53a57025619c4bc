import socket
import subprocess
import sys
from unittest.mock import patch

import pytest

from megascale import ports
from megascale.ports import free_port


def test_no_port_is_given_that_a_connection_may_take_meanwhile():
    for _ in range(20):
        given = {free_port() for _ in range(20)}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            assert max(given) < 32_768 <= probe.getsockname()[1]


def test_a_port_in_use_is_not_given():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
        probe.listen()
        taken = probe.getsockname()[1]
        with patch.object(ports, "_PORTS", range(taken, taken + 1)), pytest.raises(OSError, match="no free port"):
            free_port()


def test_processes_with_one_seed_draw_other_ports():
    line = [
        sys.executable,
        "-c",
        "import random; random.seed(0); from megascale.ports import free_port; print(free_port())",
    ]
    drawn = {subprocess.run(line, capture_output=True, text=True, check=True).stdout for _ in range(4)}
    assert len(drawn) > 1
