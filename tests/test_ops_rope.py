"""rope3d, and with the norm of q and k: compiled against reference against float64 truth; gradients, slices, edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from levels import LEVELS, run_at_level
from torch import Tensor

from sorahpc import ops
from sorahpc.ops._library import LIBRARY

PACKS = {
    "one token": [(1, 1, 1)],
    "one frame": [(1, 5, 3)],
    "one row": [(3, 1, 7)],
    "ragged": [(4, 2, 3), (1, 8, 8), (2, 3, 1), (1, 1, 1), (7, 2, 2)],
}
# The splits of Wan (44/42/42), HunyuanVideo and FLUX (16/56/56), and others with the head dims in use.
AXES = [(44, 42, 42), (16, 56, 56), (24, 20, 20), (8, 28, 28), (8, 32, 32), (32, 32, 32), (0, 2, 8), (6, 0, 0)]
HALVES = [torch.bfloat16, torch.float16]

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
layouts = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "rotate-half"])
compiled_only = pytest.mark.skipif(not LIBRARY.is_file(), reason="sorahpc._ops is not built (make build)")
MOVED: dict[str, Any] = {"theta": (1e4, 1e3, 500.0), "offset": (1.5, 0.0, -2.0), "scale": (0.5, 1.0, 2.0)}


def grids_of(pack: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(pack, dtype=torch.int64).view(-1, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(length: int, heads: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k as they lie in a fused qkv, head by head, and the weights of their norms."""
    q, k, _ = normal(length, heads, 3, dim).to(device, dtype).unbind(2)
    weights = 0.5 + normal(2, dim, seed=1).abs().to(device, dtype)
    return [q, k, *weights]


