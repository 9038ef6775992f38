"""Text encoders: local, deterministic, and words that a small model can tell apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import write_clip
from safetensors.torch import load_file, save_file

from sorahpc.data.toyworld import caption, scene_of
from sorahpc.errors import ConfigError
from sorahpc.models.text import load_clip, load_text, make_tiny_t5

CAPTIONS = [caption(scene_of(0, i)) for i in range(288)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    make_tiny_t5(folder, CAPTIONS, dim=64, seed=3)
    return folder


def test_the_tiny_t5_has_the_same_bytes_for_the_same_seed_and_captions_in_any_order(tiny: Path, tmp_path: Path) -> None:
    make_tiny_t5(tmp_path / "a", CAPTIONS[::-1], dim=64, seed=3)
    make_tiny_t5(tmp_path / "b", CAPTIONS, dim=64, seed=4)
    for path in sorted(tiny.iterdir()):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name
    assert (tiny / "model.safetensors").read_bytes() != (tmp_path / "b" / "model.safetensors").read_bytes()


def test_embeddings_are_unpadded_float32_with_an_eos_and_do_not_depend_on_their_neighbours(tiny: Path) -> None:
    text = load_text(tiny, max_tokens=32)
    assert text.id == "T5EncoderModel" and text.dim == 64 and len(text.weights_sha256) == 64
    both = text.encode(
        ["a small red circle moves left slowly", "", "a large blue square moves up fast, bounces off the wall"]
    )
    assert [tuple(x.shape) for x in both] == [(8, 64), (1, 64), (13, 64)]
    assert all(x.dtype == torch.float32 and x.device.type == "cpu" for x in both)
    assert torch.equal(text.encode(["a small red circle moves left slowly"])[0], both[0])


def test_captions_are_cut_at_max_tokens_and_keep_their_eos(tiny: Path) -> None:
    text = load_text(tiny, max_tokens=5)
    (cut,) = text.encode(["red " * 100])
    assert tuple(cut.shape) == (5, 64)
    (eos,) = text.encode([""])
    assert torch.cosine_similarity(cut[-1], eos[0], dim=0) > 0.9


def test_any_text_can_be_encoded(tiny: Path) -> None:
    text = load_text(tiny, max_tokens=64)
    for line in ["Ein Zebra 🦓 in Öl", "\0\x1b\ud800", "x" * 100_000, "\n\n", "</s> <pad>"]:
        (x,) = text.encode([line])
        assert 1 <= len(x) <= 64 and torch.isfinite(x).all()


def test_a_word_keeps_its_embedding_in_any_context_and_differs_from_every_other_word(tiny: Path) -> None:
    """A random T5 has nothing to offer but that: the same word within 0.98, two words under 0.5 of cosine."""
    text = load_text(tiny)
    words = "red yellow green cyan blue magenta".split()
    frames = ["a small {} circle moves left slowly", "a large {} triangle moves up fast, bounces off the wall"]
    x = torch.stack([text.encode([f.format(w) for w in words])[i][2] for f in frames for i in range(len(words))])
    assert abs(x.square().mean().sqrt().item() - 1) < 0.05  # the unit scale that fp16 and a linear layer like
    cosine = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(x, dim=-1).T
    same = torch.arange(len(x)) % len(words)
    alike = same[:, None] == same[None, :]
    assert cosine[alike].min() > 0.98 and cosine[~alike].abs().max() < 0.5


def test_the_tokenizer_is_part_of_the_encoders_hash(tiny: Path, tmp_path: Path) -> None:
    make_tiny_t5(tmp_path, CAPTIONS[:5], dim=64, seed=3)
    before = load_text(tmp_path).weights_sha256
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    assert load_text(tmp_path).weights_sha256 != before


def test_the_layout_of_pipelines_with_the_tokenizer_beside_the_encoder_loads_too(tiny: Path, tmp_path: Path) -> None:
    for name, place in (("config.json", "text_encoder"), ("model.safetensors", "text_encoder"),
                        ("tokenizer.json", "tokenizer"), ("tokenizer_config.json", "tokenizer")):  # fmt: skip
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / name).write_bytes((tiny / name).read_bytes())
    a, b = load_text(tmp_path / "text_encoder"), load_text(tiny)
    assert a.weights_sha256 == b.weights_sha256
    assert torch.equal(a.encode(["a red circle"])[0], b.encode(["a red circle"])[0])


def test_umt5_loads_by_the_same_code(tiny: Path, tmp_path: Path) -> None:
    import transformers

    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = transformers.UMT5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_heads=4, num_layers=1, is_encoder_decoder=False
    )
    transformers.UMT5EncoderModel(config).save_pretrained(tmp_path)
    text = load_text(tmp_path)
    assert text.id == "UMT5EncoderModel" and text.encode(["a red circle"])[0].shape[1] == 32


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "no folder"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "expected one of t5, umt5, found 'bert'"),
        (lambda f: (f / "config.json").write_text('{"model_type": []}'), "no readable config.json with a model_type"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "t5", "attn_implementation": "who/kernel"}'),
            "found 'who/kernel', code of another place",
        ),
        (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "t5"}'), "adapter .* for 't5'"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "one of them expected"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "safetensors only"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04nonsense"), "doesn't load"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json or spiece.model"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "doesn't load"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_one_line_that_names_the_key(tiny: Path, tmp_path: Path, spoil: object, word: str) -> None:
    folder = tmp_path / "t5"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=word) as caught:
        load_text(folder)
    assert str(caught.value).startswith("text.path: ") and "\n" not in str(caught.value)


def test_weights_that_lack_a_tensor_are_refused(tiny: Path, tmp_path: Path) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    name = next(n for n in state if n.endswith("wo.weight"))
    save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"lack 1 tensors of T5EncoderModel, such as {name}"):
        load_text(tmp_path)


def test_a_dim_that_heads_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        make_tiny_t5(tmp_path, CAPTIONS, dim=40)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


@pytest.mark.parametrize(
    ("cls", "projected", "pooled_dim"),
    [
        ("CLIPTextModel", False, 16),
        ("CLIPTextModelWithProjection", True, 12),
        ("CLIPTextModelWithProjection", False, 16),
        ("CLIPModel", True, 12),
        ("CLIPModel", False, 16),
    ],
)
def test_clip_gives_unpadded_tokens_and_a_pooled_vector_that_padding_would_not_change(
    tmp_path: Path, cls: str, projected: bool, pooled_dim: int
) -> None:
    import transformers

    clip = load_clip(write_clip(tmp_path, CAPTIONS, cls), projected)
    assert (clip.dim, clip.pooled_dim, clip.max_tokens) == (16, pooled_dim, 20)
    assert clip.id == ("CLIPTextModelWithProjection" if projected else "CLIPTextModel")
    long = "a large blue square moves up fast, bounces off the wall, a large blue square moves up fast, and on and on"
    found = clip.encode(["a red circle", "", long])
    assert [len(hidden) for hidden, _ in found][1:] == [2, 20]
    state = load_file(tmp_path / "model.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, (hidden, pooled) in zip(["a red circle", "", long], found, strict=True):
        assert hidden.dtype == pooled.dtype == torch.float32 and tuple(pooled.shape) == (pooled_dim,)
        # Independently: the closing token's place is the last, the projection a matrix without bias.
        expected = hidden[-1] @ state["text_projection.weight"].T if projected else hidden[-1]
        torch.testing.assert_close(pooled, expected)
        padded = tokenizer(text, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
        with torch.inference_mode():
            whole = clip._model(**padded).last_hidden_state[0, : len(hidden)]
        torch.testing.assert_close(hidden, whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(clip.encode(["a red circle"])[0][1], found[0][1])


def test_the_second_encoder_of_a_pipeline_finds_its_own_tokenizer(tmp_path: Path) -> None:
    write_clip(tmp_path / "made", CAPTIONS)
    make_tiny_t5(tmp_path / "tokenizer", CAPTIONS[:5], dim=16)  # of the first encoder
    for path in (tmp_path / "made").iterdir():
        place = tmp_path / ("tokenizer_2" if "token" in path.name else "text_encoder_2")
        place.mkdir(exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    a, b = load_clip(tmp_path / "text_encoder_2"), load_clip(tmp_path / "made")
    assert a.weights_sha256 == b.weights_sha256
    assert torch.equal(a.encode(["a red circle"])[0][1], b.encode(["a red circle"])[0][1])


def test_a_clip_that_is_none_or_lacks_the_projection_is_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^text\.clip\.path: model_type .*expected one of clip_text_model, clip, found 't5'$"
    ):
        load_clip(tiny)
    write_clip(tmp_path, CAPTIONS)
    with pytest.raises(
        ConfigError, match=r"^text\.clip\.path: .*lack 1 tensors of CLIPTextModelWithProjection, such as text_"
    ):
        load_clip(tmp_path, projected=True)
