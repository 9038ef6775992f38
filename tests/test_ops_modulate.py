"""modulate and residual_norm: compiled against reference against float64; gradients, graphs, edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from levels import LEVELS, run_at_level
from torch import Tensor

from sorahpc import ops
from sorahpc.ops._library import LIBRARY

LENS = {
    "one sample": [70],
    "one token": [1],
    "lengths of zero": [0, 3, 0, 0, 130, 1, 0],
    "one token a sample": [1] * 40,
    "chunks to the token": [64, 128, 63, 65],
    "empty samples": [0, 0],
    "empty": [],
}
# What is given of (branch, gate, shift and scale).
GIVEN = {
    "modulate": (False, False, True),
    "residual": (True, False, False),
    "gated": (True, True, False),
    "residual, modulated": (True, False, True),
    "gated, modulated": (True, True, True),
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "branch", "gate", "shift", "scale")

compiled_only = pytest.mark.skipif(not LIBRARY.is_file(), reason="sorahpc._ops is not built (make build)")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
every_combination = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())

Inputs = dict[str, Tensor]


def make(
    lens: list[int],
    M: int,
    given: tuple[bool, bool, bool],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Inputs, Tensor]:
    """What is given, each with a gradient wanted, and lens."""
    generator = torch.Generator().manual_seed(seed)
    branch, gate, modulated = given
    wanted = {"x": True, "branch": branch, "gate": gate, "shift": modulated, "scale": modulated}
    inputs = {}
    for name in NAMES:  # all are drawn, so that what is not given doesn't change the rest
        rows = sum(lens) if name in ("x", "branch") else len(lens)
        v = torch.randn(rows, M, generator=generator, dtype=torch.float64)
        v = (2 * v + 1 if name == "x" else v).to(device, dtype)
        if wanted[name]:
            inputs[name] = v.requires_grad_()
    return inputs, torch.tensor(lens, dtype=torch.int64)


def call(inputs: Inputs, lens: Tensor, eps: float = 1e-6) -> tuple[Tensor, ...]:
    if "branch" not in inputs:
        return (ops.modulate(inputs["x"], inputs["shift"], inputs["scale"], lens, eps),)
    return ops.residual_norm(lens=lens, eps=eps, **inputs)


def grads_like(outs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]


def run(inputs: Inputs, lens: Tensor, eps: float = 1e-6) -> list[Tensor]:
    """Results, then the gradient of each input."""
    outs = call(inputs, lens, eps)
    return [*outs, *torch.autograd.grad(outs, list(inputs.values()), grads_like(outs))]


def by_loops(inputs: Inputs, lens: Tensor, eps: float = 1e-6) -> list[Tensor]:
    """Sample by sample, out of nothing but arithmetic."""
    outs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for s, token in enumerate(itertools.accumulate(lens.tolist(), initial=0)):
        if s == len(lens):
            break
        rows = slice(token, token + int(lens[s]))
        total = inputs["x"][rows]
        if "branch" in inputs:
            total = total + (inputs["gate"][s] if "gate" in inputs else 1) * inputs["branch"][rows]
        off = total - total.mean(1, keepdim=True)
        y = off / torch.sqrt((off**2).mean(1, keepdim=True) + eps)
        if "scale" in inputs:
            y = y * (1 + inputs["scale"][s]) + inputs["shift"][s]
        outs[0].append(total)
        outs[1].append(y)
    both = tuple(torch.cat(o) for o in (outs if "branch" in inputs else outs[1:]))
    return [*both, *torch.autograd.grad(both, list(inputs.values()), grads_like(both))]


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.detach().double().cpu() - truth.detach().cpu()).norm())


@compiled_only
@devices
def test_what_is_tested_here_is_the_compiled_op(device: str) -> None:
    live = ops.backend()["ops"]
    assert live["ada_norm"][device] == live["ada_norm_backward"][device] == "compiled"


@devices
@every_combination
@pytest.mark.parametrize("M", [7, 8, 72, 100, 1152])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_is_as_near_to_float64_as_the_reference(
    dtype: torch.dtype, M: int, given: tuple[bool, bool, bool], device: str
) -> None:
    for lens in ([0, 3, 0, 130, 1, 0], [70]):
        inputs, lens_S = make(lens, M, given, dtype, device)
        got = run(inputs, lens_S)
        with ops.use_reference():
            expected = run(inputs, lens_S)
            truth = run({k: v.detach().double().cpu().requires_grad_() for k, v in inputs.items()}, lens_S)
        for i, (a, b, c) in enumerate(zip(got, expected, truth, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype == dtype and a.is_contiguous()
            # Twice the reference's own, and a few hundredths of a unit in the last place where that got lucky.
            allowed = 2 * error(b, c) + 0.05 * torch.finfo(dtype).eps * float(c.detach().norm())
            assert error(a, c) <= allowed, (i, error(a, c), error(b, c))


@every_combination
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_compiled_reference_and_loops_agree_in_float64(lens: list[int], given: tuple[bool, bool, bool]) -> None:
    for M in (1, 24, 37):
        inputs, lens_S = make(lens, M, given, torch.float64)
        got = run(inputs, lens_S)
        with ops.use_reference():
            expected = run(inputs, lens_S)
        truth = by_loops(inputs, lens_S) if sum(lens) else expected
        for a, b, c in zip(got, expected, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


@devices
@every_combination
@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
def test_an_empty_pack_has_empty_results_and_gradients_of_zero(
    reference: bool, given: tuple[bool, bool, bool], device: str
) -> None:
    def step() -> list[Tensor]:
        return run(*make([0, 0], 16, given, device=device))

    if reference:
        with ops.use_reference():
            got = step()
    else:
        got = step()
    assert all(not v.any() for v in got)


@devices
def test_ten_thousand_samples(device: str) -> None:
    """More than a kernel's arguments hold; more chunks than tokens / chunk."""
    lens = [i % 3 for i in range(10_000)]
    inputs, lens_S = make(lens, 8, GIVEN["gated, modulated"], device=device)
    got = run(inputs, lens_S)
    with ops.use_reference():
        expected = run(inputs, lens_S)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Two passes: E[x^2] - mean^2 would lose all of float32's here."""
    inputs, lens = make([9], 1024, GIVEN["modulate"])
    with torch.no_grad():
        x = inputs["x"] + 4096
        truth = ops.modulate(x.double(), inputs["shift"].double(), inputs["scale"].double(), lens)
        got = ops.modulate(x, inputs["shift"], inputs["scale"], lens)
    assert float((got - truth).abs().max()) < 2e-3  # the mean itself is rounded to 4096 * 2^-24


