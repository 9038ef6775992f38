"""flow_patchify: noise that is the same to the bit everywhere and normal, what is mixed with it, gradients, edges."""

from __future__ import annotations

import importlib
import itertools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from levels import LEVELS, run_at_level
from torch import Tensor

from sorahpc import ops
from sorahpc.ops._library import LIBRARY

MODULE = importlib.import_module("sorahpc.ops.flow_patchify")  # the package's attribute is the function

PACKS = {
    "one sample": [(2, 3, 4)],
    "one token": [(1, 1, 1)],
    "ragged": [(4, 2, 3), (1, 8, 8), (2, 3, 1), (1, 1, 1), (7, 2, 2)],
    "wide": [(1, 3, 2500), (2, 1, 5)],
    "many samples": [(1, 1 + i % 3, 1 + i % 5) for i in range(500)],
    "empty": [],
}
PATCHES = [(1, 2, 2), (1, 1, 1), (2, 3, 5), (1, 4, 4), (1, 2, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TARGETS = ["velocity", "eps", "v"]
DRAWS = 1 << 22

compiled_only = pytest.mark.skipif(not LIBRARY.is_file(), reason="sorahpc._ops is not built (make build)")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make(
    pack: list[tuple[int, int, int]], size: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents, t, ids, grids; t begins with 0 and 1."""
    generator = torch.Generator().manual_seed(len(pack))
    grids = torch.tensor(pack, dtype=torch.int64).view(-1, 3)
    latents = torch.randn(int(grids.prod(1).sum()) * size, generator=generator, dtype=torch.float64).to(device, dtype)
    t = torch.rand(len(pack), generator=generator)
    t[:2] = torch.tensor([0.0, 1.0])[: len(t)]
    ids = torch.stack((torch.arange(len(pack)) * 2**40 + 7, torch.arange(len(pack)) % 3), dim=1)
    return latents, t, ids, grids


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@compiled_only
@devices
def test_what_is_tested_here_is_the_compiled_op(device: str) -> None:
    assert ops.backend()["ops"]["flow_patchify"][device] == "compiled"


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    low, high = (int(k, 16) for k in key.split())
    got = MODULE._philox([torch.tensor([int(c, 16)]) for c in counter.split()], (low, high))
    assert [f"{int(w):08x}" for w in got] == words.split()


def test_normals_are_those_of_float64_from_the_same_words_to_3e_7() -> None:
    a, b = torch.randint(2**32, (2, 1 << 20), generator=torch.Generator().manual_seed(0))
    a[:4], b[:4] = torch.tensor([0, 1, 2**31, 2**32 - 2**20]), torch.tensor([0, 2**32 - 1, 2**30, 2**31])
    radius = (-2 * (((a >> 1).float() + 0.5).double() / 2**31).log()).sqrt()
    turn = (b & ~63) + 32
    q, rest = ((turn + 2**29) >> 30) & 3, (turn + 2**29) % 2**30 - 2**29  # reduced in integers, hence accurate
    sin, cos = (rest.double() * (math.tau / 2**32)).sin(), (rest.double() * (math.tau / 2**32)).cos()
    at = torch.arange(len(q))
    truth = radius * torch.stack((cos, -sin, -cos, sin))[q, at], radius * torch.stack((sin, cos, -sin, -cos))[q, at]
    for got, expected in zip(MODULE._normals(a, b), truth, strict=True):
        error = ((got.double() - expected) / expected).abs()
        assert error.max() < 3e-7 and error.square().mean().sqrt() < 1e-7


@devices
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_and_reference_agree_to_the_bit(dtype: torch.dtype, target: str, device: str) -> None:
    if device == "cuda" and dtype is torch.float64:
        pytest.skip("float64 is for the CPU")
    for pack in PACKS.values():
        for patch in PATCHES:
            for last in (False, True):
                x, t, ids, grids = make(pack, 3 * math.prod(patch), dtype)
                got = ops.flow_patchify(
                    x.to(device), t, ids, grids, 3, patch, seed=5, target=target, channels_last=last
                )
                with ops.use_reference():
                    expected = ops.flow_patchify(x, t, ids, grids, 3, patch, seed=5, target=target, channels_last=last)
                assert same((got[0].cpu(), got[1].cpu()), expected), (pack[:3], patch, last)


@compiled_only
@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level_gives_the_same_bits(level: str) -> None:
    script = """if True:
        import torch
        from sorahpc import ops
        x = torch.randn(16 * 4 * 30 * 26 * 9, generator=torch.Generator().manual_seed(0))
        t, ids = torch.tensor([0.3]), torch.tensor([[2**62 + 5, 2**32 - 1]])
        small, large = torch.tensor([[9, 30, 26]]), torch.tensor([[27, 300, 26]])  # large: written past the caches
        cases = [(small, dtype, target) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
                 for target in ("velocity", "eps", "v")]
        for grids, dtype, target in cases + [(large, torch.float32, "velocity")]:
            y = x.to(dtype).repeat(30)[: 64 * grids.prod()]
            args = y, t, ids, grids, 16, (1, 2, 2)
            got = ops.flow_patchify(*args, seed=2**63 - 1, target=target)
            with ops.use_reference():
                expected = ops.flow_patchify(*args, seed=2**63 - 1, target=target)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), (dtype, target)
    """
    run_at_level(level, script)


@devices
@pytest.mark.parametrize("target", TARGETS)
def test_targets_follow_their_formulas(target: str, device: str) -> None:
    pack, patch = PACKS["ragged"], (1, 2, 2)
    x, t, ids, grids = make(pack, 12, device=device)
    noised, learned = ops.flow_patchify(x, t, ids, grids, 3, patch, seed=1, target=target)
    sizes = (grids.prod(1) * 12).tolist()
    eps = torch.cat([ops.noise(1, *ids[i].tolist(), (n,)) for i, n in enumerate(sizes)]).double()
    x0, at = x.cpu().double(), t.double().repeat_interleave(torch.tensor(sizes))
    expected = {"velocity": eps - x0, "eps": eps, "v": (1 - at) * eps - at * x0}[target]
    for got, truth in ((learned, expected), (noised, (1 - at) * x0 + at * eps)):
        torch.testing.assert_close(ops.unpatchify(got.cpu().double(), grids, 3, patch), truth, rtol=0, atol=1e-6)


def test_at_zero_there_is_data_alone_and_at_one_noise_alone() -> None:
    x, _, ids, grids = make([(2, 3, 4), (1, 2, 2)], 12)
    tokens = ops.patchify(x, grids, 3, (1, 2, 2))
    noised, eps = ops.flow_patchify(x, torch.zeros(2), ids, grids, 3, (1, 2, 2), seed=3, target="eps")
    assert torch.equal(noised, tokens)
    noised, eps = ops.flow_patchify(x, torch.ones(2), ids, grids, 3, (1, 2, 2), seed=3, target="eps")
    assert torch.equal(noised, eps)
    assert torch.equal(ops.flow_patchify(x, torch.ones(2), ids, grids, 3, (1, 2, 2), seed=3, target="v")[1], -tokens)


def test_noise_is_a_function_of_seed_id_visit_and_place_alone() -> None:
    """Not of the batch, its order, the patch, the layout of a token, the dtype's neighbours, or the threads."""
    grids = torch.tensor([[3, 20, 24], [1, 4, 6], [5, 12, 2], [2, 60, 60]])
    ids = torch.tensor([[11, 0], [12, 4], [2**63 - 1, 1], [0, 0]])
    shapes = [(4, t, h * 2, w * 2) for t, h, w in grids.tolist()]
    alone = [ops.noise(9, *ids[i].tolist(), shapes[i]) for i in range(4)]
    threads = torch.get_num_threads()
    try:
        for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3]):
            for patch in ((1, 2, 2), (1, 1, 1), (1, 4, 2)):
                for last in (False, True):
                    torch.set_num_threads(1 + len(order) % 3)
                    cut = torch.tensor(shapes)[order][:, 1:] // torch.tensor(patch)
                    x = torch.zeros(sum(math.prod(shapes[i]) for i in order))
                    args = x, torch.ones(len(order)), ids[order], cut, 4, patch
                    eps = ops.flow_patchify(*args, seed=9, channels_last=last)[1]
                    assert torch.equal(
                        ops.unpatchify(eps, cut, 4, patch, last), torch.cat([alone[i].flatten() for i in order])
                    )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ops.noise(9, 11, 0, (7,)), alone[0].flatten()[:7])
    assert ops.noise(0, 0, 0, (0, 3)).shape == (0, 3)


