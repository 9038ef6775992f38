"""What `profile kernels` and benchmarks/bench_ops.py measure: each op beside its peers, at sizes of real models.

A case holds the bytes that the op must move, which the machine's copy speed turns into a limit, and what computes it:
ours, and the formulas that people train with, eager and through torch.compile, written here:

    real     q cos + rot(q) sin with full-width tables, as in diffusers' Hunyuan
    complex  pairs as complex numbers, as in Wan's and Llama's reference code (in complex64; Wan's own uses complex128)
    split    even and odd elements apart, as in diffusers' Wan

and, on a CUDA device, the kernels of other libraries that are installed (`peers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sorahpc.ops.embed import add_sincos3d, sincos3d
from sorahpc.ops.flow_patchify import flow_patchify
from sorahpc.ops.modulate import residual_norm
from sorahpc.ops.pack import positions3d
from sorahpc.ops.patchify import patchify, unpatchify
from sorahpc.ops.rope import qk_norm_rope3d, rope3d
from sorahpc.profiling.peers import rope_peers
from sorahpc.profiling.results import OURS

AXES, THETA = (44, 42, 42), 1e4
Outputs = Tensor | tuple[Tensor, ...]


@dataclass
class Case:
    """One row group of the table.

    Attributes:
        bytes: read and written at the least.
        flops: additions and multiplications of the formula, with tables and random numbers for granted.
        calls: name -> what to time, ours first.
        tolerance: what a candidate computes may differ from ours by this share of its norm.
        results: name -> what to compare with ours, of the candidates that don't return it when they are timed.
        compared: so many of the results, from the first, where a peer loses the others.
        left_out: name -> why, of the peers that `timing.check` took out of `calls`.
        copied: what the op reads, where it writes as much: its limit is a copy of them. Else that of a large buffer.
    """

    name: str
    dtype: torch.dtype
    shape: str
    bytes: int
    flops: int
    calls: dict[str, Callable[[], Outputs]]
    tolerance: float
    results: dict[str, Callable[[], Outputs]] = field(default_factory=dict)
    compared: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    copied: tuple[Tensor, ...] = ()

    def result(self, name: str) -> tuple[Tensor, ...]:
        out = self.results.get(name, self.calls[name])()
        return (out,) if isinstance(out, Tensor) else out[: self.compared]


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


def _step(
    forward: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients of `inputs`."""
    return torch.autograd.grad(forward(*inputs), inputs, grads)


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
    calls: dict[str, Callable[[], Outputs]] = {OURS: partial(rope3d, q, k, grids, AXES, THETA)}
    for name, function, tables in (
        ("real", rope_real, (wide_cos, wide_sin)),
        ("complex", rope_complex, (by,)),
        ("split", rope_split, (cos, sin)),
    ):
        both = partial(_both, function)
        calls[f"eager {name}"] = partial(both, q, k, *tables)
        if name != "complex":  # inductor leaves complex numbers to eager
            calls[f"compile {name}"] = partial(torch.compile(both, dynamic=False), q, k, *tables)
    peers = rope_peers(q, k, _angles(grids, device)) if device.type == "cuda" else {}
    calls |= {name: call for name, (call, _) in peers.items()}
    return Case(
        name="K1 rope3d forward",
        dtype=dtype,
        shape=f"L={len(q)} N={heads} D={sum(AXES)}",
        bytes=4 * q.nbytes,
        flops=3 * 2 * q.numel(),  # of a pair four products and two sums
        calls=calls,
        tolerance=2e-2 if dtype.itemsize == 2 else 1e-5,
        results={name: result for name, (_, result) in peers.items()},
        copied=(q, k),
    )