def by_complex(x: Tensor, grids: Tensor, axes: tuple[int, int, int], interleaved: bool, how: dict[str, Any]) -> Tensor:
    """Each pair as a complex number times e^(i angle), one token at a time: nothing shared with the reference."""
    out = torch.empty_like(x)
    positions = [(t, h, w) for T, H, W in grids.tolist() for t in range(T) for h in range(H) for w in range(W)]
    for i, place in enumerate(positions):
        angles = [
            (place[a] * how["scale"][a] + how["offset"][a]) * how["theta"][a] ** (-2 * j / axes[a])
            for a in range(3)
            for j in range(axes[a] // 2)
        ]
        by = torch.polar(torch.ones(len(angles), dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
        half = x.shape[-1] // 2
        pairs = (
            torch.complex(x[i, :, 0::2], x[i, :, 1::2])
            if interleaved
            else torch.complex(x[i, :, :half], x[i, :, half:])
        )
        turned = pairs * by
        if interleaved:
            out[i, :, 0::2], out[i, :, 1::2] = turned.real, turned.imag
        else:
            out[i, :, :half], out[i, :, half:] = turned.real, turned.imag
    return out


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def results(call: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], reference: bool = False) -> list[Tensor]:
    """Both outputs, and the gradient of each input that has one, of a fixed weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    if reference:
        with ops.use_reference():
            out = call(*leaves)
    else:
        out = call(*leaves)
    loss = sum((o * normal(*o.shape, seed=7).to(o)).sum() for o in out)
    used = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(loss, used, allow_unused=True)
    return [*(o.detach() for o in out), *(g for g in grads if g is not None)]


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.double().cpu() - truth.cpu()).norm() / truth.norm().clamp_min(1e-300))


@compiled_only
@devices
def test_what_is_tested_here_is_the_compiled_op(device: str) -> None:
    live = ops.backend()["ops"]
    for name in ("rope3d", "qk_norm_rope3d", "qk_norm_rope3d_backward"):
        assert live[name][device] == "compiled"


@layouts
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_it_is_a_complex_multiplication_of_each_pair(
    pack: list[tuple[int, int, int]], axes: tuple[int, int, int], interleaved: bool
) -> None:
    grids, dim = grids_of(pack), sum(axes)
    q, k, wq, wk = make(int(grids.prod(-1).sum()), 3, dim, torch.float64)
    for norm in (False, True):
        expected = [
            by_complex(rms(x, w) if norm else x, grids, axes, interleaved, MOVED) for x, w in ((q, wq), (k, wk))
        ]
        for reference in (False, True):
            call = (
                (lambda: ops.qk_norm_rope3d(q, k, wq, wk, grids, axes, interleaved=interleaved, **MOVED))
                if norm
                else (lambda: ops.rope3d(q, k, grids, axes, interleaved=interleaved, **MOVED))
            )
            if reference:
                with ops.use_reference():
                    got = call()
            else:
                got = call()
            torch.testing.assert_close(list(got), expected, rtol=1e-12, atol=1e-13)


@devices
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_the_error_is_that_of_the_reference_forward_and_backward(
    axes: tuple[int, int, int], dtype: torch.dtype, interleaved: bool, device: str
) -> None:
    """At most twice the same-dtype reference's own distance from float64, for each output and each gradient."""
    grids = grids_of(PACKS["ragged"])
    inputs = make(int(grids.prod(-1).sum()), 3, sum(axes), dtype, device)

    def turn(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope3d(q, k, grids, axes, interleaved=interleaved, **MOVED)

    def norm(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qk_norm_rope3d(q, k, wq, wk, grids, axes, interleaved=interleaved, **MOVED)

    for call in (turn, norm):
        truth = results(call, [x.double().cpu() for x in inputs], reference=True)
        ours, reference = results(call, inputs), results(call, inputs, reference=True)
        assert len(ours) == len(truth)
        for got, other, true in zip(ours, reference, truth, strict=True):
            assert got.dtype == dtype and got.shape == true.shape
            assert error(got, true) <= 2 * error(other, true) + 1e-7  # a float32's own rounding, where that is exact


@devices
def test_q_and_k_are_taken_where_they_lie_and_may_have_other_numbers_of_heads(device: str) -> None:
    grids = grids_of([(2, 3, 4)])
    qkv = normal(24, 5, 3, 64).to(device, torch.float32)
    q, k = qkv[:, :, 0], qkv[:, :2, 1]
    assert not q.is_contiguous()
    got = ops.rope3d(q, k, grids, (24, 20, 20))
    assert all(x.is_contiguous() for x in got)
    for a, b in zip(got, ops.rope3d(q.contiguous(), k.contiguous(), grids, (24, 20, 20)), strict=True):
        assert torch.equal(a, b)
    # Heads before tokens, and a head dim that is not contiguous at all.
    for x in (q.transpose(0, 1).contiguous().transpose(0, 1), q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(ops.rope3d(x, k, grids, (24, 20, 20))[0], got[0])
    # An odd place in memory, where no vector load may begin.
    flat = torch.zeros(q.numel() + 1, device=device)
    flat[1:] = q.flatten()
    assert torch.equal(ops.rope3d(flat[1:].view(q.shape), k, grids, (24, 20, 20))[0], got[0])


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rank_that_holds_a_slice_turns_it_as_the_whole(dtype: torch.dtype, device: str) -> None:
    grids = grids_of(PACKS["ragged"])
    length = int(grids.prod(-1).sum())
    q, k, wq, wk = make(length, 2, 64, dtype, device)
    whole = ops.qk_norm_rope3d(q, k, wq, wk, grids, (24, 20, 20))
    for first, last in ((0, 7), (7, 50), (23, 24), (50, length), (length, length)):
        part = ops.qk_norm_rope3d(q[first:last], k[first:last], wq, wk, grids, (24, 20, 20), first=first)
        assert all(torch.equal(p, w[first:last]) for p, w in zip(part, whole, strict=True))


@devices
def test_far_positions_keep_their_accuracy(device: str) -> None:
    grids = grids_of([(4001, 1, 1)])
    x = torch.ones(4001, 1, 64, device=device)
    got = ops.rope3d(x, x, grids, (64, 0, 0))[0][4000, 0].double().cpu()
    angles = 4000 * 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (got[0::2] - (angles.cos() - angles.sin())).abs().max() < 3e-7
    assert (got[1::2] - (angles.cos() + angles.sin())).abs().max() < 3e-7
    # A start of a million: float32 positions would be off by a tenth of a radian.
    far = ops.rope3d(x, x, grids, (64, 0, 0), offset=(1e6, 0, 0))[0][17, 0].double().cpu()
    angles = 1_000_017 * 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (far[0::2] - (angles.cos() - angles.sin())).abs().max() < 3e-7


@devices
def test_turning_back_gives_the_input_and_keeps_lengths(device: str) -> None:
    grids = grids_of(PACKS["ragged"])
    q, k, *_ = make(int(grids.prod(-1).sum()), 2, 128, torch.float32, device)
    there = ops.rope3d(q, k, grids, (44, 42, 42))
    back = ops.rope3d(*there, grids, (44, 42, 42), inverse=True)
    torch.testing.assert_close(list(back), [q, k], rtol=0, atol=2e-6)
    torch.testing.assert_close(there[0].norm(dim=-1), q.norm(dim=-1))


def test_scores_depend_on_relative_places_alone() -> None:
    """q(a) . k(b) = q(a + d) . k(b + d): what the embedding is for."""
    grids = grids_of([(3, 4, 5)])
    q, k = normal(1, 1, 64).expand(60, 1, 64), normal(1, 1, 64, seed=3).expand(60, 1, 64)
    near = ops.rope3d(q, k, grids, (24, 20, 20))
    far = ops.rope3d(q, k, grids, (24, 20, 20), offset=(11, 7, 3))
    scores = [torch.einsum("and,bnd->ab", *pair) for pair in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-12, atol=1e-12)


@devices
def test_packs_of_no_sample_and_of_ten_thousand(device: str) -> None:
    empty = torch.zeros(0, 2, 8, device=device)
    w = torch.ones(8, device=device)
    assert ops.rope3d(empty, empty, grids_of([]), (4, 2, 2))[0].shape == (0, 2, 8)
    out = results(lambda q, k, a, b: ops.qk_norm_rope3d(q, k, a, b, grids_of([]), (4, 2, 2)), [empty, empty, w, w])
    assert all(torch.equal(g.cpu(), torch.zeros(8)) for g in out[-2:])
    many = grids_of([(1, 1 + i % 2, 1 + i % 3) for i in range(10_000)])
    q, k, *_ = make(int(many.prod(-1).sum()), 1, 8, torch.float32, device)
    got = ops.rope3d(q, k, many, (4, 2, 2))
    with ops.use_reference():
        expected = ops.rope3d(q, k, many, (4, 2, 2))
    torch.testing.assert_close(list(got), list(expected), rtol=0, atol=1e-6)


@devices
def test_offsets_beyond_two_to_the_31_elements(device: str) -> None:
    """Tokens 2^25 elements apart, the last of 100 at element 3.3e9; on the CPU only what is touched takes memory."""
    if device == "cuda":
        base = torch.empty(99 * 2**25 + 8, dtype=torch.bfloat16, device=device)
    else:
        import mmap

        memory = mmap.mmap(-1, 2 * (99 * 2**25 + 8))
        base = torch.frombuffer(memory, dtype=torch.bfloat16)
    far = base.as_strided((100, 1, 8), (2**25, 8, 1))
    x = normal(100, 1, 8).to(device, torch.bfloat16)
    far.copy_(x)
    grids = grids_of([(100, 1, 1)])
    for a, b in zip(ops.rope3d(far, far, grids, (4, 2, 2)), ops.rope3d(x, x, grids, (4, 2, 2)), strict=True):
        assert torch.equal(a, b)


@layouts
def test_gradients_are_exact_in_float64(interleaved: bool) -> None:
    grids = grids_of([(2, 1, 3), (1, 2, 1)])
    q, k, wq, wk = (x.requires_grad_() for x in make(8, 2, 10, torch.float64))
    how: dict[str, Any] = {"interleaved": interleaved, **MOVED}
    turn = lambda q, k: ops.rope3d(q, k, grids, (2, 4, 4), **how)  # noqa: E731
    assert torch.autograd.gradcheck(turn, (q, k))
    assert torch.autograd.gradgradcheck(turn, (q, k))
    assert torch.autograd.gradcheck(
        lambda q, k, wq, wk: ops.qk_norm_rope3d(q, k, wq, wk, grids, (2, 4, 4), eps=0.1, **how), (q, k, wq, wk)
    )


@devices
def test_torch_finds_the_registrations_sound(device: str) -> None:
    grids = grids_of([(2, 1, 3), (1, 2, 1)])
    q, k, wq, wk = (x.detach().requires_grad_() for x in make(8, 2, 8, torch.float32, device))
    how = (grids, [4, 2, 2], [1e4] * 3, [0.0] * 3, [1.0] * 3, 0, True)
    torch.library.opcheck(torch.ops.sorahpc.rope3d.default, (q, k, *how, False))
    torch.library.opcheck(torch.ops.sorahpc.qk_norm_rope3d.default, (q, k, wq, wk, *how, 1e-6))
    plain = [x.detach() for x in (q, k, q, k, wq, wk)]
    torch.library.opcheck(torch.ops.sorahpc.qk_norm_rope3d_backward.default, (*plain, *how, 1e-6))


@devices
def test_it_compiles_into_one_graph_for_packs_of_any_size(device: str) -> None:
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ops.qk_norm_rope3d(q * 2, k, wq, wk, grids, (4, 2, 2))
        return ops.rope3d(q, k + 1, grids, (4, 2, 2), interleaved=False)

    graph = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("ragged", "one frame", "one row"):
        grids = grids_of(PACKS[name])
        inputs = make(int(grids.prod(-1).sum()), 2, 8, torch.float32, device)
        got, expected = (results(lambda *x, f=f, g=grids: f(*x, g), inputs) for f in (graph, step))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises((RuntimeError, ValueError), match="grids"):
        graph(*inputs, grids_of([(1, 1, 1)]))


@compiled_only
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    grids = grids_of([(3, 17, 16), (1, 7, 5), (9, 16, 16)])
    inputs = make(int(grids.prod(-1).sum()), 4, 64, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(lambda q, k, a, b: ops.qk_norm_rope3d(q, k, a, b, grids, (24, 20, 20)), inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@compiled_only
def test_a_result_larger_than_the_caches_is_the_same() -> None:
    """Past 16 MiB the kernel writes around the caches: other instructions, the same numbers. They want aligned places,
    which heads of 80 don't all begin at."""
    grids = grids_of([(8, 32, 32)])
    cases = itertools.product((True, False), (torch.float32, torch.bfloat16), ((24, 20, 20), (28, 26, 26)))
    for interleaved, dtype, axes in cases:
        q, k, wq, wk = make(8192, 9, sum(axes), dtype)
        whole = ops.qk_norm_rope3d(q, k, wq, wk, grids, axes, interleaved=interleaved)
        assert whole[0].nbytes + whole[1].nbytes > 16 << 20  # STREAM_BYTES of csrc/ops/common.h
        for first in (0, 4096, 8000):
            part = slice(first, first + 100)
            small = ops.qk_norm_rope3d(q[part], k[part], wq, wk, grids, axes, first=first, interleaved=interleaved)
            assert all(torch.equal(s, w[part]) for s, w in zip(small, whole, strict=True))


def check_rounding() -> None:
    """Ones that turn by 0 come out as the weights of their norm, rounded: in vectors of any length and both layouts."""
    upper = torch.arange(0x0080, 0x7F80, 31, dtype=torch.int32) << 16  # float32, the normal ones
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)  # ties, and on either side of them
    most = torch.tensor([0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF], dtype=torch.int32)  # a bfloat16, and infinity
    nan = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF], dtype=torch.int32)
    for dim, axes in ((256, (86, 86, 84)), (16, (4, 4, 8)), (8, (4, 2, 2)), (4, (0, 2, 2)), (2, (2, 0, 0))):
        some = torch.cat(((upper[:: 256 // dim | 1, None] | lower).flatten(), most))  # even and odd ones in turns
        for bits, interleaved in itertools.product((some, nan), (True, False)):
            weights = torch.cat((bits, bits | -(2**31))).view(torch.float32)
            weights = torch.cat((weights, weights[-1:].expand(-len(weights) % dim))).view(-1, dim)
            x, one = torch.ones(1, 1, dim, dtype=torch.bfloat16), grids_of([(1, 1, 1)])
            how: dict[str, Any] = {"interleaved": interleaved, "eps": 0.0}
            rows = [torch.stack(ops.qk_norm_rope3d(x, x, w, w, one, axes, **how)) for w in weights]
            got = torch.cat(rows, 1).view(2, *weights.shape)
            expected = weights.bfloat16().expand_as(got)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_results_are_rounded_to_the_nearest_bfloat16() -> None:
    check_rounding()


SCRIPT = """if True:
    import torch
    import test_ops_rope as t
    grids = t.grids_of(t.PACKS["ragged"])
    for dim, axes in ((64, (24, 20, 20)), (72, (8, 32, 32)), (10, (2, 4, 4))):
        for interleaved in (True, False):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                inputs = t.make(int(grids.prod(-1).sum()), 3, dim, dtype)
                call = lambda q, k, a, b: t.ops.qk_norm_rope3d(q, k, a, b, grids, axes, interleaved=interleaved)
                truth = t.results(call, [x.double() for x in inputs], reference=True)
                for got, other, true in zip(t.results(call, inputs), t.results(call, inputs, True), truth):
                    assert t.error(got, true) <= 2 * t.error(other, true) + 1e-7, (dim, interleaved, dtype)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):  # every number there is, through the kernel's conversions
        for interleaved, shape, dim in ((True, (32, 2), -1), (False, (2, 32), -2)):
            x = bits.view(dtype).view(-1, 1, 64)
            out = torch.ops.sorahpc.rope3d(x, x, torch.tensor([[len(x), 1, 1]]), [64, 0, 0], [1e4] * 3, [0.0] * 3,
                                           [0.0] * 3, 0, interleaved, False)[0]
            finite = x.float().isfinite() & (x.abs() >= torch.finfo(dtype).tiny) | (x == 0)
            pairs = finite.unflatten(-1, shape)  # inf * 0 is NaN in its partner
            keep = pairs.all(dim, keepdim=True).expand_as(pairs).flatten(-2)
            assert torch.equal(out[keep], x[keep]), dtype
            assert out[x.isnan()].isnan().all()
    t.check_rounding()
    print(t.ops.backend()["library"])
"""


@compiled_only
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_the_cpu_kernels_is_right(level: str) -> None:
    run_at_level(level, SCRIPT)


Q, W, G = torch.zeros(4, 2, 8), torch.ones(8), grids_of([(1, 2, 2)])


@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
@pytest.mark.parametrize(
    ("message", "args", "how"),
    [
        ("grids have 4 tokens, the input has 3", (Q[:3], Q[:3], G, (4, 2, 2)), {}),
        (r"grids have 4 tokens, expected 2 \+ 4 at least", (Q, Q, G, (4, 2, 2)), {"first": 2}),
        ("first -1, expected a whole number from 0", (Q, Q, G, (4, 2, 2)), {"first": -1}),
        (r"grid \(0, 2, 2\), expected counts", (Q, Q, grids_of([(0, 2, 2)]), (4, 2, 2)), {}),
        ("grids is torch.int32 on cpu", (Q, Q, G.int(), (4, 2, 2)), {}),
        ("grids is torch.int64 on meta", (Q, Q, G.to("meta"), (4, 2, 2)), {}),
        (r"axes_dim \(4, 2, 4\), expected three even numbers summing to the head dim 8", (Q, Q, G, (4, 2, 4)), {}),
        (r"axes_dim \(3, 3, 2\)", (Q, Q, G, (3, 3, 2)), {}),
        (r"axes_dim \(10, -4, 2\)", (Q, Q, G, (10, -4, 2)), {}),
        (r"axes_dim \(4, 4\)", (Q, Q, G, (4, 4)), {}),
        (r"q is \[4, 2, 8\], k is \[3, 2, 8\]", (Q, Q[:3], G, (4, 2, 2)), {}),
        (r"q is \[4, 8\]", (Q[:, 0], Q[:, 0], G, (4, 2, 2)), {}),
        ("q is torch.float32 on cpu, k is torch.float64", (Q, Q.double(), G, (4, 2, 2)), {}),
        ("q is torch.int64", (Q.long(), Q.long(), G, (4, 2, 2)), {}),
        ("k is torch.float32 on meta", (Q, Q.to("meta"), G, (4, 2, 2)), {}),
        ("head dim 258, expected at most 256", (torch.zeros(4, 1, 258), torch.zeros(4, 1, 258), G, (258, 0, 0)), {}),
        (r"theta \(0.0, 0.0, 0.0\), expected three positive", (Q, Q, G, (4, 2, 2), 0.0), {}),
        (r"theta \(10000.0, 10000.0\)", (Q, Q, G, (4, 2, 2), (1e4, 1e4)), {}),
        (r"scale \(nan, 1, 1\), expected three finite", (Q, Q, G, (4, 2, 2)), {"scale": (float("nan"), 1, 1)}),
        (r"offset \(1,\)", (Q, Q, G, (4, 2, 2)), {"offset": (1,)}),
        (r"scale \(2.0,\), expected three finite", (Q, Q, G, (4, 2, 2)), {"scale": 2.0}),
        (r"theta \(1000", (Q, Q, G, (4, 2, 2), 10**400), {}),
        (r"axes_dim \(4.9, 2.1, 2\)", (Q, Q, G, (4.9, 2.1, 2)), {}),
        (r"axes_dim \(8,\)", (Q, Q, G, 8), {}),
        ("first 0.5, expected a whole number", (Q, Q, G, (4, 2, 2)), {"first": 0.5}),
        ("first 2251799813685248, expected a whole number", (Q, Q, G, (4, 2, 2)), {"first": 2**51}),
        (r"grid \(2147483648, 1, 1\), .* below 2\^31", (Q, Q, grids_of([(2**31, 1, 1)]), (4, 2, 2)), {"first": 0}),
        (r"tokens, expected at most 2\^50", (Q, Q, grids_of([(2**31 - 1,) * 3]), (4, 2, 2)), {"first": 0}),
        ("grids is list, expected a tensor", (Q, Q, [[1, 2, 2]], (4, 2, 2)), {}),
        ("q is torch.sparse_coo", (Q.to_sparse(), Q, G, (4, 2, 2)), {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_misfit_is_one_valueerror_with_the_numbers(message: str, args: tuple, how: dict, reference: bool) -> None:
    q, k, *rest = args
    for call in (lambda: ops.rope3d(q, k, *rest, **how), lambda: ops.qk_norm_rope3d(q, k, W, W, *rest, **how)):
        with pytest.raises(ValueError, match=message) as caught:
            if reference:
                with ops.use_reference():
                    call()
            else:
                call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_an_eps_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=f"qk_norm_rope3d: eps {eps}, expected at least 0, finite"):
        ops.qk_norm_rope3d(Q, Q, W, W, G, (4, 2, 2), eps=eps)


def test_theta_may_be_any_kind_of_number() -> None:
    x, expected = Q + 1, ops.rope3d(Q + 1, Q, G, (4, 2, 2), 100.0)[0]
    for theta in (np.float32(100), np.int64(100), torch.tensor(100.0), [100, 100, 100]):
        assert torch.equal(ops.rope3d(x, Q, G, (4, 2, 2), theta)[0], expected)


@compiled_only
@pytest.mark.parametrize("scale", [0.1, 0.3, 2 / 3])
def test_any_scale_keeps_its_accuracy_here_and_in_the_reference(scale: float) -> None:
    grids, x = grids_of([(4001, 1, 1)]), torch.ones(4001, 1, 64)
    angles = (4000 * scale + 0.1) * 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    for body in ("compiled", "reference"):
        with ops.chosen(body):
            got = ops.rope3d(x, x, grids, (64, 0, 0), offset=(0.1, 0, 0), scale=(scale, 1, 1))[0][4000, 0].double()
        assert (got[0::2] - (angles.cos() - angles.sin())).abs().max() < 5e-7, body


@pytest.mark.parametrize("op", ["qk_norm_rope3d", "residual_norm", "modulate"])
def test_what_has_no_second_derivative_says_so(op: str) -> None:
    x, w, v, lens = Q[:, 0].clone().requires_grad_(), W.clone(), torch.ones(1, 8), torch.tensor([4])

    def first() -> Tensor:
        if op == "qk_norm_rope3d":
            out = ops.qk_norm_rope3d(x[:, None], x[:, None], w, w, G, (4, 2, 2))[0]
        else:
            out = ops.modulate(x, v, v, lens) if op == "modulate" else ops.residual_norm(x, x, lens)[1]
        return torch.autograd.grad(out.sin().sum(), x, create_graph=True)[0]

    if LIBRARY.is_file():
        with pytest.raises(NotImplementedError, match="for second derivatives"):
            torch.autograd.grad(first().sum(), x)
    with ops.use_reference():
        torch.autograd.grad(first().sum(), x)


def test_forward_mode_is_refused_where_it_would_be_zero() -> None:
    def turned(x: Tensor) -> Tensor:
        return ops.rope3d(x, x, G, (4, 2, 2))[0]

    x = normal(4, 2, 8)
    with pytest.raises(NotImplementedError, match="rope3d has no forward-mode derivative"):
        torch.func.jvp(turned, (x,), (x,))
    with ops.use_reference():
        assert torch.allclose(torch.func.jvp(turned, (x,), (x,))[1], turned(x))


def test_the_references_tables_serve_training_after_inference() -> None:
    q = normal(6, 1, 8, seed=5).requires_grad_()
    grids = grids_of([(3, 1, 2)])
    with ops.use_reference():
        with torch.inference_mode():
            ops.rope3d(q, q, grids, (4, 2, 2), 777.0)
        ops.rope3d(q, q, grids, (4, 2, 2), 777.0)[0].sum().backward()
        with torch.device("meta"):
            ops.rope3d(q, q, grids, (4, 2, 2), 778.0)
    assert q.grad is not None


@pytest.mark.parametrize("op", ["rope3d", "add_sincos3d"])
def test_ranks_of_packs_of_any_size_share_one_graph(op: str) -> None:
    """`first` differs from rank to rank and from pack to pack: it must not be a constant of the graph."""
    torch._dynamo.reset()

    def step(x: Tensor, grids: Tensor, first: int) -> Tensor:
        if op == "rope3d":
            return ops.rope3d(x[:, None], x[:, None], grids, (4, 4, 4), first=first)[0] * 2
        return ops.add_sincos3d(x, grids, first=first) * 2

    graph = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for width in range(4, 18):  # a graph each would be more than torch's limit of 8
        grids, half = grids_of([(2, 2, width)]), 2 * width
        x = torch.randn(half, 12)
        assert torch.equal(graph(x, grids, half), step(x, grids, half))


def test_a_weight_that_is_no_head_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k_weight is torch.float32 \[7\] on cpu, expected \[8\] on cpu"):
        ops.qk_norm_rope3d(Q, Q, W, W[:7], G, (4, 2, 2))


@compiled_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": grids_of([(1, 2, 1)])}, "grids"),
        ({"grids": grids_of([(-1, -2, 2)])}, "grids"),
        ({"grids": grids_of([(2**31 - 1, 2**31 - 1, 4)])}, "grids"),
        ({"grids": torch.zeros(2, 2, dtype=torch.int64)}, "grids"),
        ({"axes": [4, 2, 4]}, "axes_dim"),
        ({"axes": [-4, 8, 4]}, "axes_dim"),
        ({"axes": [8]}, "axes_dim"),
        ({"first": 1}, "grids"),
        ({"first": -5}, "first"),
        ({"first": 2**63 - 2}, "first"),
        ({"k": Q[:3]}, "q, k"),
        ({"theta": [0.0, 1.0, 1.0]}, "theta"),
    ],
    ids=str,
)
def test_the_compiled_body_itself_never_leaves_its_memory(change: dict[str, Any], message: str) -> None:
    """What reaches it without our checks, as from a compiled graph."""
    given = {"q": Q, "k": Q, "grids": G, "axes": [4, 2, 2], "theta": [1e4] * 3, "first": 0, **change}
    how = (given["grids"], given["axes"], given["theta"], [0.0] * 3, [1.0] * 3, given["first"], True)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sorahpc.rope3d(given["q"], given["k"], *how, False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sorahpc.qk_norm_rope3d(given["q"], given["k"], W, W, *how, 1e-6)
