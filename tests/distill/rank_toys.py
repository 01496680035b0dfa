"""Two processes of one machine as the ranks of a run, for tests that are scripts as well."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def free_ports(count: int) -> list[str]:
    """Different ports that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def two_processes(
    script: str, folder: Path, *arguments: str, timeout: float = 600, own_sessions: bool = False
) -> list[dict[str, Any]]:
    """Run `script RANK FOLDER ARGUMENTS` for ranks 0 and 1 at once; what each left in FOLDER/RANK.pt."""
    # without a network the default interface may not resolve; two processes of one machine meet on loopback
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_sessions,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
