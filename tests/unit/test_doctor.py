"""`megascale doctor`: each check finds what it is there for, on real conditions, and leaves nothing behind."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from stores import HookedStore, hooked_copy
from support import largest_file

from megascale import doctor_services, storage
from megascale.doctor import (
    GPU_TORCH,
    check_compiler,
    check_disk,
    check_ranks,
    check_ray,
    check_shared_memory,
    check_temporary,
    check_torch,
    memory_bytes,
)
from megascale.doctor_services import check_clock, check_codec, check_storage, check_wandb
from megascale.storage import StorageConfig, configure

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "01234567"  # no one's


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody else takes, and where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@pytest.fixture
def web() -> Iterator[Callable[[float], str]]:
    """Start web servers whose clocks are ahead by so many seconds; each sends everybody to where nobody listens."""
    servers = []

    class Handler(BaseHTTPRequestHandler):
        ahead_seconds = 0.0

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + self.ahead_seconds)

        def do_HEAD(self) -> None:
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    def start(ahead_seconds: float) -> str:
        handler = type("Ahead", (Handler,), {"ahead_seconds": ahead_seconds})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------ torch and its ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU here")
def test_gpu_that_this_torch_cannot_use_fails(tmp_path, monkeypatch):
    (tmp_path / "nvidiactl").touch()
    assert check_torch(tmp_path).state == "ok", "the driver's other files are no GPU"
    (tmp_path / "nvidia0").touch()
    found = check_torch(tmp_path)
    assert (found.state, "nvidia0" in found.found, GPU_TORCH in found.fix) == ("FAIL", True, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_torch(tmp_path).state == "ok", "it is another job's"


def test_build_that_is_advised_is_the_readmes():
    assert GPU_TORCH.removeprefix("make clean ") in (ROOT / "README.md").read_text()


def test_ranks_add_up_a_tensor_and_do_an_update(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/none")  # as an unknown user of a container
    added, updated = check_ranks(None if torch.cuda.is_available() else 2)
    assert (added.name, added.state) == ("nccl" if torch.cuda.is_available() else "gloo", "ok")
    assert (updated.name, updated.state) == ("deepspeed", "ok")
    assert "ranks added up" in added.found and "an update under ZeRO-1" in updated.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for CPUs")
def test_network_that_is_not_there_fails_with_the_reason_and_deepspeed_is_not_blamed(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    added, updated = check_ranks(2)
    assert added.state == "FAIL" and "nosuch0" in added.found and "GLOO_SOCKET_IFNAME" in added.fix
    assert updated.state == "skip"


def test_deepspeed_that_cannot_be_imported_fails_alone(tmp_path, monkeypatch):
    (tmp_path / "deepspeed.py").write_text(
        "import atexit\natexit.register(print, 'WARNING: process group was not destroyed')\n"
        "raise ImportError('libaio.so: cannot open shared object file')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    added, updated = check_ranks(1)
    assert (added.state, updated.state) == ("ok", "FAIL")
    assert updated.found.endswith("ImportError: libaio.so: cannot open shared object file")


def test_ranks_that_take_too_long_are_ended():
    added, updated = check_ranks(1, seconds=0.2)
    assert (
        added.state == "FAIL"
        and "not done after 0.2 s (--seconds gives more)" in added.found
        and updated.state == "skip"
    )
    assert not [child for child in psutil.Process().children() if "be_a_rank" in " ".join(child.cmdline())]


def test_machine_without_a_compiler_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_compiler().state == "ok"
    (tmp_path / "g++").unlink()
    assert check_compiler().state == "warn" and "g++" in check_compiler().fix


# ------------------------------------------------------------------------------------------------- memory, disk, Ray


def test_containers_limit_is_the_memory(tmp_path):
    total = psutil.virtual_memory().total
    assert memory_bytes(tmp_path) == total
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == total
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert memory_bytes(tmp_path) == 2**30
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("536870912\n")
    assert memory_bytes(tmp_path) == 2**29


def test_small_shared_memory_is_warned_of(tmp_path):
    assert check_shared_memory(tmp_path, memory=1_000_000).state == "ok"
    for folder in (Path("/proc"), tmp_path / "none"):  # a file system without room, and none
        found = check_shared_memory(folder, memory=10_000_000_000)
        assert found.state == "warn" and "wants 3.0 GB" in found.found and "--shm-size=3g" in found.fix


def test_disk_is_written_to_and_left_as_it_was(tmp_path):
    assert check_disk(str(tmp_path / "not" / "yet"), 0.0).state == "ok"
    full = check_disk(str(tmp_path), 1e9)
    assert full.state == "FAIL" and "1e+09 are wanted" in full.found and "--disk-gb" in full.fix
    assert list(tmp_path.iterdir()) == []
    with largest_file(0):  # as on a full disk, where an empty file can be made
        assert check_disk(str(tmp_path), 0.0).state == "FAIL"
    assert list(tmp_path.iterdir()) == []
    refused = check_disk("/proc/none", 0.0)
    assert refused.state == "FAIL" and refused.found.startswith("/proc/none: cannot write: ") and refused.fix
    assert check_disk("/proc", 0.0).found.startswith("/proc: cannot write: ")


def test_no_folder_for_temporary_files_fails(monkeypatch):
    assert check_temporary().state == "ok"
    monkeypatch.setattr(tempfile, "tempdir", None)  # where Python keeps what it found
    with largest_file(0):
        found = check_temporary()
    assert found.state == "FAIL" and "No usable temporary directory" in found.found and "TMPDIR" in found.fix


def test_cluster_that_does_not_answer_fails(closed_port, monkeypatch):
    for address, state in (("", "ok"), ("local", "ok"), ("auto", "skip"), ("127.0.0.1:port", "FAIL")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert check_ray().state == state
    for scheme in ("", "ray://", "http://"):
        monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{closed_port}")
        assert check_ray().state == "FAIL" and "RAY_ADDRESS" in check_ray().fix
        with socket.create_server(("127.0.0.1", 0)) as head:
            monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{head.getsockname()[1]}")
            assert check_ray().state == "ok"


# ------------------------------------------------------------------------------------- services (S3: tests/integration)


def test_store_is_left_as_it_was(tmp_path):
    storage.publish_bytes(f"memory:/{tmp_path}/x", b"old")
    assert check_storage(f"memory:/{tmp_path}").state == "ok"
    assert storage.sizes(f"memory:/{tmp_path}") == {"x": 3}
    assert check_storage(f"file://{tmp_path}/new").state == "ok"
    assert list(tmp_path.iterdir()) == []
    assert check_storage("/proc/none").state == "FAIL"
    assert check_storage("nonsense://bucket/x").state == "FAIL"


def test_store_that_gives_other_bytes_back_fails(tmp_path):
    (tmp_path / "x").write_bytes(b"old")

    def change(name: str) -> None:
        for path in [path for path in HookedStore.store if path.endswith(f"/{name}")]:
            storage.publish_bytes(f"hooked:/{path}", b"other")

    with hooked_copy(tmp_path) as url:
        HookedStore.hook = change
        found = check_storage(url)
        assert found.state == "FAIL" and f"{url}: cannot read: other bytes came back" in found.found
        assert storage.sizes(url) == {"x": 3}


@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "somebody listens and never answers"])
def test_endpoint_that_does_not_answer_fails_before_anything_is_tried_again(closed_port, listens, monkeypatch):
    monkeypatch.setattr(doctor_services, "_NET_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if listens else closed_port
        configure(StorageConfig(endpoint_url=f"http://127.0.0.1:{port}"))
        found = check_storage("s3://bucket/x")
        assert found.state == "FAIL" and "--endpoint-url" in found.fix
        assert f"s3://bucket/x: http://127.0.0.1:{port} does not answer: " in found.found
        assert check_clock(["s3://bucket/x"]).state == "skip"


@pytest.mark.parametrize(
    ("ahead_seconds", "state", "said"),
    [(0, "ok", ""), (120, "warn", "behind"), (3600, "FAIL", "behind"), (-3600, "FAIL", "ahead of")],
)
def test_clock_that_a_store_would_not_accept_fails(web, ahead_seconds, state, said):
    server = web(ahead_seconds)
    configure(StorageConfig(endpoint_url=server))
    found = check_clock(["/tmp", "s3://bucket/x"])
    assert (found.state, said in found.found, server in found.found) == (state, True, True)
    assert check_clock([]).state == check_clock(["/tmp"]).state == "skip"


def test_codec_is_loaded_and_a_changed_one_fails(fitted_codec, tmp_path):
    data = bytearray(fitted_codec.to_bytes())
    path = tmp_path / "codec.safetensors"
    path.write_bytes(data)
    found = check_codec(str(path))
    assert found.state == "ok" and fitted_codec.fingerprint in found.found
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert check_codec(str(path)).state == "FAIL" and "the file was changed" in check_codec(str(path)).found
    published = tmp_path / "encodec_24khz-d7cc33bc.th"
    for reason in ("no such file", "its sha256 begins with"):
        found = check_codec(str(published))
        assert found.state == "FAIL" and reason in found.found and found.fix.endswith(published.name)
        published.write_bytes(b"cut short")
    assert check_codec(None).state == check_codec("calibrate").state == "skip"


def test_wandb_is_asked_for_and_its_key_never_told(web, closed_port, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    assert check_wandb().state == "warn" and "does not answer" in check_wandb().found
    monkeypatch.setenv("WANDB_BASE_URL", web(0))
    assert check_wandb().state == "warn" and "no API key for 127.0.0.1" in check_wandb().found
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert check_wandb().state == "ok" and KEY not in str(check_wandb())
    (tmp_path / "netrc").write_text("nonsense")
    assert check_wandb().state == "warn"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert check_wandb().state == "ok" and KEY not in str(check_wandb())
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_wandb().state == "ok"


# -------------------------------------------------------------------------------------------------------- the command


def run(*arguments: object, code: str = "", **environment: str) -> tuple[int, list[str], str]:
    """Run the command in a process of its own; return its exit code, its lines, and stderr."""
    start = ["-c", f"{code}; from megascale.__main__ import main; sys.exit(main(sys.argv[1:]))"] if code else None
    done = subprocess.run(
        [sys.executable, *(start or ["-m", "megascale"]), "doctor", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr


def line_of(lines: list[str], name: str) -> str:
    (found,) = (line for line in lines if line.split()[1] == name)
    return found


def test_one_line_each_with_what_to_do_and_exit_code_0(tmp_path):
    code, lines, err = run("--ranks", 0, "--disk", tmp_path, "--disk-gb", 0, WANDB_MODE="offline", HOME="/proc/none")
    assert (code, err) == (0, "")
    names = " ".join(line.split()[1] for line in lines[:-1]).replace("nccl", "gloo")
    assert names == "torch compiler shm disk tmp gloo deepspeed ray storage clock codec wandb"
    assert all(line.startswith("ok ") or " -> " in line for line in lines[:-1])
    assert lines[-1].endswith("0 FAIL, 5 skip; next: the job, with --dry-run first")


def test_what_fails_ends_with_2_after_every_other_line(tmp_path):
    code, lines, err = run(
        "--ranks", 0, "--disk", "/proc/none", "--disk-gb", 0, "--storage", tmp_path, WANDB_MODE="offline"
    )
    assert (code, err, len(lines)) == (2, "", 13)
    assert line_of(lines, "disk").startswith("FAIL  disk       /proc/none: cannot write: ")
    assert line_of(lines, "storage").startswith("ok ")
    assert "1 FAIL" in lines[-1] and "mend what FAILs" in lines[-1]


def test_torch_that_does_not_load_is_lines_and_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    code, lines, err = run("--disk", tmp_path, "--disk-gb", 0, PYTHONPATH=str(tmp_path))
    assert (code, err) == (2, "")
    assert line_of(lines, "torch").startswith("FAIL  torch      cannot be imported: libcudart.so.13: cannot open")
    assert line_of(lines, "disk").startswith("ok ") and line_of(lines, "wandb")


def test_extras_that_are_not_installed_are_lines_and_no_traceback(tmp_path):
    hide = "import sys; sys.modules['s3fs'] = sys.modules['wandb'] = None"  # what Python does for a module not found
    code, lines, err = run(
        "--ranks", 0, "--storage", "s3://bucket/x", "--codec", "s3://bucket/c.safetensors", code=hide
    )
    assert (code, err) == (2, "")
    assert line_of(lines, "storage").endswith("s3fs is not installed -> pip install 'megascale[s3]'")
    assert line_of(lines, "codec").startswith("FAIL ") and "megascale[s3]" in line_of(lines, "codec")
    assert line_of(lines, "wandb").startswith("skip ") and "megascale[wandb]" in line_of(lines, "wandb")
    assert line_of(lines, "clock").startswith("skip ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--storage", "s3://me:secret@bucket/x"], "ConfigError: URL: has credentials in it"),
        (["--codec", "https://me:secret@host/x"], "ConfigError: URL: has credentials in it"),
        (["--ranks", "-1"], "ConfigError: --ranks -1: "),
        (["--disk-gb", "much"], "ConfigError: megascale doctor: argument --disk-gb: invalid float value"),
    ],
)
def test_mistake_is_one_line_and_ends_with_2(arguments, line):
    code, lines, err = run(*arguments)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert err.startswith(line) and "secret" not in err


def test_help_tells_every_option_and_the_exit_codes():
    code, lines, err = run("--help")
    assert (code, err) == (0, "")
    words = set(" ".join(lines).split())
    assert {"--storage", "--endpoint-url", "--codec", "--disk", "--disk-gb", "--ranks", "--seconds"} <= words
    assert "Exit codes: 0 nothing failed, 2 something did." in lines
