"""patchify and unpatchify: compiled against reference against a third, written here; gradients, graphs, edges."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import LEVELS, run_at_level
from torch import Tensor

from sorahpc import ops
from sorahpc.errors import SetupError
from sorahpc.ops import _library
from sorahpc.ops._library import LIBRARY

ROOT = Path(__file__).resolve().parent.parent

PACKS = {
    "one sample": [(2, 3, 4)],
    "one token": [(1, 1, 1)],
    "one frame": [(1, 5, 3)],
    "odd sizes": [(3, 5, 7), (1, 1, 9), (5, 1, 1)],
    "ragged": [(4, 2, 3), (1, 8, 8), (2, 3, 1), (1, 1, 1), (7, 2, 2)],
    "many samples": [(1, 1 + i % 3, 1 + i % 5) for i in range(500)],
    "empty": [],
}
PATCHES = [(1, 2, 2), (1, 1, 1), (2, 3, 5), (1, 4, 4), (4, 1, 16), (1, 1, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

compiled_only = pytest.mark.skipif(not LIBRARY.is_file(), reason="sorahpc._ops is not built (make build)")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def grids_of(pack: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(pack, dtype=torch.int64).view(-1, 3)


def make(
    pack: list[tuple[int, int, int]],
    channels: int,
    patch: tuple[int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Flat latents of which no two elements are equal as long as the dtype can tell, and grids."""
    numel = sum(t * h * w for t, h, w in pack) * channels * patch[0] * patch[1] * patch[2]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # Counted in bit patterns that are finite in every dtype: equality of numbers is then equality of bits.
    return (torch.arange(numel) % 0x7000).to(bits).view(dtype).to(device), grids_of(pack)


def by_loops(
    latents: Tensor, pack: list[tuple[int, int, int]], c: int, patch: tuple[int, int, int], last: bool
) -> Tensor:
    """Token by token, slicing the latent: nothing shared with the reference's permutation."""
    pt, ph, pw = patch
    tokens, begin = [], 0
    for t, h, w in pack:
        size = c * t * pt * h * ph * w * pw
        z = latents[begin : begin + size].view(c, t * pt, h * ph, w * pw)
        begin += size
        for i, j, k in itertools.product(range(t), range(h), range(w)):
            cube = z[:, i * pt : (i + 1) * pt, j * ph : (j + 1) * ph, k * pw : (k + 1) * pw]
            tokens.append((cube.movedim(0, -1) if last else cube).reshape(-1))
    return torch.stack(tokens) if tokens else latents.new_empty(0, c * pt * ph * pw)


@compiled_only
@devices
def test_what_is_tested_here_is_the_compiled_op(device: str) -> None:
    live = ops.backend()
    assert live["library"] == str(LIBRARY)
    assert live["ops"]["patchify"][device] == live["ops"]["unpatchify"][device] == "compiled"


def test_it_works_unbuilt_and_says_so(tmp_path: Path) -> None:
    """A copy of the package without its libraries, as SORAHPC_NATIVE=0 installs it."""
    shutil.copytree(ROOT / "sorahpc", tmp_path / "sorahpc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = """if True:
        import torch
        from sorahpc import ops
        live = ops.backend()
        assert live["library"] is None and live["build"] is None, live
        assert live["ops"]["patchify"] == {"cpu": "reference", "cuda": "reference"}, live
        x, grids = torch.arange(24.0), torch.tensor([[1, 2, 1], [1, 1, 4]])
        y = x.clone().requires_grad_()
        tokens = ops.patchify(y, grids, 1, (1, 2, 2))
        tokens.square().sum().backward()
        assert torch.equal(y.grad, 2 * x) and torch.equal(ops.unpatchify(tokens, grids, 1, (1, 2, 2)), x)
        torch.library.opcheck(torch.ops.sorahpc.patchify.default, (y, grids, 1, 1, 2, 2, False))
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sorahpc._ops is not built") == 1


@compiled_only
def test_a_library_built_for_another_schema_is_refused_before_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_compiled", {"patchify": "patchify(Tensor latents) -> Tensor"})
    with pytest.raises(SetupError, match=r"built for `patchify\(Tensor latents\) -> Tensor`.*make build"):
        _library.define(
            "patchify(Tensor latents, Tensor grids) -> Tensor",
            reference=torch.clone,
            fake=torch.clone,
            setup_context=lambda *_: None,
            backward=lambda *_: None,
        )


@devices
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_compiled_reference_and_loops_agree_to_the_bit(
    pack: list[tuple[int, int, int]], patch: tuple[int, int, int], channels_last: bool, device: str
) -> None:
    latents, grids = make(pack, 3, patch, torch.float32, device)
    expected = by_loops(latents, pack, 3, patch, channels_last)
    tokens = ops.patchify(latents, grids, 3, patch, channels_last)
    back = ops.unpatchify(tokens, grids, 3, patch, channels_last)
    with ops.use_reference():
        assert torch.equal(ops.patchify(latents, grids, 3, patch, channels_last), expected)
        assert torch.equal(ops.unpatchify(expected, grids, 3, patch, channels_last), latents)
    assert torch.equal(tokens, expected) and tokens.shape == expected.shape
    assert torch.equal(back, latents)


@devices
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_moves_unchanged(dtype: torch.dtype, channels_last: bool, device: str) -> None:
    pack = PACKS["ragged"]
    latents, grids = make(pack, 4, (1, 2, 2), dtype, device)
    tokens = ops.patchify(latents, grids, 4, (1, 2, 2), channels_last)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, by_loops(latents, pack, 4, (1, 2, 2), channels_last))
    assert torch.equal(ops.unpatchify(tokens, grids, 4, (1, 2, 2), channels_last), latents)


