"""The smallest OpenStack Swift that serves S3: one device, one replica, four processes on loopback."""

import os
import pwd
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from support.server_process import ServerProcess, answers, free_ports, running, wait_for

_SERVERS = ("account", "container", "object")
# The order matters: with symlink before versioned_writes, objects read back empty.
_PIPELINE = "catch_errors s3api tempauth bulk slo dlo versioned_writes symlink proxy-server"


def start_swift(directory: Path, key: str, secret: str, stack: ExitStack) -> tuple[str, list[ServerProcess]]:
    """Start the four servers in a directory; return the proxy's url once it answers, and the processes."""
    account, user = key.split(":")
    *ports, proxy_port = free_ports(len(_SERVERS) + 1)
    (directory / "srv" / "d1").mkdir(parents=True)
    common = (
        f"swift_dir = {directory}\nbind_ip = 127.0.0.1\nworkers = 0\nuser = {pwd.getpwuid(os.geteuid())[0]}\n"
    )
    (directory / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = test\n\n"
        "[storage-policy:0]\nname = one\ndefault = yes\npolicy_type = replication\n"
    )
    for server, port in zip(_SERVERS, ports, strict=True):
        (directory / f"{server}.conf").write_text(
            f"[DEFAULT]\n{common}bind_port = {port}\ndevices = {directory}/srv\nmount_check = false\n"
            f"[pipeline:main]\npipeline = {server}-server\n"
            f"[app:{server}-server]\nuse = egg:swift#{server}\n"
        )
        _ring(directory, server, port)
    filters = "".join(
        f"[filter:{name}]\nuse = egg:swift#{name}\n"
        for name in ("catch_errors", "bulk", "slo", "dlo", "symlink")
    )
    (directory / "proxy.conf").write_text(
        f"[DEFAULT]\n{common}bind_port = {proxy_port}\n"
        f"[pipeline:main]\npipeline = {_PIPELINE}\n"
        "[app:proxy-server]\nuse = egg:swift#proxy\nallow_account_management = true\n"
        f"account_autocreate = true\n{filters}"
        "[filter:versioned_writes]\nuse = egg:swift#versioned_writes\nallow_versioned_writes = true\n"
        "[filter:s3api]\nuse = egg:swift#s3api\nlocation = us-east-1\n"
        f"[filter:tempauth]\nuse = egg:swift#tempauth\nuser_{account}_{user} = {secret} .admin\n"
    )
    processes = [
        stack.enter_context(
            running(
                [str(_program(f"swift-{server}-server")), str(directory / f"{server}.conf"), "-v"],
                directory / f"{server}.log",
            )
        )
        for server in (*_SERVERS, "proxy")
    ]
    endpoint = f"http://127.0.0.1:{proxy_port}"
    for port in (*ports, proxy_port):
        wait_for(
            lambda port=port: answers(f"http://127.0.0.1:{port}"), 60, processes, directory / "proxy.log"
        )
    return endpoint, processes


def why_no_swift() -> str | None:
    """Say why Swift cannot be started here, or None if it can."""
    if not _program("swift-proxy-server").exists():
        return "Swift is not installed: pip install swift"
    return None


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _ring(directory: Path, server: str, port: int) -> None:
    builder = directory / f"{server}.builder"
    for words in (
        ("create", "6", "1", "0"),
        ("add", f"r1z1-127.0.0.1:{port}/d1", "1"),
        ("rebalance",),
    ):
        done = subprocess.run(
            [str(_program("swift-ring-builder")), str(builder), *words], capture_output=True, text=True
        )
        if done.returncode > 1:  # 1 is a warning
            raise RuntimeError(f"swift-ring-builder {' '.join(words)}: {done.stdout}{done.stderr}")