def test_noise_is_normal() -> None:
    """Four million draws: moments within five standard errors, Kolmogorov-Smirnov, and the longest tail."""
    x = ops.noise(2026, 1, 0, (DRAWS,)).double()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - mean) < 5 * math.sqrt(variance / DRAWS), power
    cdf = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    steps = torch.arange(DRAWS + 1, dtype=torch.float64) / DRAWS
    distance = max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    assert distance < 2.0 / math.sqrt(DRAWS)  # exceeded once in 1,500 if normal
    assert 4.5 < x.abs().max() < 6.7  # 5.3 is expected; 6.66 is the generator's end


def test_streams_and_neighbours_are_not_correlated() -> None:
    x, most = ops.noise(2026, 1, 0, (DRAWS,)).double(), 5 / math.sqrt(DRAWS)
    others = [(2026, 1, 1), (2026, 2, 0), (2027, 1, 0), (2026 + 2**40, 1, 0), (2026, 1 + 2**40, 0), (2026, 1, 2**31)]
    for other in others:
        assert abs((x * ops.noise(*other, (DRAWS,))).mean()) < most, other
    for lag in (1, 2, 3, 4, 5, 8, 16, 32, 64, 1024):
        assert abs((x[lag:] * x[:-lag]).mean()) < most, lag
        square = x.square() - 1
        assert abs((square[lag:] * square[:-lag]).mean() / 2) < most, lag


