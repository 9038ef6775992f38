"""Sinusoidal embeddings: compiled against reference against float64; slices, gradients, graphs, edges."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from levels import EMULATED, LEVELS, run_at_level
from torch import Tensor

from sorahpc import ops
from sorahpc.ops._library import LIBRARY

PACKS = {
    "ragged": [(4, 2, 3), (1, 8, 8), (2, 3, 1), (1, 1, 1), (7, 2, 2)],
    "long": [(4001, 1, 1), (1, 1, 4000), (1, 3000, 1)],
    "many samples": [(1, 1 + i % 3, 1 + i % 5) for i in range(500)],
    "empty": [],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STEP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-44}

compiled_only = pytest.mark.skipif(not LIBRARY.is_file(), reason="sorahpc._ops is not built (make build)")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def grids_of(pack: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(pack, dtype=torch.int64).view(-1, 3)


def truth(grids: Tensor, dim: int, theta: float = 1e4) -> Tensor:
    """float64, column by column."""
    at, half = ops.positions3d(grids).double(), dim // 6
    columns = []
    for axis in range(3):
        for wave in (torch.sin, torch.cos):
            columns += [wave(at[:, axis] * theta ** (-i / half)) for i in range(half)]
    return torch.stack(columns, 1)


@compiled_only
@devices
def test_what_is_tested_here_is_the_compiled_op(device: str) -> None:
    live = ops.backend()["ops"]
    assert {live[op][device] for op in ("sincos3d", "add_sincos3d", "timestep_embedding")} == {"compiled"}


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_larger_than_the_caches_is_the_same(dtype: torch.dtype) -> None:
    """Past 16 MiB the kernels write around the caches: other instructions, the same numbers."""
    grids = grids_of([(4, 40, 52), (1, 1, 1), (3, 17, 31)])
    x = torch.randn(int(grids.prod(1).sum()), 960, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = ops.add_sincos3d(x, grids)
    assert whole.nbytes > 16 << 20  # STREAM_BYTES of csrc/ops/common.h
    for first in (0, 4000, 8300):
        part = slice(first, first + 100)
        assert torch.equal(ops.add_sincos3d(x[part], grids, first=first), whole[part])


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [6, 12, 72, 1152])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_sincos3d_is_float64s_rounded(
    pack: list[tuple[int, int, int]], dim: int, dtype: torch.dtype, device: str
) -> None:
    if device == "cuda" and dtype is torch.float64:
        pytest.skip("float64 is for the CPU")
    grids = grids_of(pack)
    got = ops.sincos3d(grids, dim, dtype=dtype, device=device)
    assert got.dtype == dtype and got.device.type == device and got.shape == (int(grids.prod(1).sum()), dim)
    with ops.use_reference():
        reference = ops.sincos3d(grids, dim, dtype=dtype, device=device)
    # Half a step below 1 after half a step of float32; on CUDA, which makes sines itself, twice that.
    in_float32 = 3.1e-8 if device == "cpu" and not EMULATED else 6e-8
    allowed = 1e-12 if dtype is torch.float64 else STEP[dtype] / 4 + in_float32
    for result in (got, reference):
        torch.testing.assert_close(result.cpu().double(), truth(grids, dim), rtol=0, atol=allowed)
    n = len(got)
    how: dict[str, Any] = {"dtype": dtype, "device": device}
    assert torch.equal(ops.sincos3d(grids, dim, first=n // 3, length=n // 2, **how), got[n // 3 : n // 3 + n // 2])
    assert torch.equal(ops.sincos3d(grids, dim, first=n // 3, **how), got[n // 3 :])


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [6, 12, 72, 1152])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_add_sincos3d_is_exact_to_a_rounding(
    pack: list[tuple[int, int, int]], dim: int, dtype: torch.dtype, device: str
) -> None:
    if device == "cuda" and dtype is torch.float64:
        pytest.skip("float64 is for the CPU")
    grids = grids_of(pack)
    table = truth(grids, dim)
    x = torch.randn(table.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).to(device)
    got = ops.add_sincos3d(x, grids)
    assert got.dtype == dtype and got.shape == x.shape
    with ops.use_reference():
        reference = ops.add_sincos3d(x, grids)
    exact = x.cpu().double() + table
    for result in (got, reference):
        error = (result.cpu().double() - exact).abs()
        assert bool((error <= STEP[dtype] / 2 * exact.abs() + 4e-7 * (dtype is not torch.float64) + 1e-12).all())
    n = len(x)
    part = x[n // 3 : n // 3 + n // 2]
    assert torch.equal(ops.add_sincos3d(part, grids, first=n // 3), got[n // 3 : n // 3 + n // 2])
    wide = torch.cat((x, x), 1)[:, :dim]
    assert torch.equal(ops.add_sincos3d(wide, grids), got)
    assert torch.equal(ops.add_sincos3d(x.t().contiguous().t(), grids), got)


@compiled_only
@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level_is_right(level: str) -> None:
    script = """if True:
        import torch
        from sorahpc import ops
        for grids, dim in ((torch.tensor([[3, 5, 7], [1, 1, 1]]), 78), (torch.tensor([[9, 40, 64]]), 288)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                x = torch.randn(int(grids.prod(1).sum()), dim).to(dtype)
                got, table = ops.add_sincos3d(x, grids), ops.sincos3d(grids, dim)
                with ops.use_reference():
                    torch.testing.assert_close(got, ops.add_sincos3d(x, grids))
                    torch.testing.assert_close(table, ops.sincos3d(grids, dim), rtol=0, atol=1e-7)
        t = torch.rand(70)
        for dim in (2, 6, 34, 256):
            got = ops.timestep_embedding(t, dim)
            with ops.use_reference():
                torch.testing.assert_close(got, ops.timestep_embedding(t, dim), rtol=0, atol=3e-7)
    """
    run_at_level(level, script)


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 6, 34, 256])
def test_timestep_embedding_is_accurate(dim: int, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and dtype is torch.float64:
        pytest.skip("float64 is for the CPU")
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    t = torch.cat((torch.tensor([0.0, 1.0, -0.5]), torch.rand(40, generator=torch.Generator().manual_seed(0)))).to(
        dtype
    )
    got = ops.timestep_embedding(t.to(device), dim).cpu()
    assert got.dtype == compute and got.shape == (43, dim)
    frequencies = (10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))).to(compute)
    angles = (1000.0 * t.to(compute)[:, None] * frequencies).double()
    exact = torch.cat((angles.cos(), angles.sin()), 1)
    limit = 1e-9 if compute is torch.float64 else 5e-7 if device == "cuda" else 2e-7
    # Two ways to the same frequency differ by a rounding; the angle is up to a thousand of them.
    assert ((got.double() - exact).abs() <= limit + angles.repeat(1, 2).abs() * torch.finfo(compute).eps).all()
    with ops.use_reference():
        torch.testing.assert_close(
            got, ops.timestep_embedding(t, dim), rtol=0, atol=1e-9 if dtype is torch.float64 else 1.3e-4
        )
    assert ops.timestep_embedding(t[:0].to(device), dim).shape == (0, dim)


@devices
def test_offsets_beyond_two_to_the_31_elements(device: str) -> None:
    """Rows 2^25 elements apart; on the CPU only what is touched takes memory."""
    numel = 99 * 2**25 + 12
    if device == "cuda":
        base = torch.empty(numel, dtype=torch.bfloat16, device=device)
    else:
        base = torch.frombuffer(mmap.mmap(-1, 2 * numel), dtype=torch.bfloat16)
    far = base.as_strided((100, 12), (2**25, 1))
    x = torch.randn(100, 12, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    far.copy_(x)
    assert torch.equal(ops.add_sincos3d(far, grids_of([(4, 5, 5)])), ops.add_sincos3d(x, grids_of([(4, 5, 5)])))


def test_gradients_are_exact_in_float64() -> None:
    t = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embed = lambda t: ops.timestep_embedding(t, 8, scale=7.0)  # noqa: E731
    assert torch.autograd.gradcheck(embed, (t,)) and torch.autograd.gradgradcheck(embed, (t,))
    grids = grids_of([(2, 1, 2), (1, 1, 3)])
    x = torch.randn(7, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.add_sincos3d(x, grids), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.add_sincos3d(x, grids), (x,))
    (low,) = torch.autograd.grad(ops.timestep_embedding(s := t.bfloat16().detach().requires_grad_(), 8).sum(), s)
    assert low.dtype == torch.bfloat16


@devices
def test_torch_finds_the_registrations_sound(device: str) -> None:
    grids = grids_of(PACKS["ragged"])
    x = torch.randn(int(grids.prod(1).sum()), 12, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.sorahpc.add_sincos3d.default, (x, grids, 1e4, 0))
    torch.library.opcheck(torch.ops.sorahpc.sincos3d.default, (x.detach(), grids, 12, 1e4, 3, 5))
    t = torch.rand(4, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.sorahpc.timestep_embedding.default, (t, 8, 1000.0, 1e4))


@devices
def test_they_compile_into_one_graph_for_packs_of_any_size(device: str) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, t: Tensor, grids: Tensor) -> Tensor:
        return ops.add_sincos3d(x * 2, grids).sum() + ops.timestep_embedding(t, 8).sum()

    graph = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("ragged", "many samples"):
        grids = grids_of(PACKS[name])
        x = torch.randn(int(grids.prod(1).sum()), 12, device=device).requires_grad_()
        t = torch.rand(len(grids), device=device).requires_grad_()
        got, expected = graph(x, t, grids), step(x, t, grids)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, (x, t)), torch.autograd.grad(expected, (x, t)), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises((RuntimeError, ValueError), match="grids"):
        graph(x, t, grids_of([(1, 1, 1)]))


X, G, HUGE = torch.zeros(4, 12), grids_of([(1, 2, 2)]), grids_of([(2**31, 1, 1)])


@pytest.mark.parametrize(
    ("message", "call"),
    {
        "dim 10, expected a multiple of 6": lambda: ops.sincos3d(G, 10),
        "dim 11, expected a multiple of 6": lambda: ops.add_sincos3d(X[:, :11], G),
        "dim 0, expected a whole number from 6": lambda: ops.sincos3d(G, 0),
        "grids have 4 tokens, the input has 3": lambda: ops.add_sincos3d(X[:3], G),
        r"grids have 4 tokens, expected 1 \+ 4 at least": lambda: ops.add_sincos3d(X, G, first=1),
        r"grids have 4 tokens, expected 2 \+ 3 at least": lambda: ops.sincos3d(G, 6, first=2, length=3),
        "dim 12.0, expected a whole number": lambda: ops.sincos3d(G, 12.0),
        r"grid \(2147483648, 1, 1\), expected counts of at least 1 and below": lambda: ops.sincos3d(HUGE, 6, length=1),
        "timestep_embedding: dim 33554432": lambda: ops.timestep_embedding(X[0], 2**25),
        r"scale 1e\+17, expected at most 2\^40": lambda: ops.timestep_embedding(X[0], 8, scale=1e17),
        "scale nan": lambda: ops.timestep_embedding(X[0], 8, scale=float("nan")),
        "t is list": lambda: ops.timestep_embedding([0.5], 8),
        "x is torch.sparse_coo": lambda: ops.add_sincos3d(X.to_sparse(), G),
        "first -1": lambda: ops.add_sincos3d(X, G, first=-1),
        "length -1": lambda: ops.sincos3d(G, 6, length=-1),
        "theta 0": lambda: ops.sincos3d(G, 6, 0.0),
        "the result is torch.int64": lambda: ops.sincos3d(G, 6, dtype=torch.int64),
        "the result is float64 on meta": lambda: ops.sincos3d(G, 6, dtype=torch.float64, device="meta"),
        "x is torch.int64": lambda: ops.add_sincos3d(X.long(), G),
        r"x has shape \(48,\)": lambda: ops.add_sincos3d(X.flatten(), G),
        r"grid \(0, 2, 2\)": lambda: ops.sincos3d(grids_of([(0, 2, 2)]), 6),
        "timestep_embedding: dim 7": lambda: ops.timestep_embedding(X[0], 7),
        r"t is torch.float32 of shape \(4, 12\)": lambda: ops.timestep_embedding(X, 8),
        "t is torch.int64": lambda: ops.timestep_embedding(X[0].long(), 8),
        "max_period -1": lambda: ops.timestep_embedding(X[0], 8, max_period=-1.0),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_misfit_is_one_valueerror_with_the_numbers(message: str, call) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@compiled_only
def test_the_compiled_bodies_never_leave_their_memory() -> None:
    add, write, embed = (getattr(torch.ops.sorahpc, n) for n in ("add_sincos3d", "sincos3d", "timestep_embedding"))
    for call in (
        lambda: add(X, grids_of([(1, 1, 3)]), 1e4, 0),
        lambda: add(X, G, 1e4, 1),
        lambda: add(X, G, 1e4, -1),
        lambda: add(X, G, 1e4, 2**63 - 1),
        lambda: add(X[:, :10], G, 1e4, 0),
        lambda: write(X, G, 12, 1e4, 0, 5),
        lambda: write(X, G, 12, 1e4, 2**62, 2**62),
        lambda: write(X, G, 12, 1e4, 0, -1),
        lambda: write(X, G, -6, 1e4, 0, 1),
        lambda: embed(X[0], 7, 1.0, 1e4),
        lambda: embed(X[0], 0, 1.0, 1e4),
        lambda: embed(X, 8, 1.0, 1e4),
    ):
        with pytest.raises(RuntimeError):
            call()
