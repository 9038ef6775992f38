"""Video autoencoders: any diffusers class with a 3D latent, loaded from a local folder, behind one small face.

The classes differ in their configs' words, in their strides and in which clip lengths they take; most cut a clip of a
wrong length silently. `Vae` knows each class's rule, refuses what breaks it, and checks the shape of what comes out.
Latents are the raw posterior mean: what a class does to normalise (scaling factors, latents_mean) is left out on
purpose, since the cache normalises every class the same way from measured statistics.

Weights are read from safetensors only: a pickle may run code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sorahpc.errors import ConfigError, SetupError

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_JSON_BYTES = 64 << 20  # an index of shards is some hundred kB; more is not ours


@dataclass(frozen=True)
class _Rule:
    """How a class's config says its latent channels and its stride, and the unit u of the clip lengths k u + 1."""

    channels: str
    stride: Callable[[dict[str, Any]], tuple[int, int]]  # config -> (temporal, spatial)
    frames_unit: Callable[[int], int] = lambda temporal: temporal


def _by_ratio(config: dict[str, Any]) -> tuple[int, int]:
    return config["temporal_compression_ratio"], config["spatial_compression_ratio"]


def _wan(config: dict[str, Any]) -> tuple[int, int]:
    return 2 ** sum(config["temperal_downsample"]), 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)


def _ltx(config: dict[str, Any]) -> tuple[int, int]:
    halvings = sum(config["spatio_temporal_scaling"])
    return (
        config.get("temporal_compression_ratio") or config["patch_size_t"] * 2**halvings,
        config.get("spatial_compression_ratio") or config["patch_size"] * 2**halvings,
    )


def _cogvideox(config: dict[str, Any]) -> tuple[int, int]:
    return int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)


# From the constructors of diffusers 0.42. CogVideoX works on 8 frames at a time whatever its stride: 5 frames come
# back as 8, so its unit is twice its stride.
_RULES = {
    "AutoencoderKLCogVideoX": _Rule("latent_channels", _cogvideox, lambda temporal: 2 * temporal),
    "AutoencoderKLCosmos": _Rule("latent_channels", _by_ratio),
    "AutoencoderKLHunyuanVideo": _Rule("latent_channels", _by_ratio),
    "AutoencoderKLHunyuanVideo15": _Rule("latent_channels", _by_ratio),
    "AutoencoderKLKVAEVideo": _Rule(
        "z_channels", lambda c: (c["temporal_compress_times"], 2 ** (len(c["ch_mult"]) - 1))
    ),
    "AutoencoderKLLTXVideo": _Rule("latent_channels", _ltx),
    "AutoencoderKLMagvit": _Rule(
        "latent_channels", lambda c: (2 ** (len(c["block_out_channels"]) - 2), 2 ** (len(c["block_out_channels"]) - 1))
    ),
    "AutoencoderKLMochi": _Rule(
        "latent_channels", lambda c: (math.prod(c["temporal_expansions"]), math.prod(c["spatial_expansions"]))
    ),
    "AutoencoderKLQwenImage": _Rule("z_dim", _wan),
    "AutoencoderKLWan": _Rule("z_dim", _wan),
}
CLASSES = tuple(sorted(_RULES))