@devices
@pytest.mark.parametrize("mean", [100.0, 1e4])
@pytest.mark.parametrize("M", [384, 1152, 1157])
def test_a_mean_far_from_zero_is_as_near_as_the_references(M: int, mean: float, device: str) -> None:
    """With one row, whose error no other's evens out: a mean off by its sum's rounding made it 36 times as far."""
    for seed in range(20):
        x, shift, scale = torch.randn(3, 1, M, generator=torch.Generator().manual_seed(seed))
        x, lens = x + mean, torch.tensor([1])
        inputs = [v.to(device) for v in (x, shift, scale)]
        got = ops.modulate(*inputs, lens)
        with ops.use_reference():
            expected, truth = ops.modulate(*inputs, lens), ops.modulate(*(v.double().cpu() for v in inputs), lens)
        assert error(got, truth) <= 2 * error(expected, truth) + 0.05 * 2**-23 * float(truth.norm()), seed


@devices
@pytest.mark.parametrize("value", [0.1, 3e4, 1e8, -1e8])
def test_a_row_of_equal_numbers_stays_finite(value: float, device: str) -> None:
    x, zeros = torch.full((3, 1000), value, device=device), torch.zeros(1, 1000, device=device)
    assert ops.modulate(x, zeros, zeros, torch.tensor([3])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_of_the_sum_as_it_is_returned(dtype: torch.dtype) -> None:
    inputs, lens = make([5, 9], 96, GIVEN["gated, modulated"], dtype)
    total, y = call(inputs, lens)
    again = ops.modulate(total, inputs["shift"], inputs["scale"], lens)
    assert torch.equal(y, again)


@devices
def test_chunks_of_one_tensor_are_taken_as_they_are(device: str) -> None:
    lens = torch.tensor([3, 0, 40])
    for M in (16, 33):
        six = torch.randn(3, 6 * M, device=device)
        x, branch = torch.randn(43, M, device=device), torch.randn(43, M, device=device)
        results = []
        for dense in (False, True):
            leaf = six.clone().requires_grad_()
            shift, scale, gate, *_ = leaf.chunk(6, dim=1)
            assert not gate.is_contiguous()
            if dense:
                shift, scale, gate = shift.contiguous(), scale.contiguous(), gate.contiguous()
            outs = ops.residual_norm(x, branch, lens, gate, shift, scale)
            results.append([*outs, *torch.autograd.grad(outs, [leaf], grads_like(outs))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@devices
@every_combination
def test_inputs_that_are_not_contiguous_are_taken(given: tuple[bool, bool, bool], device: str) -> None:
    inputs, lens = make([3, 0, 40], 24, given, device=device)
    expected = run(inputs, lens)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda v: v.t().contiguous().t(),
        lambda v: torch.cat([v, v], 1)[:, : v.shape[1]],
        lambda v: torch.stack([v, v], 2)[..., 1],
        lambda v: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape),  # no longer aligned
    ]
    for layout in layouts:
        moved = {k: layout(v.detach()).requires_grad_() for k, v in inputs.items()}
        for a, b in zip(run(moved, lens), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # Gradients too come as they are: of an expanded sum, rows of stride 0 or columns of stride 0.
    outs = call(inputs, lens)
    row = torch.randn(1, 24, device=device)
    for grad in (row.expand(43, 24), row[:, :1].expand(43, 24)):
        got = torch.autograd.grad(outs, list(inputs.values()), [grad] * len(outs), retain_graph=True)
        dense = torch.autograd.grad(outs, list(inputs.values()), [grad.contiguous()] * len(outs), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


def test_places_beyond_two_to_the_31_are_reached() -> None:
    """Rows 2^30 elements apart: 8 GB of addresses, of which a few pages are touched."""
    M, stride = 8, 2**30
    try:
        far = torch.empty(3 * stride + M, dtype=torch.bfloat16).as_strided((4, M), (stride, 1))
    except RuntimeError:
        pytest.skip("the machine doesn't give out 6 GB of addresses")
    near = torch.randn(4, M).bfloat16()
    far.copy_(near)
    inputs, lens = make([3, 1], M, GIVEN["gated, modulated"], torch.bfloat16)
    results = []
    for x in (near, far):
        moved = {**inputs, "x": x.detach().requires_grad_(), "branch": x.detach()}
        outs = call(moved, lens)
        results.append([*outs, *torch.autograd.grad(outs, [moved["x"], inputs["gate"]], [x, x])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # And a table of samples, all of one row.
    row = torch.randn(1, M).expand(500, M)
    x = torch.randn(500, M)
    got = ops.modulate(x, row, row, torch.ones(500, dtype=torch.int64))
    assert torch.equal(got, ops.modulate(x, row[:1], row[:1], torch.tensor([500])))


@every_combination
def test_gradcheck(given: tuple[bool, bool, bool]) -> None:
    inputs, lens = make([2, 0, 3], 5, given, torch.float64)
    names = list(inputs)
    values = tuple(inputs.values())
    assert torch.autograd.gradcheck(lambda *v: call(dict(zip(names, v, strict=True)), lens), values)


@devices
@every_combination
def test_opcheck(given: tuple[bool, bool, bool], device: str) -> None:
    inputs, lens = make([2, 0, 3], 16, given, device=device)
    args = (*(inputs.get(name) for name in NAMES), lens, 1e-6)
    torch.library.opcheck(torch.ops.sorahpc.ada_norm.default, args)
    has_branch, gated, _ = given
    x = inputs["x"].detach()
    dense = {k: v.detach() for k, v in inputs.items()}
    backward = (
        torch.ones_like(x) if has_branch else None,
        torch.ones_like(x),
        x,
        torch.ones(len(x), 2, device=device),
        dense["branch"] if gated else None,
        dense.get("gate"),
        dense.get("scale"),
        lens,
    )
    torch.library.opcheck(torch.ops.sorahpc.ada_norm_backward.default, backward)


def test_one_result_may_go_unused() -> None:
    inputs, lens = make([4, 9], 24, GIVEN["gated, modulated"])
    values = list(inputs.values())
    for used in (0, 1):
        got = torch.autograd.grad(call(inputs, lens)[used].sin().sum(), values, allow_unused=True)
        with ops.use_reference():
            expected = torch.autograd.grad(call(inputs, lens)[used].sin().sum(), values, allow_unused=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


def test_without_a_gate_the_branch_has_a_gradient_of_its_own() -> None:
    """x and branch get one tensor; adding to the one must not change the other."""
    inputs, lens = make([4], 8, GIVEN["residual"])
    x, branch = inputs["x"], inputs["branch"]
    total, y = call(inputs, lens)
    (total.sum() + y.sin().sum() + 3 * x.sum()).backward()
    torch.testing.assert_close(x.grad, branch.grad + 3)
    assert x.grad.data_ptr() != branch.grad.data_ptr()


@devices
@every_combination
def test_a_compiled_graph_gives_the_same_bits(given: tuple[bool, bool, bool], device: str) -> None:
    def step(lens: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(o.sin() for o in call(inputs, lens))

    torch._dynamo.reset()
    graph = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lens in ([3, 0, 40], [7], [2, 2, 2, 2]):
        inputs, lens_S = make(lens, 24, given, device=device)
        results = []
        for f in (step, graph):
            outs = f(lens_S, **inputs)
            results.append([*outs, *torch.autograd.grad(outs, list(inputs.values()), grads_like(outs))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises((RuntimeError, ValueError), match="lens"):
        graph(torch.tensor([2, 2, 2, 1]), **inputs)


@every_combination
def test_the_result_does_not_depend_on_the_number_of_threads(given: tuple[bool, bool, bool]) -> None:
    # Far past the elements at which the kernels take a second thread; the last is past the caches too.
    for lens, M in (([700, 0, 33, 1, 900], 96), ([5] * 300, 65), ([2500, 1300], 1152)):
        inputs, lens_S = make(lens, M, given, torch.bfloat16)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(inputs, lens_S))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_larger_than_the_caches_is_as_exact(dtype: torch.dtype, given: tuple[bool, bool, bool]) -> None:
    """Written past them, and tokens in the middle of such a pack as in one of their own."""
    M = 2048
    lens = [1, 4500]
    inputs, lens_S = make(lens, M, given, dtype)
    assert sum(lens) * M * dtype.itemsize > 16 << 20
    outs = call(inputs, lens_S)
    few = {k: (v[1:200] if k in ("x", "branch") else v[1:]) for k, v in inputs.items()}
    for a, b in zip(outs, call(few, torch.tensor([199])), strict=True):
        torch.testing.assert_close(a[1:200], b)
    # A gradient of zero after a sample's first chunks: the same sums.
    masked = grads_like(outs)
    for g in masked:
        g[200:] = 0
    got = torch.autograd.grad(outs, list(inputs.values()), masked)
    alone = torch.autograd.grad(call(few, torch.tensor([199])), list(few.values()), [g[1:200] for g in masked])
    for name, a, b in zip(inputs, got, alone, strict=True):
        torch.testing.assert_close(a[1:200] if name in ("x", "branch") else a[1:], b)


CHECK_A_LEVEL = """if True:
    import torch
    from sorahpc import ops
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for L, M in ((70, 7), (70, 100), (150, 1152), (5000, 1024)):
            lens = torch.tensor([1, 0, L - 1])
            x, branch, gate, shift, scale = (
                torch.randn(n, M).to(dtype).requires_grad_() for n in (L, L, 3, 3, 3))
            if L == 70:  # all that is special: subnormal halves, infinities, NaN
                with torch.no_grad():
                    x[0, 0], branch[0, 1], x[1, :3], x[2, 0] = 1e-7, 3e-8, float("inf"), float("nan")
            def run():
                outs = ops.residual_norm(x, branch, lens, gate, shift, scale)
                torch.manual_seed(1)
                grads = [torch.randn_like(o) for o in outs]
                return [*outs, *torch.autograd.grad(outs, (x, branch, gate, shift, scale), grads)]
            got = run()
            with ops.use_reference():
                expected = run()
            rough = {2: 2e-2, 4: 1e-4, 8: 1e-9}[dtype.itemsize]
            for a, b in zip(got, expected):
                assert torch.equal(a.isnan(), b.isnan())
                off = (a - b).nan_to_num(0, 0, 0).float().norm()
                assert off <= rough * b.nan_to_num(0, 0, 0).float().norm(), (dtype, M, off)
    print("checked")
"""


@compiled_only
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_cpu_gives_the_result(level: str) -> None:
    assert "checked" in run_at_level(level, CHECK_A_LEVEL)


X, V, LENS_4 = torch.zeros(4, 6), torch.zeros(2, 6), torch.tensor([1, 3])
MOMENTS = torch.ones(4, 2)


@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
@pytest.mark.parametrize(
    ("message", "args"),
    {
        "x is torch.int32, expected one of": (X.int(), X, LENS_4),
        "x is torch.complex64": (X.to(torch.complex64), X, LENS_4),
        "x is float64 on meta": (X.double().to("meta"), X, LENS_4),
        r"x has shape \[24\], expected \[L, M\]": (X.flatten(), X, LENS_4),
        r"x has shape \[4, 0\], expected \[L, M\], M at least 1": (X[:, :0], X[:, :0], LENS_4),
        r"branch is torch.float32 \[3, 6\] on cpu, expected torch.float32 \[4, 6\]": (X, X[:3], LENS_4),
        r"branch is torch.bfloat16 \[4, 6\] on cpu, expected torch.float32": (X, X.bfloat16(), LENS_4),
        r"branch is torch.float32 \[4, 6\] on meta, expected it on cpu": (X, X.to("meta"), LENS_4),
        r"gate is torch.float32 \[1, 6\] on cpu, expected torch.float32 \[2, 6\]": (X, X, LENS_4, V[:1]),
        r"gate is torch.float32 \[6\] on cpu": (X, X, LENS_4, V[0]),
        r"gate is torch.float32 \[2, 6\] on meta": (X, X, LENS_4, V.to("meta")),
        r"shift is torch.float32 \[2, 5\] on cpu": (X, X, LENS_4, None, V[:, :5], V),
        r"scale is torch.float16 \[2, 6\] on cpu": (X, X, LENS_4, V, V, V.half()),
        r"shift is torch.float32 \[2, 6\] on cpu, scale is None; expected both": (X, X, LENS_4, V, V),
        "lens is torch.int32 on cpu": (X, X, LENS_4.int()),
        "lens is torch.int64 on meta": (X, X, LENS_4.to("meta")),
        r"lens is torch.int64 on cpu of shape \(2, 1\), expected int64 on cpu \[S\]": (X, X, LENS_4.view(2, 1)),
        "lens have 5 tokens, the input has 4": (X, X, torch.tensor([5])),
        "lens have 3 tokens, the input has 4": (X, X, torch.tensor([0, 3])),
        "lens have 0 tokens, the input has 4": (X, X, torch.zeros(0, dtype=torch.int64)),
        "lens has -1, expected counts of at least 0": (X, X, torch.tensor([5, -1])),
        "eps -1.0, expected at least 0": (X, X, LENS_4, V, V, V, -1.0),
        "eps inf, expected at least 0, finite": (X, X, LENS_4, V, V, V, float("inf")),
        "branch is NoneType, expected a tensor": (X, None, LENS_4),
        "eps nan, expected at least 0": (X, X, LENS_4, V, V, V, float("nan")),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_misfit_is_one_valueerror_with_the_numbers(message: str, args: tuple, reference: bool) -> None:
    with pytest.raises(ValueError, match=f"residual_norm: {message}") as caught:
        if reference:
            with ops.use_reference():
                ops.residual_norm(*args)
        else:
            ops.residual_norm(*args)
    assert "\n" not in str(caught.value)


def test_modulate_refuses_the_same() -> None:
    with pytest.raises(ValueError, match=r"modulate: scale is torch.float32 \[1, 6\] on cpu, expected .* \[2, 6\]"):
        ops.modulate(X, V, V[:1], LENS_4)


@compiled_only
def test_the_compiled_body_itself_never_leaves_its_memory() -> None:
    """What reaches it without our checks, as from a compiled graph."""
    op, backward = torch.ops.sorahpc.ada_norm, torch.ops.sorahpc.ada_norm_backward
    for lens in ([5], [3], [], [-1, 5], [5, -1], [2**62, 2**62, 2**62, 2**62], [2**63 - 1], [-(2**63)], [1, 2]):
        lens_S = torch.tensor(lens, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="lens"):
            op(X, X, None, None, None, lens_S, 1e-6)
        with pytest.raises(RuntimeError, match="lens"):
            backward(None, X, X, MOMENTS, None, None, None, lens_S)
    for message, args in (
        ("lens", (X, None, None, None, None, LENS_4.int(), 1e-6)),
        ("x", (X[0], None, None, None, None, LENS_4, 1e-6)),
        ("branch", (X, X[:3], None, None, None, LENS_4, 1e-6)),
        ("branch", (X, X.double(), None, None, None, LENS_4, 1e-6)),
        ("gate", (X, X, V[:1], None, None, LENS_4, 1e-6)),
        ("gate", (X, None, V, None, None, LENS_4, 1e-6)),
        ("shift", (X, X, V, V, None, LENS_4, 1e-6)),
        ("scale", (X, X, V, V, V[:, :5], LENS_4, 1e-6)),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*args)
    for message, args in (
        ("dy", (None, X[:3], X, MOMENTS, None, None, None, LENS_4)),
        ("dsum", (X[:3], X, X, MOMENTS, None, None, None, LENS_4)),
        ("gate", (X, X, X, MOMENTS, None, V, None, LENS_4)),
        ("branch", (X, X, X, MOMENTS, X[:1], V, None, LENS_4)),
        ("scale", (X, X, X, MOMENTS, X, V, V[:1], LENS_4)),
        ("moments", (None, X, X, MOMENTS[:3], None, None, None, LENS_4)),
        ("moments", (None, X, X, MOMENTS.double(), None, None, None, LENS_4)),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*args)
