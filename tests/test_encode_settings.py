"""encode: a cache of other settings or models is refused by field, and stays as it is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import av
import pytest
from encode_jobs import content, encode_whole, prepared, task, write_broken_world

from sorahpc.config import Config
from sorahpc.data.cache import INFO
from sorahpc.data.latents import LatentCache
from sorahpc.errors import DataError
from sorahpc.jobs import encode
from sorahpc.models.text import make_tiny_t5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_broken_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    return encode_whole(world)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"clip": {"fps": 4, "max_frames": 9, "min_frames": 5, "max_area_px": 4096}}, "clip.fps"),
        ({"clip": {"fps": 8, "max_frames": 5, "min_frames": 5, "max_area_px": 4096}}, "clip.max_frames"),
        ({"encode": {"clips_per_shard": 3, "dtype": "bfloat16"}}, "dtype"),
        ({"model": {"depth": 1, "dim": 16, "num_heads": 2, "patch": [1, 2, 2]}}, "patch_hw"),
    ],
)
def test_other_settings_are_refused_by_field_and_change_nothing(
    world: Path, whole: dict[str, bytes], sections: dict, field: str
) -> None:
    config = prepared(world, "whole", **sections)
    with pytest.raises(DataError, match=rf"cache.json: field `{field}`: expected .*, found .*"):
        encode.run(config, task(config))
    assert content(config) == whole


def test_shards_of_another_size_are_refused_since_every_clip_would_be_encoded_anew(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def encode_by(size: int) -> Config:
        config = prepared(world, "sized", encode={"clips_per_shard": size, "cache": str(tmp_path / "cache")})
        encode.run(config, task(config))
        return config

    assert content(encode_by(3)) == whole == content(encode_by(3))
    with pytest.raises(DataError) as caught:
        encode_by(4)
    assert str(caught.value) == (
        f"{tmp_path}/cache: encode.clips_per_shard: expected 3, by which this run's shards there are cut, found 4, by "
        "which every clip would be encoded anew; set it back, or give a new encode.cache"
    )
    shutil.rmtree(tmp_path / "cache")  # nothing is left that would be made anew
    assert len(content(encode_by(4))) < len(whole)


def test_another_vae_or_text_encoder_is_refused_by_its_hash(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "vae").mkdir()
    state = load_file(world / "vae/diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.conv_s.bias"][0] += 1e-3
    save_file(state, tmp_path / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "vae/config.json").write_bytes((world / "vae/config.json").read_bytes())
    config = prepared(world, "whole", vae={"path": str(tmp_path / "vae")})
    with pytest.raises(DataError, match=r"field `vae.weights_sha256`: expected \"[0-9a-f]{64}\", found"):
        encode.run(config, task(config))
    make_tiny_t5(tmp_path / "t5", ["a red circle"], dim=16, seed=0)
    config = prepared(world, "whole", text={"path": str(tmp_path / "t5"), "max_tokens": 32})
    with pytest.raises(DataError, match=r"field `text.weights_sha256`"):
        encode.run(config, task(config))


def test_a_vae_of_the_same_weights_and_another_config_is_refused_but_by_a_cache_from_before_it_was_pinned(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(world / "vae", tmp_path / "vae")
    told = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**told, "resolution": 2 * told["resolution"]}))
    config = prepared(world, "whole", vae={"path": str(tmp_path / "vae")})
    with pytest.raises(DataError) as caught:
        encode.run(config, task(config))
    assert re.fullmatch(
        r"\S+/cache.json: field `vae.config_sha256`: expected \"[0-9a-f]{64}\", found \"[0-9a-f]{64}\"; use [^\n]*",
        str(caught.value),
    )
    assert content(config) == whole
    made = json.loads(whole[INFO])
    del made["vae"]["config_sha256"]
    for name, path in (("before", world / "vae"), ("before_other", tmp_path / "vae")):
        config = prepared(world, name, vae={"path": str(path)})
        config.cache_dir.mkdir(parents=True)
        (config.cache_dir / INFO).write_text(json.dumps(made))
        encode.run(config, task(config))
        assert json.loads((config.cache_dir / INFO).read_text()) == made and len(LatentCache(config.cache_dir)) == 13


def test_the_command_line_refuses_a_cache_of_another_vae_text_encoder_and_size_by_field_and_decodes_its_own(
    world: Path, whole: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from sorahpc.cli import main
    from sorahpc.configfile import dump_config

    config = prepared(world, "whole")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    key = LatentCache(config.cache_dir).keys[2]
    shutil.copytree(world / "vae", tmp_path / "vae")
    state = load_file(world / "vae/diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.conv_s.bias"][0] += 1e-3
    save_file(state, tmp_path / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    make_tiny_t5(tmp_path / "t5", ["a red circle"], dim=16, seed=0)
    other = [f"vae.path={tmp_path}/vae", f"text.path={tmp_path}/t5", "clip.max_area_px=2048"]
    assert main(["encode", str(tmp_path / "config.yaml"), *other]) == 4
    said = capfd.readouterr()
    for field in ("vae.weights_sha256", "text.weights_sha256", "clip.max_area_px"):
        assert f"cache.json: field `{field}`: expected" in said.out + said.err
    assert "Traceback" not in said.out + said.err and content(config) == whole

    show = ["cache", "show", str(config.cache_dir), key, "--out", str(tmp_path / "x.mp4"), "--json"]
    assert main([*show, "--vae", str(tmp_path / "vae")]) == 4
    assert "field `vae.weights_sha256`" in capfd.readouterr().err and not (tmp_path / "x.mp4").exists()
    assert main([*show, "--config", str(tmp_path / "config.yaml")]) == 0
    row = json.loads(capfd.readouterr().out)
    with av.open(str(tmp_path / "x.mp4")) as file:
        video = file.streams.video[0]
        size = (sum(1 for _ in file.decode(video)), video.height, video.width, video.average_rate)
    (_, _, h, w) = row["shape"]
    assert row["key"] == key and size == (row["frames"], 8 * h, 8 * w, 8)
    assert main(show) == 2 and main([*show[:3], "f" * 16, "--vae", str(world / "vae")]) == 4
    assert "no sample ffffffffffffffff among 13" in capfd.readouterr().err
