"""The sample job on a tiny random checkpoint: the same bytes for any number of tasks, resumable, hard to fool."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoints import completion, send, serving

from sorahpc.config import Config, ModelConfig, TrainConfig
from sorahpc.configfile import parse_config
from sorahpc.data.prompts import read_prompts
from sorahpc.data.texts import PackTexts
from sorahpc.distributed import checkpoint, megatron
from sorahpc.distributed.ema import Ema
from sorahpc.errors import CheckpointError, ConfigError, NumericsError, SetupError, Stopped
from sorahpc.jobs import sample
from sorahpc.jobs.train import PackBatch, accumulate_gradients
from sorahpc.models.dit import DiT
from sorahpc.models.text import load_text, make_tiny_t5
from sorahpc.models.vae import build_vae, load_vae, save_vae
from sorahpc.runs import Task

CAPTIONS = ["a red circle moves left", "a large blue square moves up", "un triangle vert"]
MODEL = ModelConfig(depth=1, dim=16, num_heads=2)
TEXT_DIM = 16
WAN = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip


def make_vae(folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = build_vae("AutoencoderKLWan", WAN)
    save_vae(vae, vae.module.state_dict(), folder, torch.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE, a T5, and a run with one checkpoint of a random model that listens to its text."""
    root = tmp_path_factory.mktemp("world")
    make_vae(root / "vae", 0)
    make_tiny_t5(root / "t5", CAPTIONS, TEXT_DIM, 0)
    vae, text = load_vae(root / "vae"), load_text(root / "t5", 32, "float32", "cpu")
    mesh = megatron.start()
    try:
        save_checkpoint(root / "runs" / "r" / "checkpoints", vae, text, mesh, step=1)
    finally:
        megatron.stop()
    return root


