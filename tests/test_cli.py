"""The command line as a user meets it: fast, one line a fault, JSON everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import yaml

from sorahpc.cli import main
from sorahpc.cluster.launch import JOBS
from sorahpc.config import KernelsConfig
from sorahpc.configfile import load_config
from sorahpc.data.captions import Row, write_captions

HEAVY = ("torch", "numpy", "megatron", "submitit", "av", "h5py", "diffusers", "transformers", "pyarrow")

BROKEN = [
    ("train.lr=fast", "train.lr: expected a number, found"),
    ("train.stepz=3", "train.stepz: unknown key; did you mean `steps`?"),
    ("train.steps=0", "train.steps: expected greater than or equal to 1, found 0"),
    ("train.steps=1.5", "train.steps: expected a"),
    ("train.tp=3", "train.tp: expected a divisor of the world size 2"),
    ("train.packs_per_step=3", "train.packs_per_step: expected a multiple of the dp size 2"),
    ("train.warmup_steps=100", "train.warmup_steps: expected warmup_steps 100 + decay_steps 0 at most steps 20"),
    ("train.precision=fp8", "train.precision: expected 'auto', 'fp32' or 'bf16', found"),
    ("train.resources.nodes=-1", "train.resources.nodes: expected greater than or equal to 1"),
    ("model.num_heads=5", "model.num_heads: expected a divisor of dim = 12, not 5"),
    ("model.dim=516", "model.num_heads: expected dim / num_heads at most 256 for rope3d, not 516 / 1"),
    ("model.patch=[1,2]", "model.patch.2: missing"),
    ("model=Z", "model: no file for 'Z'; expected a .yaml path or one of"),
    ("cluster=nowhere", "cluster: no file for 'nowhere'"),
    ("cluster.kind=pbs", "cluster.kind: expected 'inline', 'local' or 'slurm', found"),
    ("cluster.partition=a;b", "cluster.partition: expected letters, digits"),
    ("cluster.gpus_per_task=2", "cluster.gpus_per_task: expected less than or equal to 1, found 2"),
    ("run=a/b", "run: expected 1 to 64 letters"),
    ("encode.dtype=float64", "encode.dtype: expected 'float16' or 'bfloat16', found"),
    ("clip.min_frames=99", "clip.min_frames: expected at most max_frames = 17"),
    ("sample.seed=-1", "sample.seed: expected greater than or equal to 0"),
    ("encode.resources.tasks=many", "encode.resources.tasks: expected a whole number, found"),
    ("vae=3", "vae: expected a section (a mapping), found 3"),
    ("train.clip_grad=.inf", "train.clip_grad: expected a finite number"),
    ("trian.steps=3", "trian: unknown key; did you mean `train`?"),
    ("train.steps", "'train.steps': an override is dotted.key=value"),
    ("run.name=x", "run: is a value, not a section"),
    ("train.betas=[0.9,1.0]", "train.betas.1: expected less than 1, found 1.0"),
    ("train.betas=[-0.1,0.9]", "train.betas.0: expected greater than or equal to 0, found -0.1"),
    ("model.mlp_ratio=0.01", "model.mlp_ratio: expected at least 1 / dim = 1 / 12, not 0.01"),
    ("model.mlp_ratio=1e308", "model.mlp_ratio: expected less than or equal to 1000"),
    ("demo={clips: 1, text_dim: 24}", "demo.text_dim: expected a multiple of 16, found 24"),
]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line in this process, for calls that end before they start anything."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str | Path) -> Done:
        umask = os.umask(0o077)
        try:
            code = main(list(map(str, args)))
        finally:
            os.umask(umask)
        return Done(code, *capsys.readouterr())

    return call


@pytest.mark.parametrize(("override", "expected"), BROKEN)
def test_a_broken_config_is_one_line_with_the_dotted_key(
    tmp_path: Path, here: Callable[..., Done], override: str, expected: str
) -> None:
    config = tiny.write_config(tmp_path)
    done = here("train", config, override)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sorahpc: {expected}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_tensor_parallelism_must_divide_the_hidden_size(tmp_path: Path, here: Callable[..., Done]) -> None:
    config = tiny.write_config(tmp_path)
    done = here("config", "check", config, "model.num_heads=2", "train.tp=2", "model.mlp_ratio=0.75")
    assert done.returncode == 2
    assert done.stderr == (
        "sorahpc: train.tp: expected a divisor of the hidden size 9 = model.dim 12 x model.mlp_ratio 0.75, not 2\n"
    )


@pytest.mark.parametrize("overrides", [["model=S", "model.depth=3"], ["model.depth=3", "model=S"]])
def test_overrides_reach_into_a_model_that_an_override_names(
    tmp_path: Path, here: Callable[..., Done], overrides: list[str]
) -> None:
    done = here("config", "show", tiny.write_config(tmp_path, model="nosuch"), "--json", *overrides)
    model = json.loads(done.stdout)["model"]
    assert (model["depth"], model["dim"]) == (3, 384)


def test_several_faults_are_several_lines(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    done = tiny.sorahpc("config", "check", config, "train.steps=x", "model.dim=y", "more=1", cwd=tmp_path)
    assert done.returncode == 2
    assert sorted(line.split(": ")[1] for line in done.stderr.splitlines()) == ["model.dim", "more", "train.steps"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [", "not valid YAML"),
        ("- a\n- b", "a mapping of sections expected, found list"),
        ("run: a\nrun: b", "`run` is given twice"),
        ("run: &a x\nruns_dir: *a", "aliases (*name) are not allowed"),
        ("run: !!python/object/apply:os.system [touch pwned]", "not valid YAML"),
        ("{}", "run: missing"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, here: Callable[..., Done], text: str, expected: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    done = here("pipeline", "c.yaml")
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["nosuch"],
        ["train"],
        ["train", "nosuch.yaml"],
        ["train", "x", "--cluter", "y"],
        ["data", "toyworld", "o", "--clips", "0"],
        ["data", "tiny-t5", "demo", "--dim", "24"],
        ["data", "tiny-t5", "demo", "--dim", "8"],
    ],
)
def test_a_wrong_call_is_one_line(here: Callable[..., Done], args: list[str]) -> None:
    done = here(*args)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_a_missing_section_is_named_before_anything_starts(tmp_path: Path, here: Callable[..., Done]) -> None:
    (tmp_path / "c.yaml").write_text("run: x\n")
    for verb, sections in (("prepare", ["prepare"]), ("encode", ["vae", "text"]), ("train", ["model", "train"])):
        done = here(verb, "c.yaml")
        assert done.returncode == 2
        assert [line.split(": ")[1] for line in done.stderr.splitlines()] == sections
    assert not (tmp_path / "runs").exists()


def imported(*args: str, cwd: Path) -> list[str]:
    code = (
        "import sys, sorahpc.cli\n"
        f"sys.argv = ['sorahpc', *{list(args)!r}]\n"
        "sorahpc.cli.main()\n"
        f"print('IMPORTED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=tiny.env(), capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1].removeprefix("IMPORTED ").replace("'", '"'))


def test_help_status_logs_and_config_need_none_of_the_heavy_libraries(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    assert tiny.sorahpc("pipeline", config, cwd=tmp_path).returncode == 0
    for args in (["--help"], ["status", "tiny"], ["logs", "tiny"], ["config", "show", str(config)]):
        assert imported(*args, cwd=tmp_path) == []


def test_a_dry_run_for_slurm_needs_no_torch(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    assert "torch" not in imported("train", str(config), "--cluster", "slurm", "--dry-run", cwd=tmp_path)


def test_help_lists_every_job(tmp_path: Path) -> None:
    text = tiny.sorahpc("--help", cwd=tmp_path).stdout
    jobs = [job for job in JOBS if not job.startswith("profile-")]
    for verb in (*jobs, "pipeline", "status", "logs", "cancel", "report", "demo", "config", "data", "profile"):
        assert f"  {verb} " in text, verb
    text = tiny.sorahpc("profile", "--help", cwd=tmp_path).stdout
    for verb in ("kernels", "train", "sample", "report"):
        assert f"  {verb} " in text, verb


def test_the_folder_one_is_in_is_a_path_like_any_other(tmp_path: Path, here: Callable[..., Done]) -> None:
    done = here("config", "check", tiny.write_config(tmp_path), "prepare.videos=.", "kernels.baseline=.")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["", "123", "a #b.json", "[x", "ü 😀: 1", "null", "a: b", "."])
def test_the_text_of_an_option_is_this_text(
    text: str, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[KernelsConfig] = []

    def launch(job: str, config: str, overrides: list[str], cluster: str | None, **how: bool) -> int:
        found.append(load_config(config, overrides, cluster).kernels)
        return 0

    monkeypatch.setattr("sorahpc.cli.profile.launch_job", launch)
    done = here("profile", "kernels", "--only", "K1 r", "--baseline", text, "--margin", "1e-05")
    assert (done.returncode, done.stderr) == (0, "")
    assert (found[0].only, found[0].baseline, found[0].margin) == ("K1 r", Path(text), 1e-5)


def test_options_of_profile_are_overrides_of_its_sections(tmp_path: Path, here: Callable[..., Done]) -> None:
    config = tiny.write_config(tmp_path)
    done = here("profile", "train", config, "--steps", "3", "--ranks", "0,1", "--cluster", "slurm", "--dry-run")
    assert "-m sorahpc.cluster.worker --spec" in done.stdout and "jobs/profile-train/spec.json" in done.stdout
    assert "#SBATCH --ntasks-per-node=2" in done.stdout
    done = here("profile", "kernels", "kernels.repeats=5", "--only", "K1", "--cluster", "slurm", "--dry-run")
    assert done.returncode == 0 and "runs/profile/jobs/profile-kernels" in done.stdout, "the shipped config"
    for args, expected in (
        (["train", config, "--ranks", "2"], "profile.ranks: expected ranks from 0 to 1, not [2]"),
        (["train", config, "--ranks", "x"], 'profile.ranks.0: expected a whole number, found "x"'),
        (["train", config, "--ranks", "0,-1"], 'profile.ranks.1: expected greater than or equal to 0, found "-1"'),
        (["train", config, "--ranks", "9" * 5000], "profile.ranks.0: expected a whole number, found"),
        (["train", config, "profile.ranks=[]"], "profile.ranks: expected at least 1 item, found []"),
        (
            ["train", config, "train.betas=[0.1,0.2,0.3]"],
            "train.betas: expected at most 2 items, found [0.1, 0.2, 0.3]",
        ),
        (["train", config, "--tool", "gdb"], "profile.tool: expected 'torch', 'nsys' or 'ncu', found \"gdb\""),
        (
            ["kernels", "--margin", "0.2"],
            "kernels.margin: expected kernels.baseline beside it, which it is held against",
        ),
        (["kernels", "--margin", "-1"], "kernels.margin: expected greater than or equal to 0, found -1"),
        (["kernels", "--baseline", "nowhere.json", "--dry-run=x"], "--dry-run"),
        (
            ["kernels", "--only", "K9"],
            "kernels.only: expected the beginning of one of K1 rope3d, K2 qk-norm + rope3d, ",
        ),
        (
            ["kernels", "kernels.threads=[1,2,1]", "--dry-run"],
            "kernels.threads: expected different numbers, not [1, 2, 1]",
        ),
        (["report", "r", "--out", ""], "--out: '.' is a folder; expected the name of the page to write"),
        (["report", "r", "--out", str(tmp_path)], "is a folder; expected the name of the page to write"),
        (
            ["report", "r", "--out", "/dev/null"],
            "'/dev/null' is a device, pipe or socket; expected the name of the page",
        ),
    ):
        done = here("profile", *args)
        assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("cluster", ["local", "slurm"])
@pytest.mark.parametrize("verb", ["train", "pipeline"])
def test_a_dry_run_is_json_too(tmp_path: Path, here: Callable[..., Done], cluster: str, verb: str) -> None:
    config = tiny.write_config(tmp_path)
    done = here(verb, config, "--cluster", cluster, "--dry-run", "--json")
    plans = json.loads(done.stdout)
    plans = plans if isinstance(plans, list) else [plans]
    assert [p["job"] for p in plans] == (["prepare", "encode", "train", "sample"] if verb == "pipeline" else ["train"])
    assert all(p["kind"] == cluster and p["script"].startswith("#!/bin/bash\n") for p in plans)
    if (verb, cluster) == ("pipeline", "slurm"):
        assert "--dependency=afterok:ENCODE_JOB_ID" in plans[2]["script"]
    assert not (tmp_path / "runs").exists()


def test_config_show_is_a_config_again(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    shown = tiny.sorahpc("config", "show", config, "train.lr=1e-3", cwd=tmp_path).stdout
    (tmp_path / "again.yaml").write_text(shown)
    assert tiny.sorahpc("config", "show", "again.yaml", cwd=tmp_path).stdout == shown
    as_json = json.loads(tiny.sorahpc("config", "show", config, "train.lr=1e-3", "--json", cwd=tmp_path).stdout)
    assert as_json == yaml.safe_load(shown) and as_json["train"]["lr"] == 1e-3
    assert tiny.sorahpc("config", "check", config, cwd=tmp_path).stdout == f"{config}: ok\n"
    assert json.loads(tiny.sorahpc("config", "schema", cwd=tmp_path).stdout)["title"] == "Config"


def test_an_unwritable_runs_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    done = tiny.sorahpc("train", tiny.write_config(tmp_path), cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert "set runs_dir to a writable folder" in done.stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    command = f"{sys.executable} -m sorahpc.cli config schema | head -c 10"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=tiny.env(), capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""


def test_a_cluster_of_ones_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("kind: slurm\npartition: debug\n")
    config = tiny.write_config(tmp_path)
    done = tiny.sorahpc("train", config, "--cluster", "site.yaml", "cluster.qos=low", "--dry-run", cwd=tmp_path)
    assert "#SBATCH --partition=debug" in done.stdout and "#SBATCH --qos=low" in done.stdout


def test_prepare_and_encode_end_by_naming_what_they_could_not_use(tmp_path: Path) -> None:
    from videos import numbered, write_video

    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/good.mp4", numbered(9))
    (tmp_path / "videos/good.txt").write_text("numbers")
    for i in range(11):
        (tmp_path / f"videos/bad{i:02d}.mp4").write_bytes(b"")
        (tmp_path / f"videos/bad{i:02d}.txt").write_text("bad")
    config = tiny.write_config(tmp_path)

    def call(*args: str) -> str:  # the real jobs, not the tiny ones
        done = subprocess.run(
            [sys.executable, "-m", "sorahpc.cli", *args], cwd=tmp_path, env=tiny.env(PYTHONPATH=str(tiny.ROOT)),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    named = [f"rejected bad{i:02d}.mp4: empty file: 0 bytes" for i in range(10)]
    more = "and 1 more; see runs/tiny/manifest.parquet"
    assert call("prepare", str(config)).splitlines() == ["prepare: done; run folder runs/tiny", *named, more]

    (tmp_path / "runs/tiny/cache").mkdir()
    (tmp_path / "runs/tiny/cache/rejected.json").write_text(
        '[{"key": "", "source": "/v/a\\nb.mp4", "reason": "too short"}]'
    )
    assert json.loads(tiny.sorahpc("encode", config, "--json", cwd=tmp_path).stdout)["rejected"] == 1
    with_captions = tiny.write_config(tmp_path / "runs", caption={"path": "llm"})
    rows = [Row(f"{i:016x}", "" if i else "a caption", "refusal" if i else "", "x") for i in range(12)]
    write_captions(tmp_path / "runs/tiny/captions.parquet", rows, "")
    kept = [f"clip {i:016x} keeps its caption: refusal" for i in range(1, 11)]
    assert tiny.sorahpc("caption", with_captions, cwd=tmp_path).stdout.splitlines() == [
        "caption: done; run folder runs/tiny", *kept, "and 1 more; see runs/tiny/captions.parquet"
    ]  # fmt: skip
    assert json.loads(tiny.sorahpc("caption", with_captions, "--json", cwd=tmp_path).stdout)["kept"] == 11
    done = tiny.sorahpc("pipeline", config, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] == [
        "encode: rejected /v/a\\nb.mp4: too short",
        "pipeline: done; run folder runs/tiny",
    ]
