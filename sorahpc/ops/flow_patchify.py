"""Noised tokens and what the model is to learn from them, in one pass from a ragged pack's latents.

x_t = (1 - t) x0 + t eps (rectified flow: Liu et al. 2022). The noise is drawn inside, from a counter-based generator
(Philox4x32-10: Salmon et al. 2011): it is a function of (seed, sample id, visit) and of the element's place in the
latent, so it is the same for any batch, rank, patch and number of resumptions, and, since only operations that IEEE 754
rounds in one way are used, the same to the bit here, in every compiled CPU body and on CUDA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sorahpc.ops._library import define
from sorahpc.ops.pack import check_tensors, whole
from sorahpc.ops.patchify import _check, _patchify_reference, _unpatchify

TARGETS = ("velocity", "eps", "v")
MAX_NOISE = 2**34  # elements a sample: a counter word for their blocks of four


def flow_patchify(
    latents: Tensor,
    t: Tensor,
    ids: Tensor,
    grids: Tensor,
    channels: int,
    patch: tuple[int, int, int],
    *,
    seed: int,
    target: str = "velocity",
    channels_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Latents of several samples to one sequence of noised tokens, and its targets.

    Args:
        latents, grids, channels, patch, channels_last: as of `patchify`; float64 on the CPU alone.
        t: float32 CPU [S], 0 (data) to 1 (noise).
        ids: int64 CPU [S, 2]: sample id, and visit: how often training has seen that sample, below 2^32.
        seed: at least 0, below 2^63.
        target: "velocity", eps - x0; "eps"; or "v", (1 - t) eps - t x0 (Salimans and Ho 2022, with alpha = 1 - t and
            sigma = t).

    Returns:
        x_t and the target, [L, C*pt*ph*pw] as `patchify` returns, computed in float32 (float64 for float64, with the
        same noise). The gradient reaches `latents` alone.

    Raises:
        ValueError: what does not fit. Under ``torch.compile`` the values of `t`, `ids` and `grids` are checked when the
            graph runs, as RuntimeError.
    """
    op = "flow_patchify"
    _check(op, "latents", latents, 1, grids, channels, patch)
    if latents.dtype is torch.float64 and latents.device.type != "cpu":
        raise ValueError(f"{op}: latents is float64 on {latents.device}, which is for the CPU alone")
    if target not in TARGETS:
        raise ValueError(f"{op}: target {target!r}, expected one of {', '.join(TARGETS)}")
    seed = whole(op, "seed", seed, 0, 2**63 - 1)
    check_tensors(op, t=t, ids=ids)
    samples = len(grids)
    if t.dtype != torch.float32 or t.device.type != "cpu" or t.shape != (samples,):
        raise ValueError(
            f"{op}: t is {t.dtype} on {t.device} of shape {tuple(t.shape)}, expected float32 on cpu [{samples}]"
        )
    if ids.dtype != torch.int64 or ids.device.type != "cpu" or ids.shape != (samples, 2):
        found = f"{ids.dtype} on {ids.device} of shape {tuple(ids.shape)}"
        raise ValueError(f"{op}: ids is {found}, expected int64 on cpu [{samples}, 2]")
    if not torch.compiler.is_compiling():  # a graph can't look at values; the body does, when it runs
        _check_values(t, ids, grids, channels * math.prod(patch))
    out: tuple[Tensor, Tensor] = _flow_patchify(
        latents, t, ids, grids, channels, *patch, channels_last, seed, TARGETS.index(target)
    )
    return out


def noise(seed: int, sample_id: int, visit: int, shape: tuple[int, ...]) -> Tensor:
    """The noise that `flow_patchify` draws for one sample.

    Args:
        seed, sample_id, visit: as there.
        shape: of the latent, [C, T, H, W]; element e of it, counted in row-major order, is number e of the stream.

    Returns:
        float32 CPU tensor.
    """
    whole("noise", "sample_id", sample_id, 0, 2**63 - 1)
    whole("noise", "visit", visit, 0, 2**32 - 1)
    size = math.prod(shape)
    with torch.device("cpu"):
        grids = torch.tensor([[1, 1, size]] if size else [], dtype=torch.int64).view(-1, 3)
        ids = torch.tensor([[sample_id, visit]] if size else [], dtype=torch.int64).view(-1, 2)
        t, nothing = torch.ones(len(grids), dtype=torch.float32), torch.zeros(size, dtype=torch.float32)
    return flow_patchify(nothing, t, ids, grids, 1, (1, 1, 1), seed=seed, target="eps")[1].view(shape)


