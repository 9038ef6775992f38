"""merge: several caches become the one that one manifest would have given, or none."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from caches import C, D, content, info, part_of, samples, write

from sorahpc.data.cache import INDEX, INFO, build_index, pin_info, plan_shards
from sorahpc.data.maintenance import verify
from sorahpc.data.merge import merge
from sorahpc.data.shards import ShardWriter, write_empty_text
from sorahpc.errors import ConfigError, DataError


def test_a_merge_is_the_cache_that_one_manifest_would_have_given(tmp_path: Path) -> None:
    whole = part_of(tmp_path, slice(0, 12), "whole")
    a, b = part_of(tmp_path, slice(0, 8), "a"), part_of(tmp_path, slice(4, 12), "b")
    before = content(a), content(b)
    done = merge(tmp_path / "out", [a, b])
    assert done == {"samples": 12, "shards": 3, "linked": 3, "copied": 0, "shared": 1}
    assert content(tmp_path / "out") == content(whole) and (content(a), content(b)) == before
    assert verify(tmp_path / "out").faults == []
    with pytest.raises(DataError, match="holds a finished cache"):
        merge(tmp_path / "out", [a, b])
    with pytest.raises(ConfigError, match="two caches or more, found 1"):
        merge(tmp_path / "one", [a])


def test_a_merge_without_hard_links_copies_and_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = part_of(tmp_path, slice(0, 4), "a"), part_of(tmp_path, slice(4, 12), "b")
    real, left = os.link, [10]

    def link(source: Path, target: Path) -> None:
        if target.suffix == ".h5":
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    def killed(*_: object) -> None:
        left[0] -= 9
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(DataError, match="No space left on device"):
        merge(tmp_path / "out", [a, b])
    assert not (tmp_path / "out" / INDEX).exists()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert merge(tmp_path / "out", [a, b])["copied"] == 3
    assert content(tmp_path / "out") == content(part_of(tmp_path, slice(0, 12), "whole"))
    assert not [n for n in os.listdir(tmp_path / "out") if n.startswith(".")]


def with_rejected(folder: Path, left_out: int) -> Path:
    """A finished cache of one shard of four clips, one of them rejected."""
    rows = samples(4)
    (shard,) = plan_shards([r[0] for r in rows], 4)
    pin_info(folder, info())
    write_empty_text(folder, {"text": torch.ones(1, D)}, "float16")
    writer = ShardWriter(folder, shard.name, "float16", C, {"text": D})
    for i, row in enumerate(rows):
        if i != left_out:
            writer.add(*row)
        else:
            writer.reject(row[0], f"/v/{i}.mp4", "took longer than 60 s")
    writer.commit()
    build_index(folder, [shard.name])
    return folder


def test_a_merge_takes_of_a_shared_shard_the_one_in_which_no_clip_was_rejected(tmp_path: Path) -> None:
    whole = part_of(tmp_path, slice(0, 4), "whole")
    a, b = with_rejected(tmp_path / "a", 1), with_rejected(tmp_path / "b", 2)
    for name, sources in (("first", [a, whole]), ("last", [whole, a])):
        assert merge(tmp_path / name, sources)["samples"] == 4
        assert content(tmp_path / name) == content(whole)
    with pytest.raises(DataError, match=f"a/shard-.*: lacks sample {samples(4)[1][0]}, which .*b/shard-.*retry .*a`"):
        merge(tmp_path / "out", [a, b])
    assert not (tmp_path / "out").exists()


def test_a_merge_keeps_no_other_shard_of_that_name_and_names_the_one_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, a = part_of(tmp_path, slice(0, 4), "whole"), with_rejected(tmp_path / "a", 1)
    (shard,) = whole.glob("shard-*.h5")
    pin_info(tmp_path / "out", info())
    shutil.copy(a / shard.name, tmp_path / "out")  # as a merge of other caches left it
    with pytest.raises(DataError, match=r"out/shard-.*: is not .*whole/shard-.*; merge into a new folder"):
        merge(tmp_path / "out", [whole, a])
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    pin_info(tmp_path / "new", info())
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DataError, match=r"whole/shard-\w+.h5: damaged: .*; `sorahpc cache repair .*whole`"):
        merge(tmp_path / "new", [whole, a])
    assert [p.name for p in (tmp_path / "new").iterdir()] == [INFO]


def test_a_merge_refuses_another_key_by_field_and_a_sample_in_two_shards(tmp_path: Path) -> None:
    a, b = part_of(tmp_path, slice(0, 4), "a"), part_of(tmp_path, slice(3, 8), "b")
    with pytest.raises(DataError, match=f"sample {samples(4)[3][0]} is also in .*a/shard-"):
        merge(tmp_path / "out", [a, b])
    write(tmp_path / "c", dtype="bfloat16")
    with pytest.raises(DataError, match=r'c/cache.json: field `dtype`: expected "float16", found "bfloat16"'):
        merge(tmp_path / "out", [a, tmp_path / "c"])
    assert not (tmp_path / "out").exists()


def test_a_merge_of_an_old_cache_with_two_of_other_vae_configs_is_refused_though_each_goes_with_the_old(
    tmp_path: Path,
) -> None:
    old = part_of(tmp_path, slice(0, 4), "old")
    for name, config, rows in (("a", "1", slice(4, 8)), ("b", "2", slice(8, 12))):
        part_of(tmp_path, rows, name, vae={**info()["vae"], "config_sha256": config * 64})
    with pytest.raises(DataError, match=r"b/cache.json: field `vae.config_sha256`: expected \"1+\", found \"2+\""):
        merge(tmp_path / "out", [old, tmp_path / "a", tmp_path / "b"])
    assert merge(tmp_path / "out", [old, tmp_path / "a"])["samples"] == 8
