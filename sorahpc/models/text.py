"""Text encoders: T5, umT5 and CLIP of transformers from a local folder, and a tiny random T5 for the toy world.

`load_texts` gives what a config asks for, as one: a caption's embeddings by their names in sorahpc.data.texts.

Weights are read from safetensors only, nothing is fetched, and no code of the folder is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sorahpc.config import TextConfig
from sorahpc.data.manifest import shown
from sorahpc.errors import ConfigError, SetupError
from sorahpc.models.weights import sha256_files, weight_files
from sorahpc.runs import atomic_write, read_json, write_json
from sorahpc.store import resolve

WEIGHTS, ADAPTER = "model.safetensors", "adapter_config.json"
_CLASSES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}  # model_type of config.json -> class
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_CLIP_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


class TextEncoder:
    """Caption -> embeddings of its tokens. Made by `load_text`.

    Attributes:
        id: name of the transformers class.
        dim: width of an embedding.
        weights_sha256: hex sha256 of the weights and of the tokenizer's files: other tokens are other embeddings.
        max_tokens: captions are cut to this many tokens, the closing eos among them.
    """

    def __init__(self, model: Any, tokenizer: Any, weights_sha256: str, max_tokens: int) -> None:
        self.id: str = type(model).__name__
        self.dim = int(model.config.d_model)
        self.weights_sha256 = weights_sha256
        self.max_tokens = max_tokens
        self._model, self._tokenizer = model, tokenizer

    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Embeddings of each caption: float32 [L_i, dim] on the CPU, without padding; the empty one has its eos.

        One caption a forward: a padded batch would be faster, but rounds differently by what else is in it, and then
        a cache would depend on how many workers made it.
        """
        out = []
        for text in captions:
            ids = _ids(self._tokenizer, text, self.max_tokens).to(self._model.device)
            with torch.inference_mode():
                hidden = self._model(input_ids=ids).last_hidden_state[0]
            out.append(hidden.float().cpu().contiguous())
        return out