class Vae:
    """An autoencoder with its rules. Made by `load_vae` or `build_vae`.

    Attributes:
        id: name of the diffusers class.
        channels: latent channels C.
        stride: (t, h, w): a latent frame covers t frames (the first one covers 1), a latent pixel covers h x w.
        weights_sha256: hex sha256 of the weights file, or of all of them in name order; "" for weights never saved.
        module: the diffusers module, for training.
    """

    def __init__(self, module: Any, weights_sha256: str, dtype: torch.dtype, device: torch.device) -> None:
        config = dict(module.config)
        self.id: str = type(module).__name__
        rule = _RULES[self.id]
        temporal, spatial = rule.stride(config)
        self.channels = int(config[rule.channels])
        self.stride = (int(temporal), int(spatial), int(spatial))
        self.frames_unit = int(rule.frames_unit(self.stride[0]))
        self.weights_sha256 = weights_sha256
        self.module = module
        self.dtype = dtype
        self.device = device
        # LTX from 0.9.5 on is a denoising decoder; its own pipeline decodes at timestep 0, without noise, by default.
        self._decode_args = (torch.zeros(1, device=device, dtype=dtype),) if config.get("timestep_conditioning") else ()

    def floor_frames(self, frames: int) -> int:
        """The longest clip of at most `frames` (>= 1) frames that this class takes."""
        return max(frames - 1, 0) // self.frames_unit * self.frames_unit + 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a clip's latent.

        Raises:
            ConfigError: the class doesn't take clips of this length or size.
        """
        t, h, w = self.stride
        if frames < 1 or self.floor_frames(frames) != frames or height < h or width < w or height % h or width % w:
            raise ConfigError(
                f"vae: {self.id} takes clips of {self.frames_unit}k+1 frames with sides in multiples of {h} px, found "
                f"{frames} frames of {width}x{height}; nearest below: {self.floor_frames(frames)} frames of "
                f"{max(width // w, 1) * w}x{max(height // h, 1) * h}"
            )
        return self.channels, (frames - 1) // t + 1, height // h, width // w

    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """Clip -> latent.

        Args:
            frames: uint8 [T,H,W,3], RGB.

        Returns:
            float32 [C,T,H,W] on the CPU: the raw posterior mean.

        Raises:
            ValueError: not such a clip. ConfigError: the class takes no clip of this length or size, can't compute in
            vae.dtype, or makes a latent of another shape than its config says.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"uint8 [T,H,W,3] expected, found {frames.dtype} {list(frames.shape)}")
        expected = self.latent_shape(*frames.shape[:3])
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)
            x = x.permute(3, 0, 1, 2)[None].to(self.dtype) / 127.5 - 1
            try:
                z = self.module.encode(x).latent_dist.mode()[0].float().cpu().contiguous()
            except NotImplementedError as error:
                # torch says so where a kernel lacks the dtype (Haar patches in bfloat16 on the CPU, for one): the
                # user's choice, and ours to explain. In float32 there is nothing to change: a bug, with its traceback.
                if self.dtype is torch.float32:
                    raise
                first = (str(error).strip().splitlines() or ["no kernel"])[0][:300]
                raise ConfigError(
                    f"vae.dtype: {self.id} can't compute in {self.dtype} on {self.device.type} ({first}); use float32"
                ) from None
        if tuple(z.shape) != expected:
            raise ConfigError(
                f"vae.path: {self.id} made a latent {list(z.shape)} where its config says {list(expected)}; "
                "its config.json doesn't belong to a whole model of that stride"
            )
        return z

    def decode(self, latent: torch.Tensor) -> np.ndarray:
        """Raw latent [C,T,H,W], any float dtype and device -> frames uint8 [T,H,W,3].

        Raises:
            ValueError: not such a latent. ConfigError: the class decoded it to another length or size than its rule.
        """
        if latent.ndim != 4 or latent.shape[0] != self.channels:
            raise ValueError(f"[C,T,H,W] with C = {self.channels} expected, found {list(latent.shape)}")
        (t, h, w), (frames, height, width) = self.stride, latent.shape[1:]
        with torch.inference_mode():
            x = self.module.decode(latent[None].to(self.device, self.dtype), *self._decode_args).sample[0]
            x = ((x.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
            clip = x.cpu().contiguous().numpy()
        expected = ((frames - 1) * t + 1, height * h, width * w, 3)
        if clip.shape != expected:
            raise ConfigError(
                f"vae: {self.id} decoded {list(latent.shape)} to {list(clip.shape)}, not {list(expected)}"
            )
        return clip


def _class(name: Any, where: str) -> Any:
    if not isinstance(name, str) or name not in _RULES:
        raise ConfigError(f"{where}: expected one of {', '.join(CLASSES)}, found {name!r}")
    try:
        import diffusers  # a second of imports: only where a VAE is used
    except ImportError as error:
        raise SetupError(f"vae: diffusers can't be imported ({error}); pip install 'diffusers>=0.42,<0.43'") from None
    return getattr(diffusers, name)


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{where}: {path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({error})"
        raise ConfigError(f"{where}: can't read {path}: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {path} holds {type(value).__name__}, a mapping expected")
    return value


def weight_files(folder: Path, name: str, where: str) -> list[Path]:
    """The safetensors files of a model folder: `name`, or the shards that `name`.index.json lists.

    Raises:
        ConfigError: naming `where` (the dotted key of the folder) and the file that is missing.
    """
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        raise ConfigError(f"{where}: no {name} in {folder}; weights are read from safetensors only")
    weight_map = _read_json(index, where).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    for shard in names:
        if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
            raise ConfigError(f"{where}: {index} lists {shard!r}, which is no file in {folder}")
    if not names:
        raise ConfigError(f"{where}: {index} lists no weights")
    return [folder / shard for shard in names]


def sha256_files(paths: list[Path]) -> str:
    """Hex sha256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_vae(path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> Vae:
    """Load a diffusers video autoencoder from a local folder (config.json + safetensors), ready for inference.

    Raises:
        ConfigError: naming vae.path: no such folder or file, a class that is not known here, weights that don't fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"vae.path: no folder {folder}; expected a local diffusers autoencoder (config.json + safetensors)"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"vae.path: no config.json in {folder}; expected a local diffusers autoencoder")
    cls = _class(
        _read_json(folder / "config.json", "vae.path").get("_class_name"),
        f"vae.path: {folder}/config.json: _class_name",
    )
    files = weight_files(folder, WEIGHTS, "vae.path")
    sha256 = sha256_files(files)
    torch_dtype = getattr(torch, dtype)
    try:
        module, info = cls.from_pretrained(
            str(folder),
            torch_dtype=torch_dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # the other way needs another package, to save one copy of a small model
            output_loading_info=True,
        )
    except Exception as error:  # what a broken folder raises is any of a dozen types, by the class
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"vae.path: {folder} doesn't load as {cls.__name__}: {first[:300]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise ConfigError(
                f"vae.path: {folder}: {kind.replace('_', ' ')} between config.json and weights: "
                f"{len(info[kind])}, such as {sorted(map(str, info[kind]))[0]}"
            )
    module = module.to(device=device).eval().requires_grad_(False)
    return Vae(module, sha256, torch_dtype, torch.device(device))


def build_vae(class_name: str, arch: dict[str, Any], where: str = "train_vae") -> Vae:
    """An autoencoder with random weights (torch's global generator), in float32 on the CPU, to be trained.

    Raises:
        ConfigError: naming `where`.class_name or `where`.arch.
    """
    cls = _class(class_name, f"{where}.class_name")
    try:
        module = cls(**arch)
        return Vae(module.float(), "", torch.float32, torch.device("cpu"))
    except Exception as error:  # any of a dozen types, by the class and the fault
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}.arch: {class_name} refuses it: {type(error).__name__}: {first[:300]}") from error


def save_vae(vae: Vae, state: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and the weights `state`, rounded to `dtype`, as `load_vae` reads them. Each file atomically."""
    from safetensors.torch import save

    from sorahpc.runs import atomic_write, write_json

    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in state.items()}
    config = {k: v for k, v in dict(vae.module.config).items() if k != "_name_or_path" and k != "_use_default_values"}
    atomic_write(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", {"_class_name": vae.id, **config})
