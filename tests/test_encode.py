"""encode: what it makes of the videos, what it says is not in the cache, and what a rerun does again."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_jobs import CLIPS, content, encode_whole, make_config, prepared, recorded, task, usable, write_broken_world
from videos import shots

from sorahpc.data.contents import list_samples
from sorahpc.data.decode import ClipPlan, decode
from sorahpc.data.latents import LatentCache
from sorahpc.data.maintenance import verify
from sorahpc.data.manifest import read_manifest, write_manifest
from sorahpc.data.toyworld import write_world
from sorahpc.errors import ConfigError, DataError, Stopped
from sorahpc.jobs import encode, prepare
from sorahpc.models.vae import load_vae
from sorahpc.runs import Task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_broken_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    return encode_whole(world)


def test_all_usable_clips_are_encoded_and_the_broken_one_is_named_with_its_reason(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = prepared(world, "named")
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config))
    cache = LatentCache(config.cache_dir)
    assert len(cache) == CLIPS - 1
    rejected = json.loads((config.cache_dir / "rejected.json").read_text())
    assert [Path(r["source"]).name for r in rejected] == ["000003.mp4"] and "corrupt" in rejected[0]["reason"]
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1 and "000003.mp4" in lines[0]
    assert "cache complete: 13 samples, 1 clips rejected" in caplog.text
    status = json.loads((config.run_dir / "jobs/encode/status/0.json").read_text())
    assert (status["done"], status["total"], status["unit"]) == (CLIPS, CLIPS, "clip")
    shapes = {tuple(s) for s in cache.shapes.tolist()}
    assert shapes <= {(4, 3, 8, 8), (4, 3, 6, 10), (4, 3, 10, 6)} and len(shapes) > 1
    assert cache.fps.tolist() == [8.0] * len(cache) and all(c.startswith("a ") for c in cache.captions)
    assert cache.info["vae"]["id"] == "AutoencoderKLCosmos" and cache.info["clip"]["max_frames"] == 9
    z, e = cache.read(0)
    assert z.abs().max() > 0 and e["text"].shape == (cache.text_lens[0], 16)


def test_the_text_and_the_latents_are_those_of_the_models_themselves(world: Path, whole: dict[str, bytes]) -> None:
    from sorahpc.models.text import load_text

    config = prepared(world, "whole")
    cache = LatentCache(config.cache_dir)
    text = load_text(config.text.path, 32)
    _, e = cache.read(5)
    assert torch.equal(e["text"], text.encode([cache.captions[5]])[0].half().float())
    assert torch.equal(cache.empty_texts["text"], text.encode([""])[0].half().float())


def test_a_rerun_does_only_what_is_missing(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "rerun")
    encode.run(config, task(config))
    encoded = recorded(monkeypatch)
    encode.run(config, task(config))
    assert encoded == []
    shard = sorted(config.cache_dir.glob("shard-*.h5"))[1]
    shard.unlink()
    encode.run(config, task(config))
    assert len(encoded) == 3 and content(config) == whole


def test_a_stop_between_clips_loses_none_and_goes_on_from_there(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "stopped")
    encoded = recorded(monkeypatch)
    looks = iter(range(100))
    with pytest.raises(Stopped, match="4 of 14 clips encoded"):
        encode.run(config, task(config, stop_requested=lambda: next(looks) == 4))
    assert len(list(config.cache_dir.glob("shard-*.h5"))) == 1
    encode.run(config, task(config))
    assert content(config) == whole and len(encoded) == len(set(encoded)) == CLIPS


def test_clips_in_a_journal_whose_files_have_moved_since_are_encoded_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "moved")
    looks = iter(range(100))
    with pytest.raises(Stopped, match="2 of 14 clips encoded"):
        encode.run(config, task(config, stop_requested=lambda: next(looks) == 2))
    (world / "elsewhere").symlink_to(world / "videos")
    rows = [replace(v, path=v.path.replace("/videos/", "/elsewhere/")) for v in usable(config)]
    write_manifest(config.run_dir / "manifest.parquet", rows)
    encoded = recorded(monkeypatch)
    encode.run(config, task(config))
    assert len(encoded) == CLIPS
    assert all("/elsewhere/" in source for source in LatentCache(config.cache_dir).index.sources)


def test_clips_are_decoded_and_shards_written_while_the_vae_is_at_work(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "overlap")
    decoding = [threading.Event() for _ in range(CLIPS + 2)]
    encoding = [threading.Event() for _ in range(CLIPS + 3)]
    order: list[str] = []
    decode, encode_one, commit = encode.decode_by, encode._encode, encode.ShardWriter.commit

    def decodes(by: str, path: str, *rest: object) -> object:
        order.append(path)
        decoding[len(order) - 1].set()
        return decode(by, path, *rest)  # type: ignore[arg-type]

    def encodes(video: object, *rest: object) -> object:
        done = sum(e.is_set() for e in encoding)
        encoding[done].set()
        if done < CLIPS - 2:
            assert decoding[done + 1].wait(30), "the next clip is not decoded meanwhile"
        return encode_one(video, *rest)  # type: ignore[arg-type]

    def commits(writer: object) -> object:
        done = sum(e.is_set() for e in encoding)
        if done < CLIPS:
            assert encoding[done].wait(30), "the next shard is not made meanwhile"
        return commit(writer)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "decode_by", decodes)
    monkeypatch.setattr(encode, "_encode", encodes)
    monkeypatch.setattr(encode.ShardWriter, "commit", commits)
    encode.run(config, task(config))
    assert content(config) == whole


def test_a_shard_says_who_read_each_video(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By DALI in name alone: what it gives is test_dali's affair."""
    import h5py

    config = prepared(world, "readers", encode={"clips_per_shard": 3, "decoder": "dali"})
    decode = encode.decode_by

    def decodes(by: str, path: str, *rest: object) -> tuple[np.ndarray, str]:
        assert by == "dali"
        return decode("pyav", path, *rest)[0], "pyav" if "000001" in path else "dali"  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "decode_by", decodes)
    monkeypatch.setattr(encode.dali, "installed", lambda: True)
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config))
    told = {}
    for path in config.cache_dir.glob("shard-*.h5"):
        with h5py.File(path) as f:
            told |= dict(zip(f["sources"].asstr(), f["decoders"].asstr(), strict=True))
    assert len(told) == CLIPS - 1 and {Path(s).name for s, by in told.items() if by == "pyav"} == {"000001.mp4"}
    assert {row["source"]: row["decoder"] for row in list_samples(config.cache_dir)} == told  # `cache ls --json`
    assert any("12 clips decoded by dali, 1 clips decoded by pyav" in m for m in caplog.messages)
    assert LatentCache(config.cache_dir).info["decoder"] == "dali"
    with pytest.raises(DataError, match=r"field `decoder`"):
        encode.run(prepared(world, "readers"), task(config))
    with h5py.File(min(prepared(world, "whole").cache_dir.glob("shard-*.h5"))) as f:
        assert "decoders" not in f