class ClipEncoder:
    """Caption -> embeddings of its tokens and one of the whole. Made by `load_clip`.

    Attributes:
        id: name of the transformers class. dim: width of a token's embedding; pooled_dim: of the whole caption's.
        weights_sha256: as of TextEncoder.
        max_tokens: captions are cut to this many tokens, start and end among them: 77 in the published models.
    """

    def __init__(self, model: Any, tokenizer: Any, weights_sha256: str) -> None:
        self.id: str = type(model).__name__
        self._projects = hasattr(model, "text_projection")
        self.dim = int(model.config.hidden_size)
        self.pooled_dim = int(model.config.projection_dim) if self._projects else self.dim
        self.weights_sha256 = weights_sha256
        self.max_tokens = int(model.config.max_position_embeddings)
        self._model, self._tokenizer = model, tokenizer

    def encode(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each caption (float32 [L_i, dim], float32 [pooled_dim]) on the CPU, without padding.

        The first is the last hidden state, after the final norm; the second that of the closing token, projected where
        the class does. A token sees only those before it, so that without padding both are what they are with it.
        """
        out = []
        for text in captions:
            ids = _ids(self._tokenizer, text, self.max_tokens).to(self._model.device)
            with torch.inference_mode():
                found = self._model(input_ids=ids)
            pooled = found.text_embeds if self._projects else found.pooler_output
            out.append((found.last_hidden_state[0].float().cpu().contiguous(), pooled[0].float().cpu().contiguous()))
        return out


class TextEncoders:
    """A caption's embeddings by all encoders of a config. Made by `load_texts`.

    Attributes:
        t5, clip: the encoders; clip is None where the config has none.
        dims: of the embeddings, by name.
    """

    def __init__(self, t5: TextEncoder, clip: ClipEncoder | None) -> None:
        self.t5, self.clip = t5, clip
        self.dims = {"text": t5.dim}
        if clip is not None:
            self.dims |= {"clip_text": clip.dim, "clip_pooled": clip.pooled_dim}

    def encode(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Of each caption float32 [L,dim] by name, on the CPU, without padding."""
        out = [{"text": text} for text in self.t5.encode(captions)]
        if self.clip is not None:
            for texts, (tokens, pooled) in zip(out, self.clip.encode(captions), strict=True):
                texts |= {"clip_text": tokens, "clip_pooled": pooled[None]}
        return out

    def info(self) -> dict[str, Any]:
        """What names the encoders in cache.json, where a cache without CLIP says nothing of it."""
        out: dict[str, Any] = {"text": {"id": self.t5.id, "weights_sha256": self.t5.weights_sha256}}
        if self.clip is not None:
            out["clip_text"] = {"id": self.clip.id, "weights_sha256": self.clip.weights_sha256}
        return out | {f"{name}_dim": dim for name, dim in self.dims.items()}


def _ids(tokenizer: Any, text: str, max_tokens: int) -> torch.Tensor:
    # Lone surrogates (from a file name, say) are no UTF-8, and the tokenizer refuses them.
    clean = text.encode("utf-8", "replace").decode("utf-8")
    ids: torch.Tensor = tokenizer(clean, truncation=True, max_length=max_tokens, return_tensors="pt").input_ids
    return ids


def import_transformers() -> Any:
    """The library, without its remarks. Raises SetupError where it isn't installed."""
    try:
        import transformers  # seconds of imports: only where text is encoded
    except ImportError as error:
        raise SetupError(f"text: transformers can't be imported ({error}); pip install 'transformers>=5,<6'") from None
    transformers.logging.set_verbosity_error()  # its remarks and bars on every load are not the user's
    transformers.logging.disable_progress_bar()
    return transformers


def model_type(folder: Path, where: str) -> str:
    """What a model folder says it is, if transformers would load it from this folder alone.

    Raises:
        ConfigError: it says nothing, holds an adapter, or names code of another place; `where` is the folder's key.
    """
    if os.path.lexists(folder / ADAPTER):
        # Where peft is installed transformers applies it, or fetches the base model that it names; else it's left out.
        base = (read_json(folder / ADAPTER) or {}).get("base_model_name_or_path")
        of = f" for {shown(str(base))!r}" if base else ""
        raise ConfigError(
            f"{where}: {folder} holds an adapter of PEFT ({ADAPTER}){of}, expected a whole model; "
            "merge both (merge_and_unload, save_pretrained), or take the adapter's files away"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        if not isinstance(kind, str):
            raise TypeError
        _refuse_remote_kernels(config, folder, where)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{where}: no readable config.json with a model_type in {folder}") from None
    return kind


def _refuse_remote_kernels(config: Any, folder: Path, where: str) -> None:
    """A config may name a repository to fetch attention code from, which no `trust_remote_code` guards.

    Raises:
        ConfigError: it does, anywhere in it; `where` is the dotted key of the folder.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            if str(key).endswith("_implementation") and "/" in str(value):
                raise ConfigError(
                    f"{where}: {folder}/config.json: {shown(str(key))}: the name of an implementation expected, "
                    f"found {shown(str(value))!r}, code of another place; remove it"
                )
            _refuse_remote_kernels(value, folder, where)
    elif isinstance(config, list):
        for value in config:
            _refuse_remote_kernels(value, folder, where)


def load_text(
    path: str | Path, max_tokens: int = 256, dtype: str = "float32", device: str | torch.device = "cpu"
) -> TextEncoder:
    """Load a T5 or umT5 encoder with its tokenizer from a local folder.

    The tokenizer lies in the folder, or, as in the repositories of diffusers pipelines, in `tokenizer/` beside it.

    Raises:
        ConfigError: naming text.path: no such folder or file, another kind of model, weights that don't fit.
        SetupError: a name of sorahpc.store that isn't in it.
    """
    folder = resolve(Path(path), "text", "text.path")
    model, tokenizer, sha256 = _load(folder, "text.path", _CLASSES, _TOKENIZER_FILES, dtype)
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer, sha256, max_tokens)


def load_texts(section: TextConfig, device: str | torch.device = "cpu") -> TextEncoders:
    """All encoders of the section `text`. Raises as `load_text` and `load_clip`."""
    t5 = load_text(section.path, section.max_tokens, section.dtype, device)
    if section.clip is None:
        return TextEncoders(t5, None)
    return TextEncoders(t5, load_clip(section.clip.path, section.clip.projected, section.dtype, device))


def load_clip(
    path: str | Path, projected: bool = False, dtype: str = "float32", device: str | torch.device = "cpu"
) -> ClipEncoder:
    """Load CLIP's text encoder with its tokenizer from a local folder, of the encoder alone or of a whole CLIP.

    Args:
        projected: the pooled embedding goes through the projection to the space shared with images.

    Raises:
        ConfigError: naming text.clip.path: as `load_text`; a projection is asked for that the folder doesn't have.
        SetupError: a name of sorahpc.store that isn't in it.
    """
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    kinds = {"clip_text_model": name, "clip": name}
    folder = resolve(Path(path), "text", "text.clip.path")
    model, tokenizer, sha256 = _load(folder, "text.clip.path", kinds, _CLIP_TOKENIZER_FILES, dtype)
    return ClipEncoder(model.to(device).eval().requires_grad_(False), tokenizer, sha256)


def _load(
    folder: Path, where: str, classes: dict[str, str], tokenizer_files: tuple[str, ...], dtype: str
) -> tuple[Any, Any, str]:
    """(model, tokenizer, sha256 of the files of both) of a folder whose config.json has one of the model types."""
    if not folder.is_dir():
        raise ConfigError(
            f"{where}: no folder {folder}; expected a local {'/'.join(classes)} encoder (config.json, safetensors, "
            "tokenizer)"
        )
    kind = model_type(folder, where)
    if kind not in classes:
        raise ConfigError(
            f"{where}: model_type in {folder}/config.json: expected one of {', '.join(classes)}, found {kind!r}"
        )
    files = weight_files(folder, WEIGHTS, where)
    # In the repositories of pipelines `tokenizer` lies beside `text_encoder`, `tokenizer_2` beside `text_encoder_2`.
    beside = folder.name.replace("text_encoder", "tokenizer") if "text_encoder" in folder.name else "tokenizer"
    places = [folder, folder.parent / beside]
    place = next((p for p in places if any((p / name).is_file() for name in tokenizer_files)), None)
    if place is None:
        raise ConfigError(f"{where}: no {' or '.join(tokenizer_files)} in {folder} or in {places[1]}")
    sha256 = sha256_files([*files, *(place / n for n in tokenizer_files if (place / n).is_file())])
    transformers = import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(place), local_files_only=True, trust_remote_code=False
        )
        model, info = getattr(transformers, classes[kind]).from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # what a broken folder raises is any of a dozen types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: {folder} doesn't load as {classes[kind]}: {first[:300]}") from error
    # Unexpected keys are fine: a whole T5 has a decoder too, and a whole CLIP an image encoder.
    faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if faults:
        raise ConfigError(
            f"{where}: {folder}: the weights lack {len(faults)} tensors of {classes[kind]}, such as {faults[0]}"
        )
    return model, tokenizer, sha256


def make_tiny_t5(folder: str | Path, captions: Sequence[str], dim: int = 64, seed: int = 0) -> None:
    """Write a tiny T5 encoder with random weights, and a byte-level BPE tokenizer trained on the captions.

    Nothing is learnt, and nothing needs to be: a random T5 gives each word a random direction, in its context. The
    weights that write to the residual stream are scaled down, so that a token's own embedding is most of its output
    and its neighbours and place a tenth: what a small DiT needs is to tell `red` from `blue` wherever they stand.

    The same captions, dim and seed give the same bytes with the same libraries.

    Args:
        folder: where to; made if missing. config.json is written last: with it the folder is whole.
        captions: what the tokenizer is trained on; any other text is encoded too, in more tokens.
        dim: width of an embedding, a multiple of 16.

    Raises:
        ValueError: dim is no positive multiple of 16.
    """
    if dim < 16 or dim % 16:
        raise ValueError(f"dim: a positive multiple of 16, not {dim}")
    from safetensors.torch import save
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = Path(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        sorted(set(captions)),  # the result must not depend on their order
        trainers.BpeTrainer(
            vocab_size=1024,
            min_frequency=2,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])

    transformers = import_transformers()
    config = transformers.T5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=dim, d_kv=16, num_heads=dim // 16, d_ff=2 * dim, num_layers=2,
        relative_attention_num_buckets=16, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        pad_token_id=0, eos_token_id=1, architectures=["T5EncoderModel"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.T5EncoderModel(config)
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith((".o.weight", ".wo.weight")):
            value = value * 0.2
        if name != "encoder.embed_tokens.weight":  # the same tensor as shared.weight
            state[name] = value.contiguous()
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    atomic_write(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", {**names, "model_max_length": 512})
    write_json(folder / "config.json", config.to_dict())