def _check_values(t: Tensor, ids: Tensor, grids: Tensor, size: int) -> None:
    for i, (at, (sample, visit), grid) in enumerate(zip(t.tolist(), ids.tolist(), grids.tolist(), strict=True)):
        if not 0 <= at <= 1:
            raise ValueError(f"flow_patchify: t {at} of sample {i}, expected 0 to 1")
        if sample < 0 or not 0 <= visit < 2**32:
            raise ValueError(
                f"flow_patchify: sample {i} has id {sample} and visit {visit}, "
                "expected an id of at least 0 and a visit of 0 to 2^32 - 1"
            )
        if math.prod(grid) * size > MAX_NOISE:
            raise ValueError(
                f"flow_patchify: sample {i} has {math.prod(grid) * size} elements, noise is drawn for 2^34 at most"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The reference. csrc/random.h has the same steps; an operation here is a rounding there.

_LOW = 0xFFFFFFFF
_LN = (
    *(1.0, -0.6666781902313232, 0.5000267028808594, -0.399262011051178),
    *(0.33155304193496704, -0.2982901632785797, 0.2853386700153351, -0.1740080565214157),
)
_SIN = (1.5707963705062866, -0.645966649055481, 0.07971252501010895, -0.004685971420258284)
_COS = (1.0, -1.2337005138397217, 0.25366854667663574, -0.02085559442639351, 0.0008944734581746161)


def _philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four counter words -> four random words; int64 tensors of numbers below 2^32."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0, k1 = (key[0] + turn * 0x9E3779B9) & _LOW, (key[1] + turn * 0xBB67AE85) & _LOW
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps: the 64 bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
    return [c0, c1, c2, c3]


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = torch.full_like(x, coefficients[-1])
    for k in reversed(coefficients[:-1]):
        y = y * x + k
    return y


def _normals(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two words -> two standard normals (Box and Muller 1958): sqrt(-2 ln u) times cos and sin of 2 pi v.

    u = (float(a >> 1) + 0.5) / 2^31 rounded to float32, never 0; v = (b with its low six bits 32) / 2^32.
    """
    # 2^31 u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
    bits = ((a >> 1).float() + 0.5).view(torch.int32) - 0x3F3504F3
    e = ((bits >> 23) - 31).float()
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1
    square = (f * f * _polynomial(f, _LN) + f * -2.0) + e * -1.3862943649291992
    radius = square.double().sqrt().float()  # torch's float32 root may be MKL's, which is not the nearest number
    # x in (-1/2, 1/2) quarters of the circle, from the middle of quarter q.
    turned = b + 0x20000000
    q = (turned >> 30) & 3
    x = ((((turned & 0x3FFFFFFF) - 0x20000000) >> 5) | 1).float() * 2.0**-25
    s, c = radius * (x * _polynomial(x * x, _SIN)), radius * _polynomial(x * x, _COS)
    with_cos, with_sin = torch.where(q % 2 == 1, s, c), torch.where(q % 2 == 1, c, s)
    return torch.where((q == 1) | (q == 2), -with_cos, with_cos), torch.where(q >= 2, -with_sin, with_sin)


def _noise_reference(seed: int, ids: Tensor, sizes: Tensor, device: torch.device) -> Tensor:
    """float32 [sum of sizes]: the noise of each sample, one after the other."""
    blocks = (sizes + 3) // 4
    of, ends = torch.repeat_interleave(torch.arange(len(sizes)), blocks), blocks.cumsum(0)
    block = torch.arange(len(of)) - (ends - blocks)[of]
    counter = [block, ids[of, 1], ids[of, 0] & _LOW, ids[of, 0] >> 32]
    # The top bit keeps apart what torch's CUDA generator draws with the same seed.
    words = _philox([c.to(device) for c in counter], (seed & _LOW, seed >> 32 | 0x80000000))
    normals = torch.stack((*_normals(*words[:2]), *_normals(*words[2:])), dim=1).flatten()
    keep = torch.arange(4 * len(of)) - 4 * (ends - blocks)[of].repeat_interleave(4) < sizes[of].repeat_interleave(4)
    return normals[keep.to(device)]


def _flow_patchify_reference(
    latents: Tensor,
    t: Tensor,
    ids: Tensor,
    grids: Tensor,
    channels: int,
    pt: int,
    ph: int,
    pw: int,
    channels_last: bool,
    seed: int,
    target: int,
) -> tuple[Tensor, Tensor]:
    size = channels * pt * ph * pw
    _check_values(t, ids, grids, size)
    compute = torch.float64 if latents.dtype is torch.float64 else torch.float32
    sizes = grids.prod(1) * size
    if int(sizes.sum()) != latents.numel():  # as the compiled body: what is called without our checks is told
        raise ValueError(f"flow_patchify: grids have {int(sizes.sum())} elements, the input has {latents.numel()}")
    eps = _noise_reference(seed, ids, sizes, latents.device).to(compute)
    at = t.to(compute).repeat_interleave(sizes).to(latents.device)
    x0 = latents.to(compute)
    learned = (eps - x0, eps, (1 - at) * eps - at * x0)[target]
    how = (grids, channels, pt, ph, pw, channels_last)
    noised = (1 - at) * x0 + at * eps
    return _patchify_reference(noised.to(latents.dtype), *how), _patchify_reference(learned.to(latents.dtype), *how)


# ---------------------------------------------------------------------------------------------------------------------
# The op


def _fake(
    latents: Tensor, t: Tensor, ids: Tensor, grids: Tensor, channels: int, pt: int, ph: int, pw: int, *_: Any
) -> tuple[Tensor, Tensor]:
    size = channels * pt * ph * pw
    shape = (latents.numel() // size, size)
    return latents.new_empty(shape), latents.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, t, _, grids, *ctx.how, _, ctx.target = inputs
    ctx.save_for_backward(t, grids)


def _backward(ctx: Any, d_noised: Tensor, d_learned: Tensor) -> tuple[Tensor | None, ...]:
    t, grids = ctx.saved_tensors
    compute = torch.float64 if d_noised.dtype is torch.float64 else torch.float32
    at = t.to(compute).repeat_interleave(grids.prod(1), output_size=len(d_noised)).to(d_noised.device)[:, None]
    dx = (1 - at) * d_noised
    if TARGETS[ctx.target] == "velocity":
        dx = dx - d_learned
    elif TARGETS[ctx.target] == "v":
        dx = dx - at * d_learned
    return _unpatchify(dx.to(d_noised.dtype), grids, *ctx.how), *[None] * 10


_flow_patchify = define(
    "flow_patchify(Tensor latents, Tensor t, Tensor ids, Tensor grids, int channels, int pt, int ph, int pw, bool "
    "channels_last, SymInt seed, int target) -> (Tensor, Tensor)",
    reference=_flow_patchify_reference,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)
