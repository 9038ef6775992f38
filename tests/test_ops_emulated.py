"""What only `make emulate` can see: its CUDA kernels take turns in any order of a block's threads, to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from levels import EMULATED

from sorahpc import ops

pytestmark = pytest.mark.skipif(not EMULATED, reason="the kernels are not those of `make emulate`")

SCRIPT = """if True:
    import hashlib
    import torch
    from sorahpc import ops

    torch.manual_seed(0)
    grids = torch.tensor([(3, 4, 5), (1, 1, 1), (2, 7, 9), (1, 16, 16)])
    lens = grids.prod(-1)
    length, samples, digest = int(lens.sum()), len(lens), hashlib.sha256()

    def keep(*tensors):
        for x in tensors:
            digest.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())

    def step(call, *inputs):
        out = call(*inputs)
        keep(*out, *torch.autograd.grad(out, inputs, [torch.ones_like(o) * 0.3 for o in out]))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        def make(*shape):
            return torch.randn(*shape).to(dtype).requires_grad_()

        for dim, axes in ((64, (24, 20, 20)), (10, (2, 4, 4))):
            for interleaved in (True, False):
                step(lambda q, k, wq, wk: ops.qk_norm_rope3d(q, k, wq, wk, grids, axes, interleaved=interleaved),
                     make(length, 3, dim), make(length, 2, dim), make(dim), make(dim))
        for M in (37, 1152):
            step(lambda x, branch, gate, shift, scale: ops.residual_norm(x, branch, lens, gate, shift, scale),
                 make(length, M), make(length, M), make(samples, M), make(samples, M), make(samples, M))
        keep(ops.add_sincos3d(make(length, 72), grids))
        latents = torch.randn(length * 16).to(dtype)
        keep(ops.patchify(latents, grids, 4, (1, 2, 2)), ops.unpatchify(latents.view(-1, 16), grids, 4, (1, 2, 2)))
        ids = torch.tensor([(i, 0) for i in range(samples)])
        keep(*ops.flow_patchify(latents, torch.rand(samples), ids, grids, 4, (1, 2, 2), seed=1))
    print(digest.hexdigest())
"""


def test_the_bodies_here_are_cudas() -> None:
    live = ops.backend()["ops"]
    assert all(bodies["cuda"] == "compiled" for name, bodies in live.items() if name != "stream_copy")


def test_a_missing_barrier_would_show() -> None:
    """Threads in order, and three times in another between any two barriers."""
    found = set()
    for order in ("0", "1", "2", "3"):
        env = {**os.environ, "SORAHPC_EMULATED_ORDER": order}
        folder = Path(ops.__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
