"""What the tiny jobs share. They count in files, and go wrong where TINY_FAULT says.

TINY_FAULT=<kind>:<rank or *>:<item or *>[:<restart>] with kind raise, memory, data, stop, kill, exit, hang;
TINY_ITEM_S: seconds an item.
"""

import logging
import os
import signal
import time
import warnings

from sorahpc.errors import DataError, Stopped
from sorahpc.runs import atomic_write

log = logging.getLogger(__name__)


def fault(task, item):
    text = os.environ.get("TINY_FAULT", "")
    if not text:
        return
    kind, rank, at, *restart = text.split(":")
    if rank not in ("*", str(task.rank)) or at not in ("*", str(item)) or (restart and int(restart[0]) != task.restart):
        return
    if kind == "raise":
        raise RuntimeError("a bug\nof two lines")
    if kind == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nSee the documentation")
    if kind == "data":
        raise DataError("clip 7: fault one\nclip 8: fault two")
    if kind == "stop":
        raise Stopped("asks to be requeued")
    if kind == "kill":
        warnings.warn("noise", stacklevel=1)
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        raise SystemExit(0)
    if kind == "hang":
        time.sleep(3600)


def array(config, task, num_items):
    """Item i is a file; the tasks share the items, and make only what is missing."""
    out = config.run_dir / "out" / task.job
    mine = list(range(num_items))[task.rank :: task.world_size]
    for n, item in enumerate(mine):
        task.report(n, len(mine), "item")
        if task.stop_requested():
            raise Stopped(f"stopped at item {item}")
        fault(task, item)
        if not (out / str(item)).exists():
            time.sleep(float(os.environ.get("TINY_ITEM_S", "0.01")))
            atomic_write(out / str(item), f"task {task.rank} of {task.world_size}, pid {os.getpid()}\n")
    task.report(len(mine), len(mine), "item")


def gang(config, task):
    """Each rank counts its steps in a file, and resumes from it; the whole gang is signalled together."""
    state = config.run_dir / "out" / task.job / f"rank{task.rank}"
    step = int(state.read_text()) if state.exists() else 0
    log.info("resume at step %d, master %s:%s", step, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    log.info("cpus %s omp %s", os.environ.get("SRUN_CPUS_PER_TASK"), os.environ.get("OMP_NUM_THREADS"))
    task.report(step, config.train.steps, "step")
    while step < config.train.steps:
        fault(task, step)
        time.sleep(float(os.environ.get("TINY_ITEM_S", "0.01")))
        step += 1
        task.report(step, config.train.steps, "step", loss=f"{1 / step:.4f}")
        if task.stop_requested():
            atomic_write(state, str(step))
            raise Stopped(f"stopped at step {step}, saved")
    atomic_write(state, str(step))