def save_checkpoint(folder: Path, vae: Any, text: Any, mesh: Any, *, step: int) -> None:
    train = TrainConfig(steps=10, tokens_per_pack=64, warmup_steps=0)
    model = DiT(MODEL, mesh, channels=vae.channels, text_dim=TEXT_DIM, dtype=torch.float32, seed=step)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():  # the layers that start at zero, so that the velocity is not
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ddp = megatron.wrap_ddp(model, model.config)
    optimizer = megatron.make_optimizer(ddp, train, mesh, torch.float32)
    x = torch.randn(4, model.final.out_features, generator=generator)
    text_tokens = torch.ones(3, TEXT_DIM)
    pack = PackBatch(x, -x, torch.tensor([0.5]), torch.tensor([[1, 2, 2]]), PackTexts(text_tokens, [3]))
    accumulate_gradients(ddp, [pack], x.numel(), mesh)  # one step: an optimizer without state can't be saved
    megatron.clip_and_step(optimizer, megatron.gradient_norm(optimizer), 1.0)
    config = {"run": "r", "model": MODEL.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    ids = {"vae": vae.identity, "text": {"id": text.id, "weights_sha256": text.weights_sha256}}
    meta = checkpoint.Meta(
        step=step, consumed=0, config=config, channels=vae.channels, text_dim=TEXT_DIM,
        latent_mean=[0.1] * vae.channels, latent_std=[0.7] * vae.channels, samples=1,
        cache=ids, world={"tp": 1, "dp": 1},
    )  # fmt: skip
    checkpoint.save(folder, meta, model, optimizer, Ema(model, optimizer, mesh, 0.9), mesh, keep=5)


PROMPTS = [
    {"prompt": "a red circle moves left"},
    {"prompt": "a large blue square moves up", "height": 32, "width": 48},
    {"prompt": "../../etc/passwd; rm -rf / </script> \u202e 红色", "frames": 9},
    {"prompt": "word " * 2000},
    {"prompt": "a red circle moves left", "seed": 5},
]


def configure(world: Path, out: Path, prompts: list[dict[str, Any]] | None = None, **changes: Any) -> Config:
    out.mkdir(parents=True, exist_ok=True)
    (out / "prompts.jsonl").write_text("\n".join(json.dumps(p) for p in prompts or PROMPTS))
    section = {
        "prompts": str(out / "prompts.jsonl"), "out": str(out / "samples"), "frames": 5, "height": 32, "width": 32,
        "steps": 2, "cfg_scale": 2.0, "prompts_per_pack": 2, **changes,
    }  # fmt: skip
    return parse_config(
        {"run": "r", "runs_dir": str(world / "runs"), "vae": {"path": str(world / "vae")},
         "text": {"path": str(world / "t5"), "max_tokens": 32}, "sample": section}
    )  # fmt: skip


def run(config: Config, rank: int = 0, world_size: int = 1, **task: Any) -> None:
    sample.run(config, Task(config.run_dir, "sample", rank, world_size, writes=False, **task))


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples that one task makes."""
    out = tmp_path_factory.mktemp("made")
    run(configure(world, out))
    return out / "samples"


@pytest.fixture
def copy(world: Path, made: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "samples")
    yield tmp_path


def test_every_prompt_becomes_an_mp4_of_its_size_with_a_sidecar_that_says_how(world: Path, made: Path) -> None:
    import av

    index = json.loads((made / "prompts.json").read_text())["samples"]
    assert [s["prompt"].strip() for s in index] == [p["prompt"].strip() for p in PROMPTS]
    assert sorted(p.name for p in made.glob("*.mp4")) == sorted(f"{s['name']}.mp4" for s in index)
    sizes = [(5, 32, 32), (5, 32, 48), (9, 32, 32), (5, 32, 32), (5, 32, 32)]
    for entry, (frames, height, width) in zip(index, sizes, strict=True):
        with av.open(str(made / f"{entry['name']}.mp4")) as container:
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert (len(decoded), *decoded[0].shape[:2]) == (frames, height, width)
        sidecar = json.loads((made / f"{entry['name']}.json").read_text())
        assert sidecar["prompt"] == entry["prompt"]
        assert sidecar["checkpoint"]["step"] == 1 and len(sidecar["checkpoint"]["manifest_sha256"]) == 64
        assert sidecar["settings"]["cfg_scale"] == 2.0 and sidecar["versions"]["torch"] == torch.__version__
        assert sidecar["mp4"]["sha256"] == hashlib.sha256((made / f"{entry['name']}.mp4").read_bytes()).hexdigest()
    assert json.loads((made / f"{index[3]['name']}.json").read_text())["prompt_tokens"] == 32


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_bytes_do_not_depend_on_how_many_tasks_there_are(
    world: Path, made: Path, tmp_path: Path, world_size: int
) -> None:
    config = configure(world, tmp_path)
    for rank in reversed(range(world_size)):
        run(config, rank, world_size)
    assert {k: v for k, v in digest(tmp_path / "samples").items() if k != "prompts.json"} == {
        k: v for k, v in digest(made).items() if k != "prompts.json"
    }


def test_running_again_loads_nothing_and_writes_nothing(
    world: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_load", lambda *_: pytest.fail("loaded the models"))
    before = {p.name: p.stat().st_mtime_ns for p in (copy / "samples").glob("0*")}
    run(configure(world, copy))
    assert {p.name: p.stat().st_mtime_ns for p in (copy / "samples").glob("0*")} == before


@pytest.mark.parametrize("damage", ["mp4 gone", "sidecar gone", "mp4 cut", "sidecar cut", "sidecar of another kind"])
def test_only_what_is_damaged_is_made_again_and_comes_out_the_same(
    world: Path, made: Path, copy: Path, damage: str
) -> None:
    folder = copy / "samples"
    mp4 = next(folder.glob("00001-*.mp4"))
    sidecar = mp4.with_suffix(".json")
    if damage == "mp4 gone":
        mp4.unlink()
    elif damage == "sidecar gone":
        sidecar.unlink()
    elif damage == "mp4 cut":
        mp4.write_bytes(mp4.read_bytes()[:-7])
    else:
        sidecar.write_text(sidecar.read_text()[:40] if damage == "sidecar cut" else "[]")
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("0*")}
    run(configure(world, copy))
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("0*")}
    assert {n for n in after if after[n] != before.get(n)} == {mp4.name, sidecar.name}
    assert digest(folder)[mp4.name] == digest(made)[mp4.name]


def test_other_settings_make_every_sample_again_and_the_log_says_which(
    world: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = digest(copy / "samples")
    with caplog.at_level(logging.INFO):
        run(configure(world, copy, cfg_scale=1.0))
    after = digest(copy / "samples")
    assert all(before[n] != after[n] for n in after if n.endswith(".mp4"))
    assert caplog.text.count("cfg_scale 2.0 -> 1.0") == len(PROMPTS)


def test_a_prompt_added_at_the_end_touches_only_the_last_pack(world: Path, copy: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (copy / "samples").glob("0*.mp4")}
    run(configure(world, copy, [*PROMPTS, {"prompt": "one more"}]))
    after = {p.name: p.stat().st_mtime_ns for p in (copy / "samples").glob("0*.mp4")}
    assert {n[:5] for n in after if after[n] != before.get(n)} == {"00004", "00005"}


def test_clips_of_a_former_prompts_file_are_left_alone_and_reported(
    world: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(configure(world, copy, PROMPTS[:2]))
    assert "3 clips that are not of" in caplog.text
    assert len(json.loads((copy / "samples" / "prompts.json").read_text())["samples"]) == 2
    assert len(list((copy / "samples").glob("*.mp4"))) == 5


def test_stopping_between_packs_keeps_what_is_done_and_the_next_run_finishes(
    world: Path, made: Path, tmp_path: Path
) -> None:
    asked = iter([False, True])
    config = configure(world, tmp_path)
    with pytest.raises(Stopped, match="2 of 5"):
        run(config, stop_requested=lambda: next(asked))
    assert len(list((tmp_path / "samples").glob("*.json"))) == 3
    run(config)
    assert {k: v for k, v in digest(tmp_path / "samples").items() if k.endswith(".mp4")} == {
        k: v for k, v in digest(made).items() if k.endswith(".mp4")
    }


def test_a_line_with_its_own_seed_has_that_noise_wherever_it_stands(world: Path, tmp_path: Path) -> None:
    config = configure(world, tmp_path, [{"prompt": "a", "seed": 5}, {"prompt": "a"}, {"prompt": "a", "seed": 5}])
    path = world / "runs" / "r" / "checkpoints" / "step-00000001"
    items = sample.plan(config, read_prompts(config.sample.prompts), path)
    assert [(i.seed, i.sample_id) for i in items] == [(5, 0), (0, 1), (5, 0)]


@pytest.mark.parametrize(
    ("changes", "prompts", "expected"),
    [
        ({"height": 36}, None, "sample.height: expected a multiple of 16 (VAE stride 8 x patch 2), found 36; use 32"),
        ({"width": 8}, None, "sample.width: expected a multiple of 16 (VAE stride 8 x patch 2), found 8; use 16"),
        ({"frames": 7}, None, "sample.frames: expected what AutoencoderKLWan takes, found 7; use 5"),
        ({}, [{"prompt": "a"}, {"prompt": "b", "height": 40}], "prompts.jsonl line 2: height: expected a multiple"),
        ({}, [{"prompt": "a", "frames": 6}], "prompts.jsonl line 1: frames: expected what AutoencoderKLWan takes"),
    ],
)
def test_a_size_that_does_not_fit_is_one_line_with_its_place(
    world: Path, tmp_path: Path, changes: dict[str, int], prompts: list[dict[str, Any]] | None, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(configure(world, tmp_path, prompts, **changes))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and expected in lines[0]
    assert not list((tmp_path / "samples").glob("*.mp4"))


def test_another_vae_than_the_one_trained_with_is_refused(world: Path, tmp_path: Path) -> None:
    make_vae(tmp_path / "vae", 1)
    config = configure(world, tmp_path)
    config = config.model_copy(update={"vae": config.vae.model_copy(update={"path": tmp_path / "vae"})})
    with pytest.raises(CheckpointError, match=r"vae\.path: .* has weights_sha256"):
        run(config)


def test_another_config_of_the_vae_trained_with_is_refused_where_the_checkpoint_knows_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "vae", tmp_path / "vae")
    told = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**told, "latents_std": [2.0] * 4}))
    config = configure(world, tmp_path, PROMPTS[:1])
    config = config.model_copy(update={"vae": config.vae.model_copy(update={"path": tmp_path / "vae"})})
    with pytest.raises(CheckpointError, match=r"^vae\.path: \S+ has config_sha256 [0-9a-f]{64}, but the checkpoint"):
        run(config)
    load = sample.load_ema_for_sampling

    def before_it_was_pinned(*args: Any) -> Any:
        model, meta = load(*args)
        del meta.cache["vae"]["config_sha256"]
        return model, meta

    monkeypatch.setattr(sample, "load_ema_for_sampling", before_it_was_pinned)
    run(config)
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 1


def test_another_text_encoder_than_the_one_trained_with_is_refused(world: Path, tmp_path: Path) -> None:
    make_tiny_t5(tmp_path / "t5", CAPTIONS, TEXT_DIM, 1)
    config = configure(world, tmp_path)
    config = config.model_copy(update={"text": config.text.model_copy(update={"path": tmp_path / "t5"})})
    with pytest.raises(CheckpointError, match=r"text\.path: .* has weights_sha256"):
        run(config)


def test_without_a_checkpoint_there_is_one_line_that_says_so(world: Path, tmp_path: Path) -> None:
    config = configure(world, tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint to sample from; train first"):
        run(config.model_copy(update={"run": "none"}))
    with pytest.raises(CheckpointError, match=r"sample\.checkpoint: no MANIFEST.json"):
        run(configure(world, tmp_path, checkpoint=str(tmp_path)))


def test_more_tasks_than_gpus_are_refused_in_the_words_of_who_found_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SetupError, match=r"^local rank 2: one GPU a rank expected, this node shows 2; start fewer"):
        run(configure(world, tmp_path / "many"), rank=2, world_size=3, local_rank=2)


def test_a_latent_that_is_not_finite_is_refused_by_name(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "euler", lambda velocity, x, *_: x * float("nan"))
    with pytest.raises(NumericsError, match="sample 00000-a-red-circle-moves-left: the latent is not finite"):
        run(configure(world, tmp_path))
    assert not list((tmp_path / "samples").glob("*.mp4"))


LONG = "A {} moves slowly over a grey floor, seen from above in even light, and the camera stays still, take {}."


def expanding(world: Path, tmp_path: Path, url: str, prompts: list[dict[str, Any]], **caption: Any) -> Config:
    """In a run folder of its own, which has no captions yet."""
    if not (tmp_path / "runs").exists():
        shutil.copytree(world / "runs", tmp_path / "runs")
    data = configure(world, tmp_path, prompts).model_dump(mode="json")
    data["sample"]["expand"] = True
    server = {"url": url, "model": "stub", "timeout_s": 5, "retries": 0}
    return parse_config(data | {"runs_dir": str(tmp_path / "runs"), "caption": {"endpoint": server, **caption}})


def test_prompts_are_expanded_once_and_the_sidecar_says_to_what(
    world: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def respond(h: Any, b: dict[str, Any], n: int) -> None:
        asked = b["messages"][0]["content"]
        send(h, 200, completion("I can't do that." if "large blue" in asked else LONG.format("red circle", n)))

    prompts = [{"prompt": "a red  circle moves left"}, {"prompt": "a large blue square moves up"},
               {"prompt": "a red circle moves left"}]  # fmt: skip
    with serving(respond) as server, caplog.at_level(logging.WARNING):
        config = expanding(world, tmp_path, server.url, prompts, attempts=2)
        for rank in (1, 0):
            run(config, rank, 2)
        # Task 1 has the third prompt, task 0 the others: the first is the third's, but for a blank.
        assert len(server.requests) == 3 and {b["messages"][0]["content"][:30] for _, _, b in server.requests} == {
            "Write a detailed prompt for a "
        }
        before = {p.name: p.stat().st_mtime_ns for p in config.samples_dir.glob("0*")}
        run(config)
        assert len(server.requests) == 3
        assert {p.name: p.stat().st_mtime_ns for p in config.samples_dir.glob("0*")} == before
    index = [s["prompt"] for s in json.loads((config.samples_dir / "prompts.json").read_text())["samples"]]
    assert index == [p["prompt"] for p in prompts]
    first, refused, third = (json.loads(p.read_text()) for p in sorted(config.samples_dir.glob("0*.json")))
    assert first["prompt"] == "a red  circle moves left" and first["settings"]["prompt"] == first["expansion"]["prompt"]
    assert first["expansion"] == third["expansion"] and first["expansion"]["prompt"].startswith("A red circle moves")
    assert first["expansion"]["model"] == {"endpoint_model": "stub"}
    assert refused["settings"]["prompt"] == refused["prompt"] and refused["expansion"]["reason"] == "refusal"
    assert "00001-a-large-blue-square-moves-up: the prompt stays as it is: refusal" in caplog.text
    # What the model saw is the expanded text: the same as if it had been the prompt itself.
    (tmp_path / "plain").mkdir()
    plain = [{"prompt": s["settings"]["prompt"]} for s in (first, refused, third)]
    run(configure(world, tmp_path / "plain", plain))
    bytes_of = [[p.read_bytes() for p in sorted(folder.glob("0*.mp4"))]
                for folder in (config.samples_dir, tmp_path / "plain/samples")]  # fmt: skip
    assert bytes_of[0] == bytes_of[1]


def test_without_expansion_a_sidecar_is_what_it_was(made: Path) -> None:
    assert not [p.name for p in made.glob("0*.json") if "expansion" in json.loads(p.read_text())]


def test_a_stop_while_prompts_are_expanded_is_one_line(world: Path, tmp_path: Path) -> None:
    with serving(lambda h, b, n: send(h, 200, completion(LONG.format("ball", n)))) as server:
        config = expanding(world, tmp_path, server.url, PROMPTS)
        with pytest.raises(Stopped, match="stopped on request with 4 captions asked for"):
            run(config, stop_requested=lambda: True)
    assert not list(config.samples_dir.glob("0*"))


def profile_config(world: Path, tmp_path: Path, **profile: Any) -> Config:
    shutil.copytree(world / "runs", tmp_path / "runs")
    data = configure(world, tmp_path).model_dump(mode="json")
    return parse_config(data | {"runs_dir": str(tmp_path / "runs"), "profile": {"warmup_steps": 1, **profile}})


def test_a_profile_stops_on_request_and_keeps_nothing(world: Path, tmp_path: Path) -> None:
    config, asked = profile_config(world, tmp_path, steps=1), iter((False, True))
    with pytest.raises(Stopped, match="stopped on request after 1 of 3 packs; nothing of it is kept"):
        sample.profile(config, Task(config.run_dir, "profile-sample", stop_requested=lambda: next(asked)))
    assert not list((config.run_dir / "profile/sample").iterdir())


def test_the_one_task_is_recorded_whatever_ranks_are_chosen_for_training(world: Path, tmp_path: Path) -> None:
    config = profile_config(world, tmp_path, steps=1)
    config = config.model_copy(update={"profile": config.profile.model_copy(update={"ranks": (1,)})})
    sample.profile(config, Task(config.run_dir, "profile-sample"))
    assert len(list((config.run_dir / "profile/sample").glob("*_rank0.json"))) == 1


def test_a_profile_tells_text_model_and_vae_apart_and_makes_no_sample(world: Path, tmp_path: Path) -> None:
    from sorahpc.profiling.record import read_summary

    config = profile_config(world, tmp_path, steps=3)
    sample.profile(config, Task(config.run_dir, "profile-sample", writes=False))
    (path,) = (config.run_dir / "profile/sample").glob("*_rank0.json")
    summary = read_summary(path)
    found = summary.found
    assert found is not None and found.steps == 1 and len(summary.step_ms) == len(summary.recorded_step_ms) == 1
    # 3 Euler steps, with and without guidance, of latents 2 x 4 x 4 and 2 x 4 x 6 in patches of 1 x 2 x 2
    assert summary.step_tokens == [3 * 2 * (2 * 2 * 2 + 2 * 2 * 3)]
    parts = {part.name: part for part in found.parts}
    assert all(parts[name].other_ms > 0 for name in ("text encoder", "VAE"))
    assert all(parts[n].forward_ms > 0 and not parts[n].backward_ms for n in ("self attention", "mlp", "last layer"))
    assert not config.samples_dir.exists()
