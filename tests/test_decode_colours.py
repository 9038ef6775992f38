"""decode: colours are converted as their matrix, range, transfer and primaries say."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from plans import at, plan, probed
from videos import claim_dolby_vision, numbered, recording, remuxed, write_video

from sorahpc.data.decode import VideoError, decode, probe
from sorahpc.data.mp4 import _yuv420p, write_mp4
from sorahpc.data.toyworld import COLOURS, render, scene_of


def _pq(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, the inverse EOTF."""
    y = (nits / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def _hlg(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, the inverse OOTF and the OETF of a grey on a display of 1,000 cd/m2."""
    e = (nits / 1000) ** (1 / 1.2)
    return np.where(
        e <= 1 / 12, np.sqrt(3 * e), 0.17883277 * np.log(np.maximum(12 * e - 0.28466892, 1e-9)) + 0.55991073
    )


def flagged(path: Path, levels: np.ndarray, trc: int, primaries: int, matrix: int = 9) -> Path:
    """One frame of 64 x 64 px of Y'CbCr [3] in [0, 1] and [-0.5, 0.5], in 10 bits, limited range, flagged so."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv444p10le"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc, context.color_primaries = matrix, 1, trc, primaries
        frame = av.VideoFrame(64, 64, "yuv444p10le")
        codes = np.rint(levels * (876, 896, 896) + (64, 512, 512)).astype(np.uint16)
        for plane, code in zip(frame.planes, codes, strict=True):
            plane.update(np.full(plane.buffer_size // 2, code, np.uint16).tobytes())
        frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = matrix, 1, trc, primaries
        frame.pts, frame.time_base = 0, Fraction(1, 8)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("trc", [16, 18])
@pytest.mark.parametrize("nits", [0, 1, 10, 50, 100, 180, 203, 600])
def test_hdr_is_shown_as_on_a_display_whose_white_is_the_reference_white(tmp_path: Path, trc: int, nits: int) -> None:
    code = float((_pq if trc == 16 else _hlg)(np.float64(nits)))
    path = flagged(tmp_path / "a.mkv", np.array([code, 0, 0]), trc, 9)
    assert probe(path).frames == 1
    expected = 255 * min(1, nits / 203) ** (1 / 2.4)  # BT.1886, the display of BT.709
    assert np.abs(decode(path, at(64, 64, 0)) - expected).max() <= 1.5  # a code of 10 bits is up to 1.3 levels wide


@pytest.mark.parametrize(("trc", "primaries"), [(16, 9), (18, 9), (1, 9), (16, 2)])
def test_hdr_and_the_widest_gamut_are_of_bt2020_where_no_matrix_is_flagged(
    tmp_path: Path, trc: int, primaries: int
) -> None:
    colour = np.array([0.45, -0.08, 0.12])
    said, unsaid = (flagged(tmp_path / f"{m}.mkv", colour, trc, primaries, m) for m in (9, 2))
    assert (decode(unsaid, at(64, 64, 0)) == decode(said, at(64, 64, 0))).all()


def test_colours_of_a_wide_gamut_keep_their_place_in_the_narrow_one(tmp_path: Path) -> None:
    to_2020 = np.array(  # ITU-R BT.2087, linear BT.709 to linear BT.2020
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    for rgb in [(0.7, 0.3, 0.2), (0.2, 0.7, 0.3), (0.25, 0.3, 0.7), (0.5, 0.5, 0.5)]:
        r, g, b = (to_2020 @ np.power(rgb, 2.4)) ** (1 / 2.4)
        y = 0.2627 * r + 0.6780 * g + 0.0593 * b
        path = flagged(tmp_path / "a.mkv", np.array([y, (b - y) / 1.8814, (r - y) / 1.4746]), 14, 9)
        assert np.abs(decode(path, at(64, 64, 0))[0, 9, 9] - 255 * np.array(rgb)).max() <= 1, rgb


@pytest.mark.parametrize(
    ("suffix", "codec", "profile", "compatibility", "refused"),
    [
        ("mp4", "libx265", 5, 0, True), ("mkv", "libx265", 5, 0, True), ("mp4", "libsvtav1", 10, 0, True),
        ("mp4", "libx265", 8, 1, False), ("mkv", "libx265", 8, 1, False), ("mp4", "libx265", 8, 4, False),
        ("mp4", "libx265", 7, 6, False), ("mp4", "libsvtav1", 10, 1, False),
        ("mp4", "libx265", 7, 0, False),  # as records were written before they told it
    ],
)  # fmt: skip
def test_dolby_vision_is_read_by_its_base_layer_or_refused_where_there_is_none(
    tmp_path: Path, suffix: str, codec: str, profile: int, compatibility: int, refused: bool
) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(3), codec=codec, pix_fmt="yuv420p10le", audio=True)
    expected = decode(path, at(64, 64, 0, 0.25))
    claim_dolby_vision(path, profile, compatibility)
    if suffix == "mkv":
        path = remuxed(path, tmp_path / "a.mkv")
    for use in (probe, lambda p: decode(p, at(64, 64, 0, 0.25))):
        if refused:
            with pytest.raises(VideoError, match=rf"^{path}: Dolby Vision profile {profile}: no picture for other dec"):
                use(path)
    if not refused:
        assert probe(path).frames == 3 and (decode(path, at(64, 64, 0, 0.25)) == expected).all()


def test_colours_that_can_not_be_converted_are_refused_by_prepare_already(tmp_path: Path) -> None:
    path = flagged(tmp_path / "a.mkv", np.array([0.5, 0.1, 0.1]), 1, 1, matrix=8)  # YCgCo
    with pytest.raises(VideoError, match="can't convert yuv444p10le of matrix 8 to RGB: "):
        probe(path)


@pytest.mark.parametrize(("colorspace", "size"), [(1, 64), (5, 64), (None, 64)])
def test_colours_are_converted_as_the_stream_flags_them(tmp_path: Path, colorspace: int | None, size: int) -> None:
    for name, rgb in COLOURS.items():
        frames = np.tile(np.array(rgb, np.uint8), (2, size, size, 1))
        path = write_video(tmp_path / f"{name}.mp4", frames, colorspace=colorspace, options={"crf": "1"})
        error = np.abs(decode(path, at(64, 64, 0)).astype(int) - frames[0]).max()
        assert error <= 4, (name, error)


# (Kr, Kb) of H.273's MatrixCoefficients, by their numbers there.
MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
            9: (0.2627, 0.0593)}  # fmt: skip


def lossless(path: Path, planes: list[np.ndarray], pix_fmt: str, matrix: int, full: bool) -> Path:
    """One frame of these planes, uint8 [H, W] each, flagged so."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width = planes[0].shape
        stream.pix_fmt = pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
        for plane, values in zip(frame.planes, planes, strict=True):
            padded = np.zeros((plane.height, plane.line_size), np.uint8)
            padded[:, : values.shape[1]] = values
            plane.update(padded.tobytes())
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        frame.pts, frame.time_base = 0, Fraction(1, 8)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_matrix_and_range_is_converted_as_its_formula_says(tmp_path: Path, matrix: int, full: bool) -> None:
    rng = np.random.default_rng(0)
    y, u, v = (rng.integers(16, top, (64, 64), np.uint8) for top in (236, 241, 241))
    got = decode(lossless(tmp_path / "a.mkv", [y, u, v], "yuv444p", matrix, full), at(64, 64, 0))[0]
    kr, kb = MATRICES[matrix]
    luma, blue, red = (y.astype(float), u - 128.0, v - 128.0)
    if not full:
        luma, blue, red = (luma - 16) * 255 / 219, blue * 255 / 224, red * 255 / 224
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    assert np.abs(got - np.clip(np.stack([r, g, b], -1), 0, 255)).max() <= 0.6  # half is rounding


@pytest.mark.parametrize("size", [(272, 640), (128, 304), (96, 96)])
@pytest.mark.parametrize(("matrix", "name"), [(1, "bt709"), (5, "bt601")])
@pytest.mark.parametrize(("full", "levels"), [(False, "tv"), (True, "pc")])
def test_real_pictures_are_scaled_and_converted_as_by_ffmpegs_own_filter(
    tmp_path: Path, size: tuple[int, int], matrix: int, name: str, full: bool, levels: str
) -> None:
    with av.open(str(recording("bikes"))) as container:
        frame = next(container.decode(video=0)).reformat(dst_colorspace=matrix, dst_color_range=2 if full else 1)
    planes = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes]
    path = lossless(tmp_path / "a.mkv", planes, "yuv420p", matrix, full)
    (height, width), scale = size, max(size[0] / 272, size[1] / 640)
    covering_h, covering_w = max(height, round(272 * scale)), max(width, round(640 * scale))
    with av.open(str(path)) as container:
        graph = Graph()
        source = graph.add_buffer(template=container.streams.video[0])
        scaler = graph.add(
            "scale",
            f"w={covering_w}:h={covering_h}:in_color_matrix={name}:in_range={levels}:out_range=pc:"
            "flags=bicubic+accurate_rnd+full_chroma_int",
        )
        rgb, sink = graph.add("format", "rgb24"), graph.add("buffersink")
        source.link_to(scaler)
        scaler.link_to(rgb)
        rgb.link_to(sink)
        graph.configure()
        graph.push(next(container.decode(video=0)))
        expected = graph.pull().to_ndarray()
    top, left = (covering_h - height) // 2, (covering_w - width) // 2
    assert (decode(path, at(*size, 0))[0] == expected[top : top + height, left : left + width]).all()


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p", {}),  # alpha is a stream of its own, beside the picture's
        ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("a.mkv", "ffv1", "bgra", {}),
        ("a.mkv", "ffv1", "yuva420p", {}),
        ("a.avi", "utvideo", "gbrap", {}),
    ],
)
def test_transparency_changes_no_colour(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, options: dict[str, str]
) -> None:
    y, x = np.mgrid[:64, :96]
    rgb = np.stack([255 - 2 * x, 40 + 2 * y, 60 + x + y], -1).astype(np.uint8)
    alpha = np.where(y < 32, 0, 5 * x % 256)[..., None]
    frames = np.concatenate([rgb, alpha], -1).astype(np.uint8)
    path = tmp_path / name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        stream.codec_context.colorspace = 1
        stream.codec_context.color_range = 1 if pix_fmt.startswith("yuv") else 2
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(frames, format="rgba").reformat(
                format=pix_fmt, dst_colorspace=1, dst_color_range=stream.codec_context.color_range
            )
            frame.pts, frame.time_base = i, Fraction(1, 8)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert "a" in next(container.decode(stream)).format.name or stream.metadata["alpha_mode"] == "1"
    assert probe(path).frames == 3
    for size in ((64, 96), (32, 48)):
        expected = rgb.reshape(size[0], 64 // size[0], size[1], 96 // size[1], 3).mean((1, 3))
        error = np.abs(decode(path, at(*size, 0.25))[0] - expected)
        assert error.mean() < 1.5 and error.max() <= 8, (error.mean(), error.max())


def test_unflagged_colours_are_read_as_players_do(tmp_path: Path) -> None:
    def unflagged(height: int, width: int) -> np.ndarray:
        path = tmp_path / f"{width}.mp4"
        frame = np.tile(np.array((30, 190, 50), np.uint8), (height, width, 1))
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_yuv420p(frame), format="yuv420p")))
            container.mux(stream.encode(None))
        return decode(path, at(64, 64, 0))[0, 32, 32].astype(int)

    assert np.abs(unflagged(720, 1280) - (30, 190, 50)).max() <= 3  # HD: BT.709, as it was written
    assert np.abs(unflagged(64, 64) - (30, 190, 50)).max() > 10  # small: BT.601, which it was not


def test_rendered_clips_come_back_as_rendered(tmp_path: Path) -> None:
    for i in range(6):
        scene = scene_of(5, i)
        frames = render(scene)
        write_mp4(tmp_path / "a.mp4", frames, scene.fps, crf=4)
        made = plan(probed(tmp_path / "a.mp4"))
        clip = decode(tmp_path / "a.mp4", made)
        assert clip.shape == frames.shape
        error = np.abs(clip.astype(int) - frames)
        assert error.mean() < 1.5 and np.percentile(error, 99) < 40  # 4:2:0 smears edges of colour