@pytest.mark.slow
def test_places_beyond_two_to_the_31_elements() -> None:
    """13 GB: noise of a sample's far elements, where they belong, and the sample behind it as it is alone."""
    H, W, id = 8192, 16_400, 5
    grids, size = torch.tensor([(1, H, W), (2, 3, 4)]), 4 * 2 * H * 2 * W
    assert size > 2**31
    latents, t, ids = (
        torch.zeros(size + 384, dtype=torch.bfloat16),
        torch.tensor([1.0, 0.3]),
        torch.tensor([[id, 0], [7, 2]]),
    )
    latents[size:] = torch.randn(384, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, eps = ops.flow_patchify(latents, t, ids, grids, 4, (1, 2, 2), seed=3, target="eps")
    block = torch.randint((size - 2**29) // 4, size // 4, (1000,), generator=torch.Generator().manual_seed(1))
    words = MODULE._philox([block, *(torch.full_like(block, k) for k in (0, id, 0))], (3, 0x80000000))
    expected = torch.stack((*MODULE._normals(*words[:2]), *MODULE._normals(*words[2:])), 1)
    at = 4 * block[:, None] + torch.arange(4)
    c, y, x = at // (4 * H * W), at // (2 * W) % (2 * H), at % (2 * W)
    for found in (tokens, eps):
        assert torch.equal(found[y // 2 * W + x // 2, c * 4 + y % 2 * 2 + x % 2], expected.bfloat16())
    alone = ops.flow_patchify(latents[size:], t[1:], ids[1:], grids[1:], 4, (1, 2, 2), seed=3, target="eps")
    assert torch.equal(tokens[H * W :], alone[0]) and torch.equal(eps[H * W :], alone[1])


@devices
def test_ten_thousand_samples(device: str) -> None:
    pack = [(1, 1 + i % 3, 1 + i % 2) for i in range(10_000)]
    x, t, ids, grids = make(pack, 5)
    got = ops.flow_patchify(x.to(device), t, ids, grids, 5, (1, 1, 1), seed=0)
    with ops.use_reference():
        assert same((got[0].cpu(), got[1].cpu()), ops.flow_patchify(x, t, ids, grids, 5, (1, 1, 1), seed=0))


@devices
def test_inputs_that_are_not_contiguous_are_taken(device: str) -> None:
    x, t, ids, grids = make(PACKS["ragged"], 12, device=device)
    expected = ops.flow_patchify(x, t, ids, grids, 3, (1, 2, 2), seed=1)
    strided = torch.stack((x, x), 1)[:, 0], torch.stack((t, t), 1)[:, 0], ids.t().contiguous().t()
    assert same(ops.flow_patchify(*strided, grids, 3, (1, 2, 2), seed=1), expected)


@devices
@pytest.mark.parametrize("target", [0, 1, 2])
def test_torch_finds_the_registration_sound(target: int, device: str) -> None:
    x, t, ids, grids = make(PACKS["ragged"], 12, device=device)
    args = (x.requires_grad_(), t, ids, grids, 3, 1, 2, 2, False, 7, target)
    torch.library.opcheck(torch.ops.sorahpc.flow_patchify.default, args)


@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_is_exact_and_equals_the_references(target: str) -> None:
    x, t, ids, grids = make([(2, 1, 3), (1, 2, 2), (1, 1, 1)], 8, torch.float64)

    def there(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.flow_patchify(x, t, ids, grids, 2, (1, 2, 2), seed=1, target=target)

    assert torch.autograd.gradcheck(there, (x.clone().requires_grad_(),))
    assert torch.autograd.gradgradcheck(there, (x.clone().requires_grad_(),))
    grads = []
    for reference in (False, True):
        y = x.float().requires_grad_()
        if reference:
            with ops.use_reference():
                a, b = there(y)
        else:
            a, b = there(y)
        (a * torch.arange(float(a.numel())).view_as(a) + b.cos()).sum().backward()
        grads.append(y.grad)
    torch.testing.assert_close(grads[0], grads[1])


@devices
def test_it_compiles_into_one_graph_for_packs_of_any_size(device: str) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, t: Tensor, ids: Tensor, grids: Tensor) -> Tensor:
        noised, learned = ops.flow_patchify(x * 2, t, ids, grids, 3, (1, 2, 2), seed=4)
        return (noised * learned).sum(1)

    graph = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("ragged", "many samples"):
        x, *rest = make(PACKS[name], 12, device=device)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, expected = graph(a, *rest), step(b, *rest)
        assert torch.equal(got, expected)
        got.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises((RuntimeError, ValueError), match="expected 0 to 1"):
        graph(x, rest[0] + 2, *rest[1:])


X, T, I, G = torch.zeros(48), torch.tensor([0.5]), torch.tensor([[3, 4]]), torch.tensor([[1, 2, 2]])
BAD = {
    r"grids have 5 tokens": {"grids": torch.tensor([[1, 1, 5]])},
    r"latents is torch.int32": {"latents": X.int()},
    r"latents has shape \(4, 12\)": {"latents": X.view(4, 12)},
    r"t is torch.float64 on cpu of shape \(1,\), expected float32 on cpu \[1\]": {"t": T.double()},
    r"t is torch.float32 on cpu of shape \(2,\)": {"t": torch.zeros(2)},
    r"t 1.5 of sample 0, expected 0 to 1": {"t": T + 1},
    r"t nan of sample 0": {"t": T * float("nan")},
    r"ids is torch.int32": {"ids": I.int()},
    r"ids is torch.int64 on cpu of shape \(2, 1\), expected int64 on cpu \[1, 2\]": {"ids": I.t()},
    r"sample 0 has id -3 and visit 4": {"ids": I * torch.tensor([-1, 1])},
    r"sample 0 has id 3 and visit -4": {"ids": I * torch.tensor([1, -1])},
    r"sample 0 has id 3 and visit 4294967296": {"ids": torch.tensor([[3, 2**32]])},
    r"seed -1": {"seed": -1},
    r"seed 9223372036854775808": {"seed": 2**63},
    r"target 'noise', expected one of velocity, eps, v": {"target": "noise"},
    r"patch \(1, 0, 2\)": {"patch": (1, 0, 2)},
    r"patch \(1, 1, 5000\): size 5000, expected a whole number from 1 to 4096": {"patch": (1, 1, 5000)},
    r"channels 2097152, expected a whole number from 1 to 1048576": {"channels": 2**21},
    r"seed 1.5, expected a whole number": {"seed": 1.5},
    r"t is float, expected a tensor": {"t": 0.5},
}


@pytest.mark.parametrize(("message", "change"), BAD.items(), ids=BAD.keys())
def test_a_misfit_is_one_valueerror_with_the_numbers(message: str, change: dict) -> None:
    args = {"latents": X, "t": T, "ids": I, "grids": G, "channels": 3, "patch": (1, 2, 2), "seed": 1, **change}
    with pytest.raises(ValueError, match=message) as caught:
        ops.flow_patchify(**args)
    assert "\n" not in str(caught.value)


def test_noise_stands_on_no_default_of_torch() -> None:
    expected = ops.noise(1, 2, 3, (4, 5))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(ops.noise(1, 2, 3, (4, 5)), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("sample_id", "visit"), [(2**63, 0), (-1, 0), (0, 2**32), (0, 0.5)])
def test_noise_of_a_sample_that_can_not_be_is_refused(sample_id: int, visit: int) -> None:
    with pytest.raises(ValueError, match=r"noise: .*, expected a whole number from 0"):
        ops.noise(1, sample_id, visit, (4,))


def test_noise_for_more_elements_than_can_be_counted_is_refused() -> None:
    x = torch.zeros(1).expand(2**34 + 4)
    with pytest.raises(ValueError, match=r"has 17179869188 elements, noise is drawn for 2\^34"):
        ops.flow_patchify(x, T, I, torch.tensor([[4, 641, 6700417]]), 1, (1, 1, 1), seed=0)


@compiled_only
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (1, T + 1), (1, T * float("nan")), (1, torch.zeros(2)), (1, T.double()), (2, -I), (2, I[:, :1]), (2, I.int()),
        (2, torch.tensor([[0, 2**32]])), (3, torch.tensor([[1, 2, 3]])), (3, torch.tensor([[2**62, 4, 1]])),
        (3, torch.zeros(0, 3, dtype=torch.int64)), (4, 2**62), (6, -2), (9, -1), (10, 3), (10, -1),
    ],
)  # fmt: skip
def test_the_compiled_body_itself_never_leaves_its_memory(at: int, value: object) -> None:
    args = [X, T, I, G, 3, 1, 2, 2, False, 1, 0]
    args[at] = value
    with pytest.raises(RuntimeError):
        torch.ops.sorahpc.flow_patchify(*args)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_pixel_walk_of_the_cuda_kernel_agrees_with_the_map(channels_last: bool, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (Debian: apt install g++)")
    program = tmp_path / "walk"
    root = Path(__file__).resolve().parent.parent
    source = root / "tests/csrc/flow_patchify_walk.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{root / 'csrc'}", source, "-o", program], check=True)
    wide = [(1, 1, 2**31 - 1)]  # pixels beyond 32 bits
    for patch in ((1, 2, 2), (1, 1, 1), (2, 3, 5), (3, 1, 7)):
        for pack in (*PACKS.values(), wide):
            numbers = [1 if pack is wide else 3, *patch, int(channels_last), *itertools.chain(*pack)]
            subprocess.run([program, *map(str, numbers)], check=True)
