"""Looking after a cache: no damaged byte passes unseen, nothing good is lost, and what is told is so."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from caches import C, D, content, dims, everything, forge, info, part_of, samples, write
from models import write_vae

from sorahpc.cli import main
from sorahpc.data import maintenance as module
from sorahpc.data.cache import INDEX, INFO, build_index, pin_info, plan_shards
from sorahpc.data.claims import WORK
from sorahpc.data.contents import list_samples, show, stats
from sorahpc.data.journal import replay
from sorahpc.data.latents import LatentCache
from sorahpc.data.maintenance import repair, retry, verify
from sorahpc.data.seal import seal_of
from sorahpc.data.shards import EMPTY_TEXT, ShardWriter, write_empty_text
from sorahpc.errors import DataError
from sorahpc.models.vae import Vae, load_vae
from sorahpc.runs import place

CORRUPTIONS = 250


def test_a_whole_cache_has_no_fault(tmp_path: Path) -> None:
    write(tmp_path)
    report = verify(tmp_path)
    assert report.faults == [] and (report.samples, report.shards) == (10, 3)
    assert report.nbytes == sum(len(v) for k, v in content(tmp_path).items() if k != "rejected.json")
    with pytest.raises(DataError, match="no latent cache here"):
        verify(tmp_path.parent / "empty" if (tmp_path.parent / "empty").mkdir() is None else tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        verify(tmp_path / "nowhere")


def test_each_of_250_corruptions_is_found_and_none_is_read_in_silence(tmp_path: Path) -> None:
    """Bits flipped and ends cut off, anywhere in the cache: verify names the file, and nothing that is read differs."""
    write(tmp_path, count=8)
    good, expected = content(tmp_path), everything(tmp_path)
    files = [n for n in good if n.startswith("shard-")] * 3 + [INDEX, INDEX, INFO, EMPTY_TEXT, "rejected.json"]
    rng = np.random.default_rng(0)
    for k in range(CORRUPTIONS):
        name = files[int(rng.integers(len(files)))]
        data = bytearray(good[name])
        if k % 5 == 4:
            del data[int(rng.integers(len(data))) :]
        else:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        (tmp_path / name).write_bytes(data)
        faults = verify(tmp_path).faults
        assert {f.file for f in faults} == {name}, (k, name, faults)
        try:
            same = everything(tmp_path) == expected
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert same, f"corruption {k} of {name}: read as something else"
        (tmp_path / name).write_bytes(good[name])
    assert verify(tmp_path).faults == []


def test_each_byte_of_an_index_counts_and_one_without_a_seal_is_as_good_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    good = (tmp_path / INDEX).read_bytes()
    for k in range(0, len(good), 41):
        (tmp_path / INDEX).write_bytes(good[:k] + bytes([good[k] ^ 1]) + good[k + 1 :])
        assert {f.file for f in verify(tmp_path).faults} == {INDEX}, k
    assert b"parquet-cpp" in good  # who wrote it: no value of ours
    (tmp_path / INDEX).write_bytes(good.replace(b"parquet-cpp", b"parquet-Cpp"))
    assert "crc32 of the file" in verify(tmp_path).faults[0].what
    assert len(LatentCache(tmp_path)) == 4
    repair(tmp_path)
    assert (tmp_path / INDEX).read_bytes() == good and verify(tmp_path).faults == []

    forge(tmp_path, {"sealed": None})  # as it was written before there was one
    assert b"sorahpc crc32" not in (tmp_path / INDEX).read_bytes() and verify(tmp_path).faults == []


def test_a_shard_in_the_place_of_the_empty_text_is_none(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    shutil.copy(next(tmp_path.glob("shard-*.h5")), tmp_path / EMPTY_TEXT)
    assert "`text`" not in str(verify(tmp_path).faults) and [f.file for f in verify(tmp_path).faults] == [EMPTY_TEXT]
    with pytest.raises(DataError, match=f"{EMPTY_TEXT}: text expected, found .* too; delete it"):
        LatentCache(tmp_path)


def test_a_damaged_sample_is_named_and_a_byte_between_samples_is_found_too(tmp_path: Path) -> None:
    rows = write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    good = path.read_bytes()
    offset = int(LatentCache(tmp_path).index.latent_offset[2])
    path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
    faults = verify(tmp_path).faults
    assert [f.key for f in faults] == ["", rows[2][0]]
    assert "crc32 of the file" in faults[0].what and "its latent is damaged: crc32" in faults[1].what
    at = len(good) - 200  # of the structure: no sample lies there
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert "crc32 of the file" in verify(tmp_path).faults[0].what


def test_missing_files_are_faults_and_files_that_are_not_of_the_index_are_none(tmp_path: Path) -> None:
    write(tmp_path)
    shard = sorted(tmp_path.glob("shard-*.h5"))[0]
    shutil.copy(shard, tmp_path / ("shard-" + "f" * 16 + ".h5"))
    (tmp_path / ".shard-x.h5.host.1.1.part").write_bytes(b"half")
    report = verify(tmp_path)
    assert report.faults == [] and report.unlisted == ["shard-" + "f" * 16 + ".h5"] and len(report.parts) == 1
    shard.unlink()
    assert [(f.file, f.what.split(";")[0]) for f in verify(tmp_path).faults] == [(shard.name, "missing")]


def test_repair_sets_damage_aside_and_what_is_made_anew_gives_the_same_cache(tmp_path: Path) -> None:
    rows = write(tmp_path, count=12, per_shard=3)
    good = content(tmp_path)
    names = [s.name for s in plan_shards([r[0] for r in rows], 3)]
    data = bytearray(good[names[1]])
    data[len(data) // 2] ^= 4
    (tmp_path / names[1]).write_bytes(data)
    (tmp_path / EMPTY_TEXT).write_bytes(good[EMPTY_TEXT][:-5])
    (tmp_path / INFO).write_text('{"version": 2, "dtype": "bfloat16"}')
    (tmp_path / f".{names[0]}.{place()}.4194303.1.part").write_bytes(b"half")  # of a process id beyond the largest
    done = repair(tmp_path)
    assert done["set_aside"] == {names[1]: f"damaged-{names[1]}", EMPTY_TEXT: f"damaged-{EMPTY_TEXT}"}
    assert done["restored"] and done["samples"] == 9 and len(done["removed"]) == 1 and done["missing"] == []
    assert (tmp_path / f"damaged-{names[1]}").read_bytes() == data
    assert (tmp_path / INFO).read_bytes() == good[INFO]
    write_empty_text(tmp_path, {"text": torch.ones(1, D)}, "float16")  # what encode does
    assert verify(tmp_path).faults == []
    assert LatentCache(tmp_path).keys == [r[0] for r in rows[:3] + rows[6:]]
    writer = ShardWriter(tmp_path, names[1], "float16", C, {"text": D})
    for row in rows[3:6]:
        writer.add(*row)
    writer.commit()
    build_index(tmp_path, names)
    assert {k: v for k, v in content(tmp_path).items() if not k.startswith("damaged-")} == good
    before = content(tmp_path)
    again = repair(tmp_path)
    assert content(tmp_path) == before and again["set_aside"] == {} and again["samples"] == 12


def test_repair_builds_a_lost_index_and_refuses_to_guess_a_lost_key(tmp_path: Path) -> None:
    rows = write(tmp_path)
    good = content(tmp_path)
    (tmp_path / INDEX).write_bytes(good[INDEX][:-3])
    (tmp_path / "rejected.json").unlink()
    assert repair(tmp_path)["samples"] == 10
    assert sorted(LatentCache(tmp_path).keys) == sorted(r[0] for r in rows) and verify(tmp_path).faults == []
    (tmp_path / INDEX).unlink()
    (tmp_path / INFO).write_bytes(b"{")
    before = content(tmp_path)
    with pytest.raises(DataError, match=f"{INFO}: damaged, and {INDEX} .*nothing was changed"):
        repair(tmp_path)
    assert content(tmp_path) == before


def test_repair_puts_a_lost_cache_json_back_and_names_a_lost_empty_text_and_what_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    good = content(tmp_path)
    (tmp_path / INFO).unlink()
    (tmp_path / EMPTY_TEXT).unlink()
    assert {f.file for f in verify(tmp_path).faults} == {INFO, EMPTY_TEXT}
    assert main(["cache", "repair", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/{INFO}: put back" in said and f"{tmp_path}/{EMPTY_TEXT}: missing" in said
    assert "run `sorahpc encode`" in said and (tmp_path / INFO).read_bytes() == good[INFO]
    assert repair(tmp_path)["missing"] == [EMPTY_TEXT]
    with pytest.raises(DataError, match=f"{EMPTY_TEXT}: missing; run `sorahpc encode` again"):
        LatentCache(tmp_path)
    write_empty_text(tmp_path, {"text": torch.ones(1, D)}, "float16")
    assert content(tmp_path) == good


@pytest.mark.parametrize(
    ("meta", "what"),
    [
        ({"shards": None}, "shards: names"),
        ({"shards": {"../../passwd": 1}}, "shards: names"),
        ({"shards": ["shard-0123456789abcdef.h5"]}, "shards: names"),
        ({"mean": None}, "statistics: mean"),
        ({"std": [0.5, "1", 1.0, 1.0]}, "statistics: std"),
        ({"count": "many"}, "statistics: count"),
        ({"info": None}, "no copy of cache.json"),
        ({"info": 7}, "no copy of cache.json"),
        ({"info": "{"}, "no copy of cache.json"),
        ({"info": "\ud800"}, "no copy of cache.json"),
        ({"mean": [1.0]}, "statistics: mean"),
        ({"count": 1}, "statistics: count"),
    ],
)
def test_an_index_with_the_right_sha256_and_wrong_fields_is_a_fault_and_is_made_anew(
    tmp_path: Path, meta: dict[str, object], what: str
) -> None:
    write(tmp_path)
    good = content(tmp_path)
    forge(tmp_path, meta)
    assert [(f.file, f.what.startswith(what)) for f in verify(tmp_path).faults] == [(INDEX, True)]
    assert repair(tmp_path)["set_aside"] == {}
    assert verify(tmp_path).faults == [] and content(tmp_path).keys() == good.keys()


@pytest.mark.parametrize("cells", [{"caption": "another"}, {"shard": "shard-0123456789abcdef.h5"}, {"width": -1}])
def test_a_row_that_is_not_what_its_shard_says_is_named(tmp_path: Path, cells: dict[str, object]) -> None:
    rows = write(tmp_path)
    good = content(tmp_path)
    forge(tmp_path, **cells)
    faults = verify(tmp_path).faults
    assert [(f.file, f.key) for f in faults] == [(INDEX, rows[2][0])] and next(iter(cells)) in faults[0].what
    repair(tmp_path)
    assert content(tmp_path) == good


def test_a_column_too_few_and_a_sample_in_two_shards_are_faults_not_crashes(tmp_path: Path) -> None:
    write(tmp_path / "a", detailed=True)
    forge(tmp_path / "a", drop="detailed")
    assert {f.file for f in verify(tmp_path / "a").faults} == {INDEX}
    rows = write(tmp_path / "b", count=4)
    writer = ShardWriter(tmp_path / "b", "shard-" + "f" * 16 + ".h5", "float16", C, {"text": D})
    writer.add(*rows[0])
    there = json.loads(json.dumps({p.name: p.stat().st_size for p in (tmp_path / "b").glob("shard-*")}))
    there[writer.name] = writer.commit().stat().st_size
    forge(tmp_path / "b", {"shards": there})
    (fault,) = verify(tmp_path / "b").faults
    assert f"sample {rows[0][0]} is in" in fault.what


def test_a_shard_that_the_system_does_not_read_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    before = content(tmp_path)

    def failing(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(module, "check_seal", failing)
    with pytest.raises(DataError, match="can't be read: Input/output error; nothing was changed"):
        repair(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_retry_makes_a_journal_of_all_but_the_clips_that_are_tried_again(tmp_path: Path, dtype: str) -> None:
    rows = samples(5, clip=True, detailed=True)
    writer = ShardWriter(tmp_path, "shard-" + "0" * 16 + ".h5", dtype, C, dims(clip=True))
    pin_info(tmp_path, info(dtype) | {f"{name}_dim": dim for name, dim in dims(clip=True).items()})
    for i, row in enumerate(rows):
        writer.add(*row[:6], "dali" if i % 2 else "pyav", row[7])
    writer.reject("a" * 16, "/v/slow.mp4", "took longer than 60 s")
    writer.reject("b" * 16, "/v/broken.mp4", "corrupt: frame 3 has errors")
    shard = writer.commit()
    build_index(tmp_path, [writer.name])
    write_empty_text(tmp_path, {name: torch.ones(1, dim) for name, dim in dims(clip=True).items()}, dtype)
    whole = shard.read_bytes()

    at = int(LatentCache(tmp_path).index.latent_offset[2])
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match="damaged: crc32 of the file"):
        retry(tmp_path)
    assert shard.exists() and not (tmp_path / WORK).exists()
    shard.write_bytes(whole)
    done = retry(tmp_path)
    assert done == {"clips": [{"source": "/v/slow.mp4", "reason": "took longer than 60 s"}], "shards": [writer.name]}
    assert not shard.exists()
    (journal,) = (tmp_path / WORK).iterdir()
    head = {"shard": writer.name, "cache_sha256": hashlib.sha256((tmp_path / INFO).read_bytes()).hexdigest()}
    records = list(replay(journal, head, dtype, C, dims(clip=True)))
    again = ShardWriter(tmp_path, writer.name, dtype, C, dims(clip=True))
    again.samples = [r for r in records if not isinstance(r, dict)]
    assert [r for r in records if isinstance(r, dict)] == writer.rejected[1:]
    again.rejected = writer.rejected
    assert again.commit().read_bytes() == whole
    assert retry(tmp_path) == done and len(list((tmp_path / WORK).iterdir())) == 2  # as if killed before the shard went


def test_a_cache_json_that_was_changed_is_refused_by_field_when_read_and_repair_puts_it_back(tmp_path: Path) -> None:
    write(tmp_path)
    good = (tmp_path / INFO).read_bytes()
    made = json.loads(good)
    field = next(name for name, value in made.items() if isinstance(value, list))
    (tmp_path / INFO).write_text(json.dumps({**made, field: [n + 1 for n in made[field]]}))
    with pytest.raises(DataError, match=rf"cache.json: is not the one that index.parquet was built with: {field} "):
        LatentCache(tmp_path)
    assert repair(tmp_path)["restored"] and (tmp_path / INFO).read_bytes() == good
    assert len(LatentCache(tmp_path)) == 10


def test_stats_count_what_is_there_and_normalised_samples_have_mean_0_and_std_1(tmp_path: Path) -> None:
    rows = write(tmp_path)
    found = stats(tmp_path, read=100)
    assert (found["samples"], found["shards"]) == (10, 3)
    assert found["latent_bytes"] == sum(2 * r[1].numel() for r in rows)
    assert found["text_bytes"] == sum(2 * e.numel() for r in rows for e in r[2].values())
    assert found["shapes"]["3x8x8"] == 4 and sum(found["shapes"].values()) == 10
    assert found["tokens"]["max"] == 5 * 10 * 6 and found["frames"]["min"] == 1 and found["frames"]["max"] == 17
    assert found["duration_s"]["max"] == 17 / 8 and found["aspect"]["max"] == 10 / 6
    assert found["normalised"]["samples"] == 10
    np.testing.assert_allclose(found["normalised"]["mean"], 0, atol=1e-6)
    np.testing.assert_allclose(found["normalised"]["std"], 1, atol=1e-6)
    assert stats(tmp_path, read=3)["normalised"]["samples"] == 3
    json.dumps(found, allow_nan=False)
    listed = list_samples(tmp_path)
    assert [r["key"] for r in listed] == [r[0] for r in rows]
    assert listed[1]["shape"] == [C, 1, 6, 10] and listed[1]["tokens"] == 60 and listed[1]["caption"] == rows[1][3]


def test_on_disk_a_sample_takes_at_most_one_percent_more_than_its_latent_and_unpadded_text(tmp_path: Path) -> None:
    """Samples of a usual size: 16 channels, 5 x 32 x 32 (256 px, 17 frames), captions of 10 to 200 tokens of 4,096."""
    pin_info(tmp_path, {**info(), "channels": 16, "text_dim": 4096})
    write_empty_text(tmp_path, {"text": torch.ones(1, 4096)}, "float16")
    g = torch.Generator().manual_seed(0)
    writer = ShardWriter(tmp_path, "shard-" + "0" * 16 + ".h5", "float16", 16, {"text": 4096})
    for i in range(16):
        length = int(torch.randint(10, 200, (1,), generator=g))
        writer.add(
            f"{i:016x}",
            torch.randn(16, 5, 32, 32),
            {"text": torch.randn(length, 4096)},
            "word " * length,
            8.0,
            f"/v/{i}",
        )
    writer.commit()
    build_index(tmp_path, [writer.name])
    assert 1 < stats(tmp_path, read=1)["disk_ratio"] <= 1.01


def test_the_command_line_tells_faults_a_line_each_and_as_json_and_ends_with_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "a")
    path = str(tmp_path / "a")

    def run(*argv: str) -> tuple[int, str]:
        code = main(["cache", *argv])
        said = capsys.readouterr()
        return code, said.out + said.err

    assert run("verify", path)[0] == 0 and json.loads(run("verify", path, "--json")[1])["ok"] is True
    code, text = run("ls", path)
    assert code == 0 and len(text.splitlines()) == 11 and rows[3][0] in text and rows[3][3] in text
    assert len(json.loads(run("ls", path, "--json")[1])) == 10
    assert "std 1 to 1 over the channels" in run("stats", path)[1]
    assert json.loads(run("stats", path, "--json", "--read", "2")[1])["normalised"]["samples"] == 2
    part_of(tmp_path, slice(10, 12), "b")
    code, text = run("merge", str(tmp_path / "c"), path, str(tmp_path / "b"))
    assert code == 0 and "12 samples in 4 shards: 4 linked, 0 copied" in text
    assert run("merge", str(tmp_path / "c"), path, str(tmp_path / "b"))[0] == 4

    shard = LatentCache(tmp_path / "a").index.shards[0]
    data = bytearray((tmp_path / "a" / shard).read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "a" / shard).unlink()  # linked in c: what damages one name damages both
    (tmp_path / "a" / shard).write_bytes(data)
    code, text = run("verify", path)
    assert code == 4 and f"{path}/{shard}: damaged: crc32 of the file" in text and "cache repair" in text
    code, text = run("verify", path, "--json")
    assert code == 4 and shard in {fault["file"] for fault in json.loads(text)["faults"]}
    code, text = run("repair", path)
    assert code == 0 and f"{path}/{shard}: damaged; renamed damaged-{shard}" in text and "run `sorahpc encode`" in text
    assert run("verify", path)[0] == 0 and run("verify", str(tmp_path / "c"))[0] == 0
    assert json.loads(run("repair", path, "--json")[1])["set_aside"] == {}
    assert run("verify", str(tmp_path / "nowhere"))[0] == 4


@pytest.mark.parametrize("fps", [2000.0, 1e-7, 0.0, -8.0, math.nan])
def test_a_forged_fps_is_one_line_for_who_shows_the_sample_and_a_fault_for_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fps: float
) -> None:
    rows, folder = write(tmp_path / "c"), str(tmp_path / "c")
    shard = tmp_path / "c" / LatentCache(folder).index.shards[0]
    with h5py.File(shard, "r+") as f:
        f["fps"][...] = fps
    data = shard.read_bytes()
    shard.write_bytes(data + seal_of(zlib.crc32(data)))
    there = {p.name: p.stat().st_size for p in sorted((tmp_path / "c").glob("shard-*"))}
    forge(tmp_path / "c", {"shards": there}, fps=fps)
    assert main(["cache", "verify", folder]) == 4
    assert f"{shard}: `fps`: 0.001 to 240 expected" in capsys.readouterr().out
    for command in (["show", folder, rows[2][0], "--vae", str(tmp_path / "vae")], ["ls", folder], ["stats", folder]):
        assert main(["cache", *command]) == 4
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"{INDEX}: fps: 0.001 to 240 expected" in said[0], said


def test_a_sample_is_shown_in_the_tiles_that_it_was_encoded_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_vae(write_vae(tmp_path / "vae"))
    tiling = {"tile_px": 32, "overlap_px": 8, "chunk_frames": None, "overlap_frames": 1}
    made = {**info(), "vae": vae.identity, "vae_dtype": "float32"}
    row = samples(1)[0]
    for name, tiles in (("a", tiling), ("b", {"tile_px": "all"})):
        pin_info(tmp_path / name, {**made, "tiling": tiles})
        write_empty_text(tmp_path / name, {"text": torch.ones(1, D)}, "float16")
        writer = ShardWriter(tmp_path / name, "shard-" + "0" * 16 + ".h5", "float16", C, {"text": D})
        writer.add(*row)
        writer.commit()
        build_index(tmp_path / name, [writer.name])
    parts = []
    whole = Vae._decode_part
    monkeypatch.setattr(Vae, "_decode_part", lambda self, z: parts.append(z.shape) or whole(self, z))
    shown = show(tmp_path / "a", row[0], tmp_path / "vae", tmp_path / "a.mp4")
    assert len(parts) == 9 and set(parts) == {(C, 3, 4, 4)} and shown["frames"] == 9
    with pytest.raises(DataError, match=r"fields `vae_dtype` and `tiling`: .* are not what"):
        show(tmp_path / "b", row[0], tmp_path / "vae", tmp_path / "b.mp4")