def test_nan_payloads_and_infinities_survive() -> None:
    bits = torch.tensor([0x7F800001, 0x7FC01234, -1, 0x7F800000], dtype=torch.int32)
    tokens = ops.patchify(bits.view(torch.float32), grids_of([(1, 1, 1)]), 1, (1, 2, 2))
    assert torch.equal(tokens.view(torch.int32).flatten(), bits)


@settings(max_examples=60, deadline=None)
@given(
    pack=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)), max_size=6),
    channels=st.integers(1, 5),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_pack_goes_there_and_back(
    pack: list[tuple[int, int, int]],
    channels: int,
    patch: tuple[int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    latents, grids = make(pack, channels, patch, dtype)
    tokens = ops.patchify(latents, grids, channels, patch, channels_last)
    assert torch.equal(tokens, by_loops(latents, pack, channels, patch, channels_last))
    assert torch.equal(ops.unpatchify(tokens, grids, channels, patch, channels_last), latents)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    pack = [(3, 40, 64), (1, 7, 5), (9, 16, 16)] * 4  # past the 64 k elements at which the kernel takes a second thread
    latents, grids = make(pack, 4, (1, 2, 2), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.patchify(latents, grids, 4, (1, 2, 2)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(ops.unpatchify(results[0], grids, 4, (1, 2, 2)), latents)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (1, 4, 4), (2, 3, 5)], ids=str)
def test_a_result_larger_than_the_caches_is_the_same(
    patch: tuple[int, int, int], channels_last: bool, dtype: torch.dtype
) -> None:
    """Past 16 MiB it is put together in a thread's own memory, and from there written around the caches."""
    for channels in (16, 5):  # tokens of whole cache lines, and not
        size = channels * math.prod(patch) * dtype.itemsize
        frames = 1 + (9 << 20) // (21 * 52 * size)
        pack = [(frames, 21, 52), (1, 1, 1), (1 + 2 * frames, 14, 39), (1, 3, 700)]  # the last: one row is a unit
        latents, grids = make(pack, channels, patch, dtype)
        assert latents.nbytes > 16 << 20  # STREAM_BYTES of csrc/ops/common.h
        tokens = ops.patchify(latents, grids, channels, patch, channels_last)
        with ops.use_reference():
            assert torch.equal(tokens, ops.patchify(latents, grids, channels, patch, channels_last))
        assert torch.equal(ops.unpatchify(tokens, grids, channels, patch, channels_last), latents)


CHECK_A_LEVEL = """if True:
    import itertools
    import test_ops_patchify as t
    for dtype, patch, last in itertools.product(t.DTYPES, t.PATCHES, (False, True)):
        for channels, pack in ((3, t.PACKS["ragged"]), (16, [(2, 9, 37), (1, 3, 16)])):
            latents, grids = t.make(pack, channels, patch, dtype)
            tokens = t.ops.patchify(latents, grids, channels, patch, last)
            assert t.torch.equal(tokens, t.by_loops(latents, pack, channels, patch, last)), (dtype, patch, last)
            assert t.torch.equal(t.ops.unpatchify(tokens, grids, channels, patch, last), latents), (dtype, patch, last)
    for dtype in (t.torch.bfloat16, t.torch.float32):
        for patch in ((1, 2, 2), (2, 3, 5)):
            t.test_a_result_larger_than_the_caches_is_the_same(patch, False, dtype)
    print("checked")
"""


@compiled_only
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_the_cpu_kernels_is_right(level: str) -> None:
    assert "checked" in run_at_level(level, CHECK_A_LEVEL)


@devices
def test_inputs_that_are_not_contiguous_are_taken(device: str) -> None:
    latents, grids = make([(2, 3, 4)], 2, (1, 2, 2), torch.float32, device)
    strided = torch.stack([latents, -latents], 1)[:, 0]
    assert not strided.is_contiguous()
    tokens = ops.patchify(strided, grids, 2, (1, 2, 2))
    assert torch.equal(tokens, ops.patchify(latents, grids, 2, (1, 2, 2)))
    assert torch.equal(ops.unpatchify(tokens.t().contiguous().t(), grids, 2, (1, 2, 2)), latents)
    columns = grids.t().contiguous().t()
    assert torch.equal(ops.patchify(latents, columns, 2, (1, 2, 2)), tokens)


@pytest.mark.slow
def test_places_beyond_two_to_the_31_elements() -> None:
    """10 GB: zeros with a thousand ones, most of them beyond, and behind them a sample that comes out as alone."""
    H, W, few = 8192, 20_000, torch.randn(4, 2, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    grids, size = grids_of([(1, H, W), (2, 3, 4)]), 4 * 2 * H * 2 * W
    assert size > 2**31
    latents = torch.zeros(size + few.numel(), dtype=torch.bfloat16)
    latents[size:] = few.flatten()
    ones = torch.randint(size - 2**29, size, (1000,), generator=torch.Generator().manual_seed(1)).unique()
    latents[ones] = 1
    tokens = ops.patchify(latents, grids, 4, (1, 2, 2))
    c, y, x = ones // (4 * H * W), ones // (2 * W) % (2 * H), ones % (2 * W)
    assert bool((tokens[y // 2 * W + x // 2, c * 4 + y % 2 * 2 + x % 2] == 1).all())
    assert int(tokens[: H * W].count_nonzero()) == len(ones)
    assert torch.equal(tokens[H * W :], ops.patchify(few.flatten(), grids[1:], 4, (1, 2, 2)))
    del latents
    back = ops.unpatchify(tokens, grids, 4, (1, 2, 2))
    assert torch.equal(back[size:], few.flatten())
    assert bool((back[ones] == 1).all()) and int(back[:size].count_nonzero()) == len(ones)


def test_the_result_is_new_memory_even_where_nothing_moves() -> None:
    latents, grids = make([(1, 1, 3)], 1, (1, 1, 1), torch.float32)
    for context in (ops.use_reference, None):
        if context is None:
            tokens = ops.patchify(latents, grids, 1, (1, 1, 1))
        else:
            with context():
                tokens = ops.patchify(latents, grids, 1, (1, 1, 1))
        assert tokens.data_ptr() != latents.data_ptr()


@devices
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", ["patchify", "unpatchify"])
def test_torch_finds_the_registration_sound(op: str, channels_last: bool, device: str) -> None:
    latents, grids = make(PACKS["ragged"], 2, (1, 2, 3), torch.float32, device)
    x = latents if op == "patchify" else latents.view(-1, 12)
    args = (x.clone().requires_grad_(), grids, 2, 1, 2, 3, channels_last)
    torch.library.opcheck(getattr(torch.ops.sorahpc, op).default, args)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_exact_in_float64_to_the_second_order(channels_last: bool) -> None:
    pack = [(2, 1, 3), (1, 2, 2)]
    latents = torch.randn(10 * 2 * 1 * 2 * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grids = grids_of(pack)

    def there(x: Tensor) -> Tensor:
        return ops.patchify(x, grids, 2, (1, 2, 2), channels_last)

    def back(x: Tensor) -> Tensor:
        return ops.unpatchify(x, grids, 2, (1, 2, 2), channels_last)

    assert torch.autograd.gradcheck(there, (latents.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(back, (there(latents).requires_grad_(),))
    assert torch.autograd.gradgradcheck(there, (latents.clone().requires_grad_(),))


@devices
def test_the_gradient_is_the_adjoint_and_equals_the_references(device: str) -> None:
    latents, grids = make(PACKS["ragged"], 3, (2, 2, 2), torch.float32, device)
    weight = torch.randn(len(latents) // 24, 24, generator=torch.Generator().manual_seed(1)).to(device)
    grads = []
    for reference in (False, True):
        x = latents.clone().requires_grad_()
        if reference:
            with ops.use_reference():
                (ops.patchify(x, grids, 3, (2, 2, 2)) * weight).sum().backward()
        else:
            (ops.patchify(x, grids, 3, (2, 2, 2)) * weight).sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], ops.unpatchify(weight, grids, 3, (2, 2, 2)))
    # An expanded gradient, as of a plain sum, has no memory of its own.
    x = latents.clone().requires_grad_()
    ops.patchify(x, grids, 3, (2, 2, 2)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@devices
def test_it_compiles_into_one_graph_for_packs_of_any_size(device: str) -> None:
    torch._dynamo.reset()

    def step(latents: Tensor, grids: Tensor) -> Tensor:
        tokens = ops.patchify(latents * 2, grids, 3, (1, 2, 2))
        return ops.unpatchify(tokens + 1, grids, 3, (1, 2, 2))

    graph = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("ragged", "one frame", "odd sizes"):
        latents, grids = make(PACKS[name], 3, (1, 2, 2), torch.float32, device)
        x, y = latents.clone().requires_grad_(), latents.clone().requires_grad_()
        got, expected = graph(x, grids), step(y, grids)
        assert torch.equal(got, expected)
        got.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x.grad, y.grad)
    with pytest.raises((RuntimeError, ValueError), match="grids"):
        graph(latents, grids_of([(1, 1, 1)]))


X, G = torch.zeros(48), grids_of([(1, 2, 2)])  # 4 tokens of 3 x 1x2x2


@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
@pytest.mark.parametrize(
    ("message", "args"),
    {
        "grids have 4 tokens of 12 elements = 48, the input has 47": (X[:47], G, 3, (1, 2, 2)),
        "grids have 5 tokens": (X, grids_of([(1, 2, 2), (1, 1, 1)]), 3, (1, 2, 2)),
        "grids have 0 tokens": (X, grids_of([]), 3, (1, 2, 2)),
        "grids have 12300": (X, grids_of([(2**31 - 1, 2**31 - 1, 2**31 - 1), (1, 2, 2)]), 3, (1, 2, 2)),
        r"grid \(0, 2, 2\)": (X, grids_of([(1, 2, 2), (0, 2, 2)]), 3, (1, 2, 2)),
        r"grid \(-1, 2, -2\)": (X, grids_of([(-1, 2, -2)]), 3, (1, 2, 2)),
        "latents is torch.int32": (X.int(), G, 3, (1, 2, 2)),
        "latents is torch.complex64": (X.to(torch.complex64), G, 3, (1, 2, 2)),
        r"shape \(4, 12\), expected one flat dim": (X.view(4, 12), G, 3, (1, 2, 2)),
        r"grids is torch.int32 on cpu of shape \(1, 3\)": (X, G.int(), 3, (1, 2, 2)),
        r"of shape \(3,\), expected int64 on cpu \[S, 3\]": (X, G[0], 3, (1, 2, 2)),
        "grids is torch.int64 on meta": (X, G.to("meta"), 3, (1, 2, 2)),
        r"channels 0, expected a whole number from 1": (X, G, 0, (1, 2, 2)),
        r"patch \(1, 2\),": (X, G, 3, (1, 2)),
        r"patch \(1, 0, 2\): size 0, expected a whole number from 1": (X, G, 3, (1, 0, 2)),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_misfit_is_one_valueerror_with_the_numbers(message: str, args: tuple, reference: bool) -> None:
    if message == "grids have 12300":
        message = f"grids have {(2**31 - 1) ** 3 + 4} tokens"
    with pytest.raises(ValueError, match=message) as caught:
        if reference:
            with ops.use_reference():
                ops.patchify(*args)
        else:
            ops.patchify(*args)
    assert "\n" not in str(caught.value)


def test_unpatchify_refuses_tokens_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"tokens has shape \(6, 8\), expected \[L, 12\]"):
        ops.unpatchify(X.view(6, 8), G, 3, (1, 2, 2))


@compiled_only
@pytest.mark.parametrize(
    "grids",
    [[(1, 2, 3)], [(1, 2, 1)], [(-1, -2, 2)], [(2**31 - 1, 2**31 - 1, 4)], [(2**62, 4, 1)], [(1, 2, 2), (1, 1, 1)], []],
    ids=str,
)
def test_the_compiled_body_itself_never_leaves_its_memory(grids: list[tuple[int, int, int]]) -> None:
    """What reaches it without our checks, as from a compiled graph."""
    for op, x in ((torch.ops.sorahpc.patchify, X), (torch.ops.sorahpc.unpatchify, X.view(4, 12))):
        with pytest.raises(RuntimeError, match="grids"):
            op(x, grids_of(grids), 3, 1, 2, 2, False)
    with pytest.raises(RuntimeError, match="channels"):
        torch.ops.sorahpc.patchify(X, G, 2**62, 1, 2, 2, False)
    with pytest.raises(RuntimeError, match="channels"):
        torch.ops.sorahpc.patchify(X, G, 3, 1, -2, 2, False)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_index_math_of_the_cuda_kernel_agrees_with_the_cpu_kernel(channels_last: bool, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (Debian: apt install g++)")
    program = tmp_path / "maps"
    source = ROOT / "tests/csrc/patchify_maps.cpp"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wno-psabi", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True
    )
    for patch in PATCHES:
        for pack in PACKS.values():
            numbers = [3, *patch, int(channels_last), *itertools.chain(*pack)]
            subprocess.run([program, *map(str, numbers)], check=True)