def qk_norm_case(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    grids, q, k, cos, sin = _rope_inputs(num_tokens, heads, dtype, device)
    wide_cos, wide_sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    wq, wk = (torch.ones(sum(AXES), device=device).to(dtype).requires_grad_() for _ in range(2))
    inputs = (q.requires_grad_(), k.requires_grad_(), wq, wk)
    grads = (torch.randn_like(q), torch.randn_like(k))

    def expression(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, *, real: bool = False) -> tuple[Tensor, Tensor]:
        q, k = rms_norm(q, wq, 1e-6), rms_norm(k, wk, 1e-6)
        if real:
            return rope_real(q, wide_cos, wide_sin), rope_real(k, wide_cos, wide_sin)
        return rope_split(q, cos, sin), rope_split(k, cos, sin)

    def ours(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope3d(q, k, wq, wk, grids, AXES, THETA)

    forwards: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        OURS: ours,
        "eager split": expression,
        "compile split": torch.compile(expression, dynamic=False),
        "compile real": torch.compile(partial(expression, real=True), dynamic=False),
    }
    return Case(
        name="K2 qk-norm + rope3d forward + backward",
        dtype=dtype,
        shape=f"L={len(q)} N={heads} D={sum(AXES)}",
        bytes=(4 + 6) * q.nbytes,
        flops=(7 + 13) * 2 * q.numel(),  # norm 4, turn 3; turned back 3, the norm's gradient 7, the weight's 3
        calls={name: partial(_step, forward, inputs, grads) for name, forward in forwards.items()},
        tolerance=3e-2 if dtype.itemsize == 2 else 1e-4,
    )


def residual_norm_case(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    grids = pack_grids(num_tokens)
    lens = grids.prod(-1)
    length, dim = int(lens.sum()), heads * sum(AXES)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, branch = normal(length, dim).requires_grad_(), normal(length, dim).requires_grad_()
    gate, shift, scale = (normal(len(lens), dim).requires_grad_() for _ in range(3))
    inputs, grads = (x, branch, gate, shift, scale), (normal(length, dim), normal(length, dim))
    sample = torch.repeat_interleave(lens).to(device)
    lens_there = lens.to(device)

    def finish(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """All of [L, M]."""
        total = x + gate * branch
        normed = F.layer_norm(total.float(), (dim,), eps=1e-6)
        return total, (normed * (1 + scale.float()) + shift.float()).to(x.dtype)

    def by_index(x: Tensor, branch: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        return finish(x, branch, *(v[sample] for v in vectors))

    def by_repeat(x: Tensor, branch: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        return finish(x, branch, *(v.repeat_interleave(lens_there, 0, output_size=length) for v in vectors))

    def ours(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(x, branch, lens, gate, shift, scale)

    forwards: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        OURS: ours,
        "eager repeat": by_repeat,
        "compile repeat": torch.compile(by_repeat, dynamic=False),
        "compile index": torch.compile(by_index, dynamic=False),
    }
    return Case(
        name="K3 gated residual + norm + modulate forward + backward",
        dtype=dtype,
        shape=f"L={length} M={dim} S={len(lens)}",
        bytes=(4 + 6) * x.nbytes,
        flops=(9 + 15) * x.numel(),  # residual 2, moments 4, norm and modulation 3; the norm's gradient 9, the others 6
        calls={name: partial(_step, forward, inputs, grads) for name, forward in forwards.items()},
        tolerance=3e-2 if dtype.itemsize == 2 else 1e-4,
        compared=2,  # indexing adds up those of gate, shift and scale in bfloat16: 5 % off at 64 tokens a sample
    )


PATCH = (1, 2, 2)


def _clips(num_tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Grids and flat latents."""
    grids = pack_grids(num_tokens)
    numel = int(grids.prod(-1).sum()) * channels * PATCH[0] * PATCH[1] * PATCH[2]
    return grids, torch.randn(numel, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _shapes(grids: Tensor, channels: int) -> list[tuple[int, ...]]:
    """Of the latents, as numbers: a peer that reads them from a tensor is compiled in pieces, and slower."""
    return [(channels, *(n * p for n, p in zip(grid, PATCH, strict=True))) for grid in grids.tolist()]


def _split_clips(latents: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [x.view(shape) for x, shape in zip(latents.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def _cut(z: Tensor) -> Tensor:
    """A latent [C, T, H, W] to tokens, as by reshape and permute."""
    c, t, h, w = z.shape
    pt, ph, pw = PATCH
    cut = z.view(c, t // pt, pt, h // ph, ph, w // pw, pw).permute(1, 3, 5, 0, 2, 4, 6)
    return cut.reshape(-1, c * pt * ph * pw)


def patchify_case(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    channels = 16
    grids, latents = _clips(num_tokens * heads * 2, channels, dtype, device)  # so that they too are 200 MB and more

    shapes = _shapes(grids, channels)

    def by_permute(latents: Tensor) -> Tensor:
        return torch.cat([_cut(z) for z in _split_clips(latents, shapes)])

    return Case(
        name="K4 patchify",
        dtype=dtype,
        shape=f"C={channels} patch={PATCH} S={len(grids)} L={int(grids.prod(-1).sum())}",
        bytes=2 * latents.nbytes,
        flops=0,
        calls={
            OURS: partial(patchify, latents, grids, channels, PATCH),
            "eager permute": partial(by_permute, latents),
            "compile permute": partial(torch.compile(by_permute, dynamic=False), latents),
        },
        tolerance=0.0,
        copied=(latents,),
    )


def flow_patchify_case(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    channels = 16
    grids, latents = _clips(num_tokens * heads // 2, channels, dtype, device)
    shapes, t = _shapes(grids, channels), torch.linspace(0.1, 0.9, len(grids))
    times = t.to(device, dtype).unbind()
    ids = torch.stack((torch.arange(len(grids)), torch.zeros(len(grids), dtype=torch.int64)), 1)

    def clip(z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _cut(torch.lerp(z, noise, t)), _cut(noise - z)

    def chain(clip: Callable[..., tuple[Tensor, Tensor]], eps: Tensor | None = None) -> tuple[Tensor, ...]:
        clips = _split_clips(latents, shapes)
        drawn = [torch.randn_like(z) for z in clips] if eps is None else _split_clips(eps, shapes)
        made = [clip(*args) for args in zip(clips, drawn, times, strict=True)]
        return tuple(torch.cat(parts) for parts in zip(*made, strict=True))

    peers: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "eager chain": partial(chain, clip),
        "compile clip": partial(chain, torch.compile(clip, dynamic=False)),
        "compile chain": torch.compile(partial(chain, clip), dynamic=False),
    }

    def same_noise(peer: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """A peer with the op's own noise, which is what it adds at t = 1 to nothing."""
        eps = flow_patchify(torch.zeros_like(latents), torch.ones_like(t), ids, grids, channels, PATCH, seed=0)[0]
        return peer(unpatchify(eps, grids, channels, PATCH))

    return Case(
        name="K4 flow_patchify",
        dtype=dtype,
        shape=f"C={channels} patch={PATCH} S={len(grids)} L={int(grids.prod(-1).sum())}",
        bytes=3 * latents.nbytes,
        flops=4 * latents.numel(),
        calls={OURS: partial(flow_patchify, latents, t, ids, grids, channels, PATCH, seed=0), **peers},
        tolerance=1e-2 if dtype.itemsize == 2 else 1e-6,
        results={name: partial(same_noise, peer) for name, peer in peers.items()},
    )


def sincos_case(num_tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> Case:
    grids = pack_grids(num_tokens)
    length, dim = int(grids.prod(-1).sum()), heads * sum(AXES)
    x = torch.randn(length, dim, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    positions = positions3d(grids).to(device)
    table = sincos3d(grids, dim, device=device)

    def by_angles(x: Tensor) -> Tensor:
        half = dim // 6
        frequencies = THETA ** -(torch.arange(half, device=device) / half)
        angles = positions[:, :, None] * frequencies
        return (x.float() + torch.cat((angles.sin(), angles.cos()), -1).flatten(1)).to(x.dtype)

    def by_table(x: Tensor, table: Tensor) -> Tensor:
        return (x.float() + table).to(x.dtype)

    return Case(
        name="K5 add_sincos3d",
        dtype=dtype,
        shape=f"L={length} M={dim}",
        bytes=2 * x.nbytes,
        flops=x.numel(),
        calls={
            OURS: partial(add_sincos3d, x, grids),
            "eager angles": partial(by_angles, x),
            "compile angles": partial(torch.compile(by_angles, dynamic=False), x),
            "eager table": partial(by_table, x, table),
            "compile table": partial(torch.compile(by_table, dynamic=False), x, table),
        },
        tolerance=2e-2 if dtype.itemsize == 2 else 1e-4,
        copied=(x,),
    )


CASES: dict[str, Callable[[int, int, torch.dtype, torch.device], Case]] = {
    "K1 rope3d": rope_case,
    "K2 qk-norm + rope3d": qk_norm_case,
    "K3 gated residual + norm + modulate": residual_norm_case,
    "K4 patchify": patchify_case,
    "K4 flow_patchify": flow_patchify_case,
    "K5 add_sincos3d": sincos_case,
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
                yield case(512, 3, dtype, device) if small else case(tokens, 12, dtype, device)
