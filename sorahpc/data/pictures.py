"""From a decoded frame to the RGB picture that is meant: its colours, upright, of a wished size."""

from __future__ import annotations

import functools
import math
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from sorahpc.data.container import Unusable, ffmpeg_words

_AVCOL_SPC_UNSPECIFIED = 2  # as in a frame
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG
# x and y of red, green and blue, all with the white of D65. Narrow ones other than BT.709's are near enough to it.
_WIDE = {
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # P3, as phones and screens have it
}
_BT709, _D65 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)), (0.3127, 0.3290)
_WHITE_NITS = 203  # of HDR, which becomes white: ITU-R BT.2408
# Chroma interpolated instead of repeated: half the error at hard edges, for a tenth of the time.
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
SMALL = Interpolation.AREA  # of pictures that are only measured


# ---------------------------------------------------------------------------------------------------------------------
# colours


def is_unusual(frame: Any) -> bool:
    """HDR, or of a wide gamut."""
    return frame.color_trc in _HDR or frame.color_primaries in _WIDE


def colorspace_of(frame: Any) -> int:
    """The matrix that the stream flags; where it flags none, what players take."""
    return _usual_colorspace(frame) if frame.colorspace == _AVCOL_SPC_UNSPECIFIED else int(frame.colorspace)


def _usual_colorspace(frame: Any) -> int:
    """What players take where the stream flags none."""
    if frame.color_trc in _HDR or frame.color_primaries == ColorPrimaries.BT2020:
        return int(Colorspace.BT2020)
    hd = max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) >= 720
    return int(Colorspace.ITU709 if hd else Colorspace.ITU601)


def _ordinary(rgb: np.ndarray, trc: int, primaries: int) -> np.ndarray:
    """HDR or wide-gamut R'G'B', uint16 [H, W, 3], as ordinary video: BT.709 on the display of BT.1886, uint8.

    What is brighter than the reference white, or outside of BT.709's gamut, is cut off. FFmpeg's own conversion gives
    the same to a level, but takes seconds a clip to prepare.
    """
    light = _light(trc)[rgb]  # of the display, the white being 1; of HLG, of the scene
    matrix = _to_bt709(
        ColorPrimaries.BT2020 if primaries not in _WIDE and primaries != ColorPrimaries.BT709 else primaries
    )
    if trc == ColorTrc.ARIB_STD_B67:  # BT.2100's OOTF, for a display of 1,000 cd/m2
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (1000 / _WHITE_NITS * luminance**0.2)[..., None]
    light = np.clip(light @ matrix.T, 0, 1)
    return np.rint(255 * light ** (1 / 2.4)).astype(np.uint8)


@functools.cache
def _light(trc: int) -> np.ndarray:
    """The light of each of 65,536 code values, float32."""
    code = np.minimum(np.arange(1 << 16) / (255 << 8), 1)  # swscale's white, 255 in the upper byte
    if trc == ColorTrc.SMPTE2084:  # its EOTF
        root = code ** (32 / 2523)
        nits = 10_000 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        light = nits / _WHITE_NITS
    elif trc == ColorTrc.ARIB_STD_B67:  # BT.2100, the inverse OETF of HLG
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:
        light = code**2.4
    return light.astype(np.float32)


@functools.cache
def _to_bt709(primaries: int) -> np.ndarray:
    """Linear RGB of these primaries -> of BT.709, float32 [3, 3] (SMPTE RP 177)."""

    def to_xyz(corners: tuple[tuple[float, float], ...]) -> np.ndarray:
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in corners]).T
        white = np.array([_D65[0] / _D65[1], 1, (1 - sum(_D65)) / _D65[1]])
        scaled: np.ndarray = columns * np.linalg.solve(columns, white)
        return scaled

    return np.linalg.solve(to_xyz(_BT709), to_xyz(_WIDE.get(ColorPrimaries(primaries), _BT709))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# turning and scaling


def display_size(frame: Any, stream: Any) -> tuple[float, float]:
    """Width in square pixels and height, before rotation."""
    aspect = stream.sample_aspect_ratio
    if not aspect or not Fraction(1, 8) <= aspect <= 8:  # 0: unknown; beyond: nonsense
        aspect = 1
    return float(frame.width * aspect), float(frame.height)


def turn_of(frame: Any) -> tuple[int, bool]:
    """Quarter turns, counter-clockwise, after mirroring left to right, that make a decoded picture upright."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that PyAV doesn't know; it still tells the angle
        return round(frame.rotation / 90) % 4, False
    if matrix is None:
        return 0, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])  # (x, y) goes to (a x + c y, b x + d y), y down
    mirrored = a * d < b * c
    a, b = (-a, -b) if mirrored else (a, b)
    return round(math.degrees(math.atan2(-b, a)) / 90) % 4, mirrored


def pixels(
    frame: Any,
    turn: tuple[int, bool],
    stream: Any,
    size: tuple[int, int],
    reformatter: VideoReformatter,
    how: int = _INTERPOLATION,
) -> np.ndarray:
    """A frame as uint8 [H, W, 3] of this height and width: scaled to cover, cropped in the middle, upright.

    Raises:
        Unusable: it can't be converted.
    """
    quarters, mirrored = turn
    height, width = (size[1], size[0]) if quarters % 2 else size
    shown_w, shown_h = display_size(frame, stream)
    scale = max(width / shown_w, height / shown_h)
    scaled_w, scaled_h = max(width, round(shown_w * scale)), max(height, round(shown_h * scale))
    colorspace = None  # the frame's own
    if not frame.format.is_rgb and frame.colorspace == _AVCOL_SPC_UNSPECIFIED:
        colorspace = Colorspace(_usual_colorspace(frame))
    unusual = is_unusual(frame)
    try:
        rgb = reformatter.reformat(
            frame,
            width=scaled_w,
            height=scaled_h,
            format="rgb48le" if unusual else "rgb24",
            src_colorspace=colorspace,
            dst_color_range=ColorRange.JPEG,
            interpolation=how,
            threads=1,
        ).to_ndarray()
    except av.FFmpegError as error:
        raise Unusable(
            f"can't convert {frame.format.name} of matrix {frame.colorspace} to RGB: {ffmpeg_words(error)}"
        ) from None
    top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
    rgb = rgb[top : top + height, left : left + width]
    if unusual:
        rgb = _ordinary(rgb, frame.color_trc, frame.color_primaries)
    return np.rot90(rgb[:, ::-1] if mirrored else rgb, quarters)
