"""Text encoders: T5 and umT5 of transformers from a local folder, and a tiny random T5 for the toy world.

Weights are read from safetensors only, nothing is fetched, and no code of the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sorahpc.errors import ConfigError, SetupError
from sorahpc.models.vae import sha256_files, weight_files
from sorahpc.runs import atomic_write, write_json
from sorahpc.store import resolve

WEIGHTS = "model.safetensors"
_CLASSES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}  # model_type of config.json -> class
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


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
            # Lone surrogates (from a file name, say) are no UTF-8, and the tokenizer refuses them.
            clean = text.encode("utf-8", "replace").decode("utf-8")
            ids = self._tokenizer(clean, truncation=True, max_length=self.max_tokens, return_tensors="pt").input_ids
            with torch.inference_mode():
                hidden = self._model(input_ids=ids.to(self._model.device)).last_hidden_state[0]
            out.append(hidden.float().cpu().contiguous())
        return out


def _transformers() -> Any:
    try:
        import transformers  # seconds of imports: only where text is encoded
    except ImportError as error:
        raise SetupError(f"text: transformers can't be imported ({error}); pip install 'transformers>=5,<6'") from None
    transformers.logging.set_verbosity_error()  # its remarks and bars on every load are not the user's
    transformers.logging.disable_progress_bar()
    return transformers


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
    if not folder.is_dir():
        raise ConfigError(
            f"text.path: no folder {folder}; expected a local T5 encoder (config.json, safetensors, tokenizer)"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"text.path: no readable config.json with a model_type in {folder}") from None
    if kind not in _CLASSES:
        raise ConfigError(
            f"text.path: model_type in {folder}/config.json: expected one of {', '.join(_CLASSES)}, found {kind!r}"
        )
    files = weight_files(folder, WEIGHTS, "text.path")
    places = [folder, folder.parent / "tokenizer"]
    place = next((p for p in places if any((p / name).is_file() for name in _TOKENIZER_FILES)), None)
    if place is None:
        raise ConfigError(f"text.path: no {' or '.join(_TOKENIZER_FILES)} in {folder} or in {places[1]}")
    sha256 = sha256_files([*files, *(place / n for n in _TOKENIZER_FILES if (place / n).is_file())])
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(place), local_files_only=True, trust_remote_code=False
        )
        model, info = getattr(transformers, _CLASSES[kind]).from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # what a broken folder raises is any of a dozen types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"text.path: {folder} doesn't load as {_CLASSES[kind]}: {first[:300]}") from error
    # Unexpected keys are fine: a whole T5 has a decoder too.
    faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if faults:
        raise ConfigError(
            f"text.path: {folder}: the weights lack {len(faults)} tensors of config.json, such as {faults[0]}"
        )
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer, sha256, max_tokens)


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

    transformers = _transformers()
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