def test_each_scene_of_a_video_is_a_sample(world: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = shots(tmp_path / "videos/film.mp4", (50, 60, 70))
    (tmp_path / "videos/film.txt").write_text("three shots")
    config = make_config(
        world, "scenes", prepare={"videos": str(tmp_path / "videos"), "scenes": {}}, encode={"clips_per_shard": 2}
    )
    prepare.run(config, Task(config.run_dir, "prepare"))
    encode.run(config, task(config))
    rows, cache = read_manifest(config.run_dir / "manifest.parquet"), LatentCache(config.cache_dir)
    assert [(v.start_s, v.end_s) for v in rows] == [(0, 6.25), (6.25, 13.75), (13.75, 22.5)]
    assert sorted(cache.keys) == sorted(v.key for v in rows) and set(cache.sources) == {str(path)}
    vae = load_vae(world / "vae")
    for video in rows:
        times = tuple(video.start_s + i / 8 for i in range(9))
        pixels = decode(path, ClipPlan((0.0, *times), 64, 64))[1:]  # the whole file is read
        z, _ = cache.read(cache.keys.index(video.key))
        assert torch.equal(z.float(), vae.encode(pixels).half().float()), video.start_s
    assert not verify(config.cache_dir).faults


def test_if_no_clip_can_be_encoded_the_job_fails_and_names_them(world: Path) -> None:
    config = prepared(world, "none", clip={"fps": 8, "max_frames": 97, "min_frames": 97, "max_area_px": 4096})
    with pytest.raises(DataError, match=r"none of 14 clips could be encoded: .*000000.mp4: too short"):
        encode.run(config, task(config))


def test_no_manifest_or_no_models_is_one_line(world: Path) -> None:
    config = make_config(world, "empty")
    with pytest.raises(DataError, match="sorahpc prepare"):
        encode.run(config, task(config))
    config = prepared(world, "novae", vae={"path": str(world / "nowhere")})
    with pytest.raises(ConfigError, match=r"^vae.path: no folder"):
        encode.run(config, task(config))


def test_the_manifest_may_grow_and_only_the_last_shard_is_made_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "grown")
    videos = read_manifest(config.run_dir / "manifest.parquet")
    ok = [v for v in videos if v.ok]
    write_manifest(config.run_dir / "manifest.parquet", ok[:7])
    encode.run(config, task(config))
    assert len(LatentCache(config.cache_dir)) == 6  # one of the seven is the broken one
    write_manifest(config.run_dir / "manifest.parquet", ok)
    encoded = recorded(monkeypatch)
    encode.run(config, task(config))
    assert encoded == [v.key for v in ok[6:]]
    assert LatentCache(config.cache_dir).keys == [v.key for v in ok if "000003" not in v.path]


