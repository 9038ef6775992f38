"""What `profile kernels` and benchmarks/bench_ops.py measure: each op beside its peers, at sizes of real models.

A case holds the bytes that the op must move, which the machine's copy speed turns into a limit, and what computes it:
ours, and the formulas that people train with, eager and through torch.compile, written here:

    real     q cos + rot(q) sin with full-width tables, as in diffusers' Hunyuan
    complex  pairs as complex numbers, as in Wan's and Llama's reference code (in complex64; Wan's own uses complex128)
    split    even and odd elements apart, as in diffusers' Wan
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sorahpc.ops.pack import positions3d
from sorahpc.ops.rope import qk_norm_rope3d, rope3d

AXES, THETA = (44, 42, 42), 1e4
OURS = "sorahpc"


@dataclass
class Case:
    """One row group of the table.

    `bytes`: read and written at the least. `calls`: name -> what to time, ours first. `results`: name -> what it
    computes as one tensor, compared with ours, to `tolerance` of its norm, before anything is timed.
    """

    name: str
    what: str
    dtype: torch.dtype
    shape: str
    bytes: int
    calls: dict[str, Callable[[], object]]
    tolerance: float
    results: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


def pack_grids(num_tokens: int) -> Tensor:
    """Eight clips of several lengths and shapes, `num_tokens` in all or a little less."""
    shares = ((21, 30, 52), (1, 30, 52), (5, 52, 30), (9, 32, 32), (13, 16, 28), (1, 64, 64), (17, 24, 24), (3, 40, 72))
    whole = sum(t * h * w for t, h, w in shares)
    grids = [(max(1, t * num_tokens // whole), h, w) for t, h, w in shares]
    return torch.tensor(grids, dtype=torch.int64)


def _angles(grids: Tensor, device: torch.device) -> Tensor:
    """[L, D/2] float64."""
    at = positions3d(grids).double()
    parts = [at[:, a, None] * THETA ** -(torch.arange(0, d, 2, dtype=torch.float64) / d) for a, d in enumerate(AXES)]
    return torch.cat(parts, 1).to(device)


def rope_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin [L, 1, D], each entry twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def rope_complex(x: Tensor, by: Tensor) -> Tensor:
    """by complex64 [L, 1, D/2]."""
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * by).flatten(-2).to(x.dtype)


def rope_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin [L, 1, D/2]."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _both(turn: Callable[..., Tensor], q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
    return turn(q, *tables), turn(k, *tables)


def _first(call: Callable[[], tuple[Tensor, ...]]) -> Tensor:
    return call()[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rope_inputs(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    grids = pack_grids(num_tokens)
    length, dim = int(grids.prod(-1).sum()), sum(AXES)
    generator = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(length, heads, dim, generator=generator, device=device).to(dtype) for _ in range(2))
    angles = _angles(grids, device)[:, None]
    return grids, q, k, angles.cos().float(), angles.sin().float()


def rope_case(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    grids, q, k, cos, sin = _rope_inputs(num_tokens, heads, dtype, device)
    wide_cos, wide_sin, by = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), torch.complex(cos, sin)
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {OURS: partial(rope3d, q, k, grids, AXES, THETA)}
    for name, function, tables in (
        ("real", rope_real, (wide_cos, wide_sin)),
        ("complex", rope_complex, (by,)),
        ("split", rope_split, (cos, sin)),
    ):
        both = partial(_both, function)
        calls[f"eager {name}"] = partial(both, q, k, *tables)
        if name != "complex":  # inductor leaves complex numbers to eager
            calls[f"compile {name}"] = partial(torch.compile(both, dynamic=False), q, k, *tables)
    return Case(
        name="K1 rope3d forward",
        what="rope3d",
        dtype=dtype,
        shape=f"L={len(q)} N={heads} D={sum(AXES)}",
        bytes=4 * q.nbytes,
        calls=dict(calls),
        tolerance=2e-2 if dtype.itemsize == 2 else 1e-5,
        results={name: partial(_first, call) for name, call in calls.items()},
    )


def qk_norm_case(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    grids, q, k, cos, sin = _rope_inputs(num_tokens, heads, dtype, device)
    wide_cos, wide_sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    wq, wk = (torch.ones(sum(AXES), device=device).to(dtype).requires_grad_() for _ in range(2))
    q.requires_grad_(), k.requires_grad_()
    dq, dk = torch.randn_like(q), torch.randn_like(k)

    def expression(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, *, real: bool = False) -> tuple[Tensor, Tensor]:
        q, k = rms_norm(q, wq, 1e-6), rms_norm(k, wk, 1e-6)
        if real:
            return rope_real(q, wide_cos, wide_sin), rope_real(k, wide_cos, wide_sin)
        return rope_split(q, cos, sin), rope_split(k, cos, sin)

    def ours(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope3d(q, k, wq, wk, grids, AXES, THETA)

    def step(forward: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(q, k, wq, wk), (q, k, wq, wk), (dq, dk))

    real = torch.compile(lambda *x: expression(*x, real=True), dynamic=False)
    split = torch.compile(expression, dynamic=False)
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        OURS: lambda: step(ours),
        "eager split": lambda: step(expression),
        "compile split": lambda: step(split),
        "compile real": lambda: step(real),
    }
    return Case(
        name="K2 qk-norm + rope3d forward + backward",
        what="qk_norm_rope3d",
        dtype=dtype,
        shape=f"L={len(q)} N={heads} D={sum(AXES)}",
        bytes=(4 + 6) * q.nbytes,
        calls=dict(calls),
        tolerance=3e-2 if dtype.itemsize == 2 else 1e-4,
        results={name: partial(_first, call) for name, call in calls.items()},
    )


CASES: dict[str, Callable[[int, int, torch.dtype, torch.device], Case]] = {
    "K1 rope3d": rope_case,
    "K2 qk-norm + rope3d": qk_norm_case,
}


def kernel_cases(device: torch.device, small: bool = False, only: str = "") -> Iterator[Case]:
    """Cases one by one, as each holds up to some gigabytes.

    Args:
        small: sizes for a test, not for a figure.
        only: those whose key in `CASES` begins so.
    """
    for dtype in (torch.float32, torch.bfloat16):
        # 200 MB and more a tensor on CPU, four times that on a GPU
        tokens = (32_760 if dtype is torch.float32 else 65_520) * (4 if device.type == "cuda" else 1)
        for name, case in CASES.items():
            if name.startswith(only):
                yield case(512, 2, dtype, device) if small else case(tokens, 12, dtype, device)
