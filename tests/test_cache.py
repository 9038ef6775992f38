"""The cache folder: one key, one plan, and an index that is whole, or an error that names file and field."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from caches import C, D, forge, info, write

from sorahpc.data.cache import INDEX, INFO, build_index, check_info, pin_info, plan_shards, read_info
from sorahpc.data.latents import LatentCache
from sorahpc.data.shards import ShardWriter
from sorahpc.errors import DataError


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("column", "value", "word"),
    [
        ("shard", "../../../etc/passwd", "not listed"),
        ("latent_offset", -1, "latent ends"),
        ("latent_offset", 1 << 62, "latent ends"),
        ("width", 1 << 20, "latent ends"),
        ("width", 1 << 62, "shapes"),
        ("width", 0, "shapes"),
        ("channels", C + 1, "shapes"),
        ("text_len", 0, "text"),
        ("text_len", 1 << 61, "text"),
        ("key", "not a key", "keys"),
        ("fps", float("nan"), "fps"),
        ("fps", 0.0, "fps"),
    ],
)
def test_hostile_values_in_the_index_are_refused_by_name(tmp_path: Path, column: str, value: object, word: str) -> None:
    write(tmp_path, count=4)
    forge(tmp_path, **{column: value})
    with pytest.raises(DataError, match=f"{INDEX}: .*{word}"):
        LatentCache(tmp_path)


def test_an_index_that_is_no_parquet_or_is_missing_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    (tmp_path / INDEX).write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match=r"not a whole Parquet file: .*encode"):
        LatentCache(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(DataError, match=r"isn't complete.*encode"):
        LatentCache(tmp_path)
    with pytest.raises(DataError, match="no latent cache here"):
        LatentCache(tmp_path / "nowhere")


def test_another_key_is_refused_by_field_with_both_values(tmp_path: Path) -> None:
    pin_info(tmp_path, info())
    pin_info(tmp_path, info())
    other = info()
    other["vae"] = {"id": "V", "weights_sha256": "c" * 64}
    other["clip"] = {"fps": 12.0, "max_frames": 17}
    with pytest.raises(DataError) as caught:
        pin_info(tmp_path, other)
    first, second = str(caught.value).splitlines()
    assert "field `vae.weights_sha256`" in first and "c" * 64 in first and "a" * 64 in first
    assert "field `clip.fps`: expected 12.0, found 8.0" in second
    assert read_info(tmp_path)["clip"]["fps"] == 8.0
    with pytest.raises(DataError, match="dtype"):
        check_info(tmp_path / INFO, read_info(tmp_path), {"dtype": "bfloat16"})


def test_a_field_that_a_cache_is_too_old_for_passes_and_is_held_against_all_that_have_it(tmp_path: Path) -> None:
    def of(config: str) -> dict:
        return {**info(), "vae": {**info()["vae"], "config_sha256": config * 64}}

    pin_info(tmp_path / "old", info())
    pin_info(tmp_path / "old", of("1"))
    assert read_info(tmp_path / "old")["vae"] == info()["vae"]  # it says no more than it knows
    pin_info(tmp_path / "new", of("1"))
    pin_info(tmp_path / "new", info())
    with pytest.raises(DataError, match=r"^\S+: field `vae.config_sha256`: expected \"2{64}\", found \"1{64}\"; use"):
        pin_info(tmp_path / "new", of("2"))


def test_of_many_workers_that_pin_at_once_one_wins_and_the_others_agree_or_are_refused(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def worker(dtype: str) -> None:
        try:
            pin_info(tmp_path, info(dtype))
            outcomes.append(dtype)
        except DataError as error:
            assert "field `dtype`" in str(error)

    threads = [threading.Thread(target=worker, args=(["float16", "bfloat16"][i % 2],)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert outcomes == [read_info(tmp_path)["dtype"]] * 8
    assert [p.name for p in tmp_path.iterdir()] == [INFO]


@pytest.mark.parametrize("text", ["[]", "{", '{"version": 1}', "", "[" * 100_000])
def test_a_broken_cache_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / INFO).write_text(text)
    with pytest.raises(DataError, match=INFO) as caught:
        LatentCache(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_shard_without_a_sample_is_written_and_keeps_the_reasons(tmp_path: Path) -> None:
    pin_info(tmp_path, info())
    name = plan_shards(["0" * 16], 4)[0].name
    writer = ShardWriter(tmp_path, name, "float16", C, {"text": D})
    writer.reject("0" * 16, "/videos/bad\n.mp4", "truncated:\n\0 half of it")
    writer.commit()
    summary = build_index(tmp_path, [name])
    assert summary is not None and summary.samples == 0
    assert summary.rejected == [{"key": "0" * 16, "source": "/videos/bad\\n.mp4", "reason": "truncated:   half of it"}]
    assert json.loads((tmp_path / "rejected.json").read_text()) == summary.rejected
    with pytest.raises(DataError, match="no sample"):
        LatentCache(tmp_path)


def test_the_index_waits_for_the_last_shard(tmp_path: Path) -> None:
    write(tmp_path, count=8)
    names = sorted(p.name for p in tmp_path.glob("shard-*.h5"))
    os.rename(tmp_path / names[0], tmp_path / "away")
    assert build_index(tmp_path, names) is None
    os.rename(tmp_path / "away", tmp_path / names[0])
    assert build_index(tmp_path, names).samples == 8


def test_the_plan_is_a_function_of_the_keys_in_their_order() -> None:
    keys: list[str | None] = [f"{i:016x}" for i in range(10)]
    plan = plan_shards(keys, 4)
    assert [s.rows for s in plan] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert plan == plan_shards(keys, 4)
    assert plan_shards([*keys, "f" * 16], 4)[:2] == plan[:2]
    assert plan_shards(keys[::-1], 4)[0].name != plan[0].name
    assert plan_shards([], 4) == []


def test_a_row_that_comes_or_goes_changes_its_own_shard_alone() -> None:
    keys: list[str | None] = [f"{i:016x}" for i in range(12)]
    plan = plan_shards(keys, 4)
    without = plan_shards([*keys[:5], None, *keys[6:]], 4)
    assert [s.rows for s in without] == [(0, 1, 2, 3), (4, 6, 7), (8, 9, 10, 11)]
    assert (without[0], without[2]) == (plan[0], plan[2]) and without[1].name != plan[1].name
    assert plan_shards([*keys[:4], None, None, None, None, *keys[8:]], 4) == [plan[0], plan[2]]
    assert plan_shards([None] * 9, 4) == []