def test_a_video_that_becomes_usable_in_the_middle_makes_only_its_own_shard_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_world(tmp_path / "videos", 9, seed=2)
    late = tmp_path / "videos/000004.txt"
    words = late.read_text()
    late.unlink()
    config = make_config(world, "middle", prepare={"videos": str(tmp_path / "videos")})
    prepare.run(config, Task(config.run_dir, "prepare"))
    encode.run(config, task(config))
    before = content(config)
    late.write_text(words)
    prepare.run(config, Task(config.run_dir, "prepare"))
    encoded = recorded(monkeypatch)
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config))
    keys = [v.key for v in read_manifest(config.run_dir / "manifest.parquet")]
    assert encoded == keys[3:6]
    assert LatentCache(config.cache_dir).keys == keys
    shards = {name: data for name, data in before.items() if name.startswith("shard-")}
    assert len(shards) == 3 and shards.items() <= content(config).items()  # what was there is left alone
    assert [m for m in caplog.messages if "not of this manifest" in m] == [
        f"1 shards in {config.cache_dir} are not of this manifest; left alone, no longer read"
    ]


@pytest.mark.gpu
def test_on_cuda_in_bfloat16_the_latents_are_near_those_of_the_cpu_and_the_same_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"encode": {"clips_per_shard": 3, "decoder": "pyav"}}
    low = {**sections, "vae": {"path": str(world / "vae"), "dtype": "bfloat16"}}
    config, again = prepared(world, "cuda", **low), prepared(world, "cuda_again", **low)
    for run in (config, again):
        encode.run(run, task(run))
    assert content(config) == content(again)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = prepared(world, "on_cpu", **sections)
    encode.run(on_cpu, task(on_cpu))
    here, there = LatentCache(config.cache_dir), LatentCache(on_cpu.cache_dir)
    assert here.keys == there.keys
    for i in range(len(here)):
        a, b = here.read(i)[0], there.read(i)[0]
        assert (a - b).abs().max() < 0.1 * b.abs().max()
