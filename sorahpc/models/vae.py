"""Video autoencoders: any diffusers class with a 3D latent, and Open-Sora 1.2's, loaded from a local folder, behind one
small face.

The classes differ in their configs' words, in their strides and in which clip lengths they take; most cut a clip of a
wrong length silently. `Vae` knows each class's rule (vae_rules.py), refuses what breaks it, and checks the shape of
what comes out. Latents are the raw posterior mean: the cache normalises every class the same way, from measured
statistics. What the published models of a class normalise by (scaling factor, mean and std a channel) is `Vae.native`.
Nothing is scaled by it; measured statistics far from it tell of wrong weights or wrongly scaled pixels.

Weights are read from safetensors only: a pickle may run code. They lie in a folder as diffusers saves it, or in a
single file with that folder's config.json beside it, in diffusers' names or, for AutoencoderKLWan and
AutoencoderKLLTXVideo, in the names of the model's authors. Open-Sora's folder is read as its authors publish it.
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sorahpc.config import TilingConfig, config_hash
from sorahpc.errors import ConfigError, SetupError
from sorahpc.models.lengths import Lengths
from sorahpc.models.open_sora import PUBLISHED, OpenSoraVae, published_arch
from sorahpc.models.tiling import Cut, in_parts
from sorahpc.models.vae_rules import CLASSES, RULES, Native, Rule
from sorahpc.models.weights import read_config, sha256_files, weight_files
from sorahpc.store import resolve

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Vae:
    """An autoencoder with its rules. Made by `load_vae` or `build_vae`.

    Attributes:
        id: name of the class.
        channels: latent channels C.
        stride: (t, h, w): a latent frame covers t frames (the first one covers 1), a latent pixel covers h x w.
        lengths: the clip lengths that it takes, and their latent frames.
        weights_sha256: hex sha256 of the weights file, or of all of them in name order; "" for weights never saved.
        config_sha256: hex sha256 of the arguments that are not the class's defaults: with another activation, norm or
            causality the same weights give other latents.
        module: the module itself, for training.
        native: (mean, std), float32 [C or 1, F], by which the class's published models normalise: (z - mean) / std.
            F is 1, or one value a latent frame (Cosmos). None where the config has none, or, the constructor's
            defaults in a model of another size, not one a channel.
    """

    def __init__(
        self,
        module: Any,
        weights_sha256: str,
        dtype: torch.dtype,
        device: torch.device,
        tiling: TilingConfig | None = None,
    ) -> None:
        """Raises ConfigError, naming vae.tiling, where the class can't be cut so."""
        config = dict(module.config)
        self.id: str = type(module).__name__
        rule = RULES[self.id]
        temporal, spatial = rule.stride(config)
        keys = (rule.channels,) if isinstance(rule.channels, str) else rule.channels
        self.channels = int(functools.reduce(lambda part, key: part[key], keys, config))  # type: ignore[call-overload]
        self.stride = (int(temporal), int(spatial), int(spatial))
        self.lengths = Lengths(self.stride[0], int(rule.frames_unit(self.stride[0])), rule.restart(config))
        self.weights_sha256 = weights_sha256
        self.config_sha256 = _config_sha256(module)
        self.module = module
        for part in module.modules():
            if hasattr(part, "prepare_causal_attention_mask"):
                part.prepare_causal_attention_mask = _causal_mask
        self.dtype = dtype
        self.device = device
        # LTX from 0.9.5 on is a denoising decoder; its own pipeline decodes at timestep 0, without noise, by default.
        self._timestep = bool(config.get("timestep_conditioning"))
        native = rule.native(module)
        if native and not bool((native[0].isfinite() & native[1].isfinite() & (native[1] > 0)).all()):
            raise ValueError("latents_mean, latents_std and scaling_factor: finite, and above 0, expected")
        self.native: Native = native if native and len(native[0]) in (1, self.channels) else None
        self.tiling = tiling
        if tiling is not None:
            self._check_tiling(tiling, rule)

    @property
    def identity(self) -> dict[str, str]:
        """What a cache of its latents, and all that is made from one, know it by."""
        return {name: getattr(self, name) for name in ("id", "weights_sha256", "config_sha256")}

    @property
    def decode_args(self) -> tuple[torch.Tensor, ...]:
        """What the module's `decode` takes beside the latent."""
        return (torch.zeros(1, device=self.device, dtype=self.dtype),) if self._timestep else ()

    def _check_tiling(self, tiling: TilingConfig, rule: Rule) -> None:
        (t, h, _), faults = self.stride, []
        for name in ("tile_px", "overlap_px") if tiling.tile_px else ():
            value = getattr(tiling, name)
            if value % h:
                faults.append(
                    f"vae.tiling.{name}: {self.id} has a stride of {h} px: expected a multiple, found {value}"
                )
        if tiling.chunk_frames and rule.streams:
            faults.append(
                f"vae.tiling.chunk_frames: {self.id} goes through a clip piece by piece by itself, and loses nothing: "
                f"expected null, found {tiling.chunk_frames}"
            )
        elif tiling.chunk_frames:
            near = self.floor_frames(tiling.chunk_frames)
            if near != tiling.chunk_frames:
                found = f"found {tiling.chunk_frames}; nearest below: {near}"
                faults.append(f"vae.tiling.chunk_frames: {self.id} takes {self.lengths} frames, {found}")
            if tiling.overlap_frames % t != 1 % t:
                found = f"found {tiling.overlap_frames}; nearest below: {(tiling.overlap_frames - 1) // t * t + 1}"
                faults.append(f"vae.tiling.overlap_frames: {self.id} has a stride of {t}: expected {t}k+1, {found}")
            # HunyuanVideo cuts a long clip in chunks of 17 frames by itself, as published: not inside ours as well.
            for name in ("use_framewise_encoding", "use_framewise_decoding"):
                if hasattr(self.module, name):
                    setattr(self.module, name, False)
        if faults:
            raise ConfigError("\n".join(faults))

    def _cuts(self, grid: tuple[int, ...]) -> tuple[tuple[Cut, Cut, Cut], tuple[Cut, Cut, Cut]]:
        """The parts of a latent of `grid` (T,H,W) places: in those places, and in frames and pixels."""
        (t, h, w), how = self.stride, self.tiling or TilingConfig()
        chunk = (how.chunk_frames - 1) // t + 1 if how.chunk_frames else None
        places = (
            Cut.of(grid[0], chunk, (how.overlap_frames - 1) // t + 1),
            Cut.of(grid[1], how.tile_px and how.tile_px // h, how.overlap_px // h),
            Cut.of(grid[2], how.tile_px and how.tile_px // w, how.overlap_px // w),
        )
        whole = self.lengths.clip(grid[0])
        time = places[0].frames(t) if chunk else Cut(whole, whole, (0,))
        return places, (time, places[1].pixels(h), places[2].pixels(w))

    def floor_frames(self, frames: int) -> int:
        """The longest clip of at most `frames` (>= 1) frames that this class takes."""
        return self.lengths.floor(frames)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a clip's latent.

        Raises:
            ConfigError: the class doesn't take clips of this length or size.
        """
        _, h, w = self.stride
        if frames < 1 or self.floor_frames(frames) != frames or height < h or width < w or height % h or width % w:
            raise ConfigError(
                f"vae: {self.id} takes clips of {self.lengths} frames with sides in multiples of {h} px, found "
                f"{frames} frames of {width}x{height}; nearest below: {self.floor_frames(frames)} frames of "
                f"{max(width // w, 1) * w}x{max(height // h, 1) * h}"
            )
        return self.channels, self.lengths.latent(frames), height // h, width // w

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
        places, pixels = self._cuts(self.latent_shape(*frames.shape[:3])[1:])
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device)
            # Rounded to the dtype once: in bfloat16 a level more or less would be lost in x / 127.5, near 1.
            x = x.permute(3, 0, 1, 2).float().div_(127.5).sub_(1).to(self.dtype)
            try:
                return in_parts(x, pixels, places, self._encode_part).cpu().contiguous()
            except NotImplementedError as error:
                # torch says so where a kernel lacks the dtype (Haar patches in bfloat16 on the CPU, for one): the
                # user's choice, and ours to explain. In float32 there is nothing to change: a bug, with its traceback.
                if self.dtype is torch.float32:
                    raise
                first = (str(error).strip().splitlines() or ["no kernel"])[0][:300]
                raise ConfigError(
                    f"vae.dtype: {self.id} can't compute in {self.dtype} on {self.device.type} ({first}); use float32"
                ) from None

    def _encode_part(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.module.encode(x[None]).latent_dist.mode()[0]
        expected = self.latent_shape(*x.shape[1:])
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
        places, pixels = self._cuts(tuple(latent.shape[1:]))
        with torch.inference_mode():
            x = in_parts(latent.to(self.device, self.dtype), places, pixels, self._decode_part)
            x = ((x + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
            clip: np.ndarray = x.cpu().contiguous().numpy()
        return clip

    def _decode_part(self, z: torch.Tensor) -> torch.Tensor:
        (_, h, w), (frames, height, width) = self.stride, z.shape[1:]
        x: torch.Tensor = self.module.decode(z[None], *self.decode_args).sample[0]
        expected = (3, self.lengths.clip(frames), height * h, width * w)
        if tuple(x.shape) != expected:
            raise ConfigError(f"vae: {self.id} decoded {list(z.shape)} to {list(x.shape)}, not {list(expected)}")
        return x


def _causal_mask(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int | None = None
) -> torch.Tensor:
    """What a place of HunyuanVideo 1.5's attention sees, as its module asks for it: 0, or -inf for later frames.

    diffusers 0.42 fills it row by row, on a GPU a launch for each of a clip's ten thousands of places; and what it
    makes for a batch is read as for heads, so that two clips fail. Here [1, places, places], for all of a batch.
    """
    frame = torch.arange(n_frame, device=device).repeat_interleave(n_hw)
    mask = torch.zeros(len(frame), len(frame), dtype=dtype, device=device)
    return mask.masked_fill_(frame > frame[:, None], float("-inf"))[None]


def _config_sha256(module: Any) -> str:
    """Without the defaults: diffusers fills them in, and a younger one has more of them."""
    parameters = inspect.signature(type(module).__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name in module.config}
    as_read = [json.loads(json.dumps(dict(values))) for values in (module.config, defaults)]  # tuples to lists
    said = {k: v for k, v in as_read[0].items() if k[:1] != "_" and (k not in as_read[1] or v != as_read[1][k])}
    return config_hash(said)


def _class(name: Any, where: str) -> Any:
    """What makes a module of the class `name` from its arguments."""
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(f"{where}: expected one of {', '.join(CLASSES)}, found {name!r}")
    try:
        import diffusers  # a second of imports: only where a VAE is used
    except ImportError as error:
        raise SetupError(f"vae: diffusers can't be imported ({error}); pip install 'diffusers>=0.42,<0.43'") from None
    if name == OpenSoraVae.__name__:
        return functools.partial(OpenSoraVae, diffusers.AutoencoderKL)
    return getattr(diffusers, name)


def load_vae(
    path: str | Path,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    tiling: TilingConfig | None = None,
    where: str = "vae.path",
) -> Vae:
    """Load a video autoencoder, ready for inference.

    Args:
        path: a diffusers folder (config.json + safetensors), a .safetensors file with its config.json beside it, or
            a name of sorahpc.store.
        tiling: how it cuts what it encodes and decodes.
        where: the dotted key of the path, for messages.

    Raises:
        ConfigError: naming `where`: no such folder or file, a class that is not known here, weights that don't fit;
        naming vae.tiling: the class can't be cut so. SetupError: a name that isn't in the store.
    """
    path = resolve(Path(path), "vae", where)
    single = path.is_file()
    folder = path.parent if single else path
    if single and path.suffix != ".safetensors":
        raise ConfigError(f"{where}: {path}: weights are read from safetensors only")
    if not folder.is_dir() or (path.suffix == ".safetensors" and not path.exists()):
        raise ConfigError(
            f"{where}: no {'file' if path.suffix == '.safetensors' else 'folder'} {path}; expected a local diffusers "
            "autoencoder (config.json + safetensors)"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{where}: no config.json in {folder}; expected a local diffusers autoencoder")
    config = read_config(folder / "config.json", where)
    published = config.get("model_type") == PUBLISHED
    name = OpenSoraVae.__name__ if published else config.get("_class_name")
    cls = _class(name, f"{where}: {folder}/config.json: _class_name")
    files = [path] if single else weight_files(folder, "model.safetensors" if published else WEIGHTS, where)
    sha256 = sha256_files(files)
    torch_dtype = getattr(torch, dtype)
    try:
        if name == OpenSoraVae.__name__:
            arch = published_arch(config) if published else {k: v for k, v in config.items() if k[:1] != "_"}
            module, info = _from_files(cls(**arch), files, torch_dtype)
        elif single:
            module, info = _from_file(cls, path, torch_dtype, where)
        else:
            module, info = _from_folder(cls, folder, torch_dtype)
    except ConfigError:
        raise
    except Exception as error:  # what a broken folder raises is any of a dozen types, by the class
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: {path} doesn't load as {name}: {first[:300]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise ConfigError(
                f"{where}: {path}: {kind.replace('_', ' ')} between config.json and weights: "
                f"{len(info[kind])}, such as {sorted(map(str, info[kind]))[0]}"
            )
    module = module.to(device=device).eval().requires_grad_(False)
    try:
        return Vae(module, sha256, torch_dtype, torch.device(device), tiling)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:  # values that the class doesn't look at
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: {path}: values that {name} can't have: {first[:300]}") from error


def read_rule(path: str | Path, where: str = "vae.path") -> tuple[tuple[int, int, int], Lengths]:
    """Stride (t, h, w) and clip lengths of an autoencoder, from its config.json alone: no weights are read.

    Raises:
        ConfigError: no such folder or file, a class that is not known here, or a config that is not that class's.
        SetupError: a name that isn't in the store.
    """
    path = resolve(Path(path), "vae", where)
    folder = path.parent if path.is_file() else path
    config = read_config(folder / "config.json", where)
    published = config.get("model_type") == PUBLISHED
    name = OpenSoraVae.__name__ if published else config.get("_class_name")
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(f"{where}: {folder}/config.json: _class_name: expected one of {', '.join(CLASSES)}")
    try:
        config = published_arch(config) if published else config
        temporal, spatial = (int(stride) for stride in RULES[name].stride(config))
        lengths = Lengths(temporal, int(RULES[name].frames_unit(temporal)), RULES[name].restart(config))
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ConfigError(f"{where}: {folder}/config.json: not that of {name}: {error!r}") from None
    return (temporal, spatial, spatial), lengths


def _from_folder(cls: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    module, info = cls.from_pretrained(
        str(folder),
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        low_cpu_mem_usage=False,  # the other way needs another package, to save one copy of a small model
        output_loading_info=True,
    )
    return module, info


def _from_file(cls: Any, path: Path, dtype: torch.dtype, where: str) -> tuple[Any, dict[str, Any]]:
    """A module with the weights of a single file, in diffusers' names or in the authors' that diffusers can translate.

    Not by from_single_file, which leaves what the file lacks at random values, with a line in the log.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    from safetensors.torch import load_file

    config = cls.load_config(str(path.parent), local_files_only=True)
    module = cls.from_config(config)
    state, expected = load_file(path), module.state_dict()
    if not state.keys() & expected.keys():
        if cls.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
            raise ConfigError(
                f"{where}: {path}: its tensors (such as {next(iter(sorted(state)), 'none')}) don't have diffusers' "
                f"names, and {cls.__name__} can't be translated; use the folder that diffusers saves"
            )
        state = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"](config=config, checkpoint=state)
    return _with_state(module, state, dtype)


def _from_files(module: Any, files: list[Path], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A module with the weights of files in its own names."""
    from safetensors.torch import load_file

    return _with_state(module, {k: v for path in files for k, v in load_file(path).items()}, dtype)


def _with_state(module: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The module with that state, and what doesn't fit, in from_pretrained's words; then nothing was loaded."""
    expected = module.state_dict()
    faults = {
        "missing_keys": expected.keys() - state.keys(),
        "unexpected_keys": state.keys() - expected.keys(),
        "mismatched_keys": {k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape},
    }
    if not any(faults.values()):
        module.load_state_dict(state)
    return torch.nn.Module.to(module, dtype), faults  # diffusers' own `to` warns of modules it would rather keep


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
