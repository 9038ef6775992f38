"""Run a function on N ranks of this machine, over gloo.

Starting a rank costs seconds (torch, Megatron), so a test module gathers its cases in one function and launches once.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` fresh processes; results by rank.

    `function` lives at the top of a module in tests/. If a rank fails, the others are killed, and the error shows
    that rank's output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        call = Path(scratch) / "call.pkl"
        call.write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
        port = free_port()
        processes, logs = [], []
        for rank in range(world_size):
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
            }
            log = open(Path(scratch) / f"rank{rank}.log", "w+b")
            command = [sys.executable, "-m", "ranks", str(call), str(Path(scratch) / f"result{rank}.pkl")]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            logs.append(log)
        try:
            _wait(processes, logs, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for log in logs:
                log.close()
        return [pickle.loads((Path(scratch) / f"result{rank}.pkl").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[Any], logs: list[Any], timeout_s: float) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks did not finish in {timeout_s} s:\n" + "\n".join(map(_tail, logs)))
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll():
            raise RuntimeError(f"rank {rank} exited with {process.returncode}:\n{_tail(logs[rank])}")


def _tail(log: Any) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-6000:]


if __name__ == "__main__":
    import importlib

    module, name, args = pickle.loads(Path(sys.argv[1]).read_bytes())
    function = getattr(importlib.import_module(module), name)
    result = function(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), *args)
    Path(sys.argv[2]).write_bytes(pickle.dumps(result))
    import torch.distributed as dist

    if dist.is_initialized():  # a function may leave it open, to call another that needs it
        dist.destroy_process_group()
