"""The sbatch script as a pure string: what is asked of Slurm, that shipped scripts ask the same, and hostile values."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny

from sorahpc.cluster import submit
from sorahpc.cluster.launch import JOBS, pipeline_jobs
from sorahpc.cluster.submit import env_sh, script
from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.errors import ConfigError, SoraHPCError

SLURM = {"kind": "slurm"}


def config(**sections: Any) -> Config:
    return parse_config(tiny.config_data(**{"cluster": SLURM, **sections}))


def options(text: str) -> dict[str, str]:
    """`#SBATCH --key=value` lines; words as sbatch splits them."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            key, _, value = shlex.split(line.removeprefix("#SBATCH "))[0].partition("=")
            found[key] = value
    return found


def srun_words(text: str) -> list[str]:
    (line,) = [x for x in text.splitlines() if x.startswith("srun ")]
    return shlex.split(line)


def test_what_a_gang_asks_for() -> None:
    resources = {"nodes": 2, "tasks_per_node": 4, "cpus_per_task": 8, "mem_gb": 1.5, "time_min": 90}
    train = {"steps": 20, "tokens_per_pack": 8, "warmup_steps": 0, "packs_per_step": 8, "resources": resources}
    cluster = {
        **SLURM,
        "partition": "gpu",
        "account": "a1",
        "qos": "high",
        "constraint": "h100",
        "exclude": "n[1-2]",
        "nodelist": "n3,n4",
        "reservation": "r",
        "gpus_per_task": 1,
        "signal_lead_s": 300,
        "env": {"NCCL_DEBUG": "WARN"},
    }
    text = script(config(train=train, cluster=cluster), JOBS["train"], ["12", "13"])
    folder = Path("runs/tiny/jobs/train").absolute()
    assert options(text) == {
        "--job-name": "tiny-train",
        "--comment": "sorahpc:tiny:train",
        "--nodes": "2",
        "--ntasks-per-node": "4",
        "--cpus-per-task": "8",
        "--gpus-per-node": "4",
        "--mem": "1536M",
        "--time": "90",
        "--partition": "gpu",
        "--account": "a1",
        "--qos": "high",
        "--constraint": "h100",
        "--exclude": "n[1-2]",
        "--nodelist": "n3,n4",
        "--reservation": "r",
        "--dependency": "afterok:12:13",
        "--kill-on-invalid-dep": "yes",
        "--requeue": "",
        "--open-mode": "append",
        "--signal": "USR2@300",
        "--output": f"{folder}/slurm/%j_0_log.out",
    }
    words = srun_words(text)
    assert {"--kill-on-bad-exit=1", "--unbuffered", "--wait=60"} <= set(words)
    assert words[-4:] == ["-m", "sorahpc.cluster.worker", "--spec", f"{folder}/spec.json"]
    assert "export NCCL_DEBUG=WARN" in text.splitlines()
    assert 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"' in text.splitlines()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_what_an_array_asks_for_a_task() -> None:
    encode = {"resources": {"tasks": 300, "cpus_per_task": 2, "mem_gb": 8}}
    text = script(
        config(encode=encode, cluster={**SLURM, "max_array_parallel": 16, "gpus_per_task": 1}), JOBS["encode"], []
    )
    asked = options(text)
    assert asked["--array"] == "0-299%16"
    assert (asked["--nodes"], asked["--ntasks-per-node"], asked["--gpus-per-node"], asked["--mem"]) == (
        "1",
        "1",
        "1",
        "8192M",
    )
    assert asked["--output"].endswith("/slurm/%A_%a_0_log.out")
    one = options(script(config(encode={"resources": {"tasks": 1}}), JOBS["encode"], []))
    assert "--array" not in one and "--dependency" not in one and "--gpus-per-node" not in one


def test_no_gpu_is_asked_for_by_who_has_no_use_for_one() -> None:
    on_gpus = {**SLURM, "gpus_per_task": 1}
    local, server = {"path": "llm"}, {"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}
    asked = [
        "--gpus-per-node" in options(script(config(cluster=on_gpus, caption=caption), JOBS[job], []))
        for job, caption in (("prepare", local), ("caption", local), ("caption", server), ("encode", server))
    ]
    assert asked == [False, True, False, True]


def test_the_script_is_pure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # a machine without Slurm
    made = config()
    assert script(made, JOBS["train"], []) == script(made, JOBS["train"], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prepare", "caption", "encode", "train", "train-vae", "sample", "profile"])
def test_the_shipped_sbatch_script_makes_the_same_request(name: str) -> None:
    shipped = (tiny.ROOT / "slurm" / f"{name}.sbatch").read_text()
    mine = options(shipped)
    gang = {"tasks_per_node": 1, "nodes": 2}
    sections: dict[str, Any] = {
        "prepare": {"videos": "videos", "resources": {"tasks": 4}},
        "caption": {"path": "llm", "resources": {"tasks": 4}},
        "encode": {"resources": {"tasks": 4}},
        "train": {**tiny.config_data()["train"], "resources": gang},
        "train_vae": {"out": "o", "init": "vae", "steps": 1, "resources": gang},
        "sample": {"prompts": "p", "resources": {"tasks": 4}},
    }
    job = JOBS["profile-kernels" if name == "profile" else name]
    text = script(config(**{**sections, "cluster": {**SLURM, "max_array_parallel": 256}}), job, [])
    theirs = options(text)
    named = {"--job-name", "--comment", "--output"}  # what the launcher names after its run folder
    if "--array" in theirs:
        theirs["--array"] = theirs["--array"].replace("%4", "%256")  # submitit never says more than there are tasks
    assert {k: v for k, v in mine.items() if k not in named} == {k: v for k, v in theirs.items() if k not in named}

    def worker_and_flags(words: list[str]) -> tuple[set[str], list[str]]:
        python = words.index("-u")
        flags = {w for w in words[1 : python - 1] if w.startswith("--") and w != "--output"}
        return flags, words[python : python + 3]

    assert worker_and_flags(srun_words(shipped)) == worker_and_flags(srun_words(text))
    assert srun_words(shipped)[-2:] == ["$job" if name == "profile" else name, "$@"]
    assert '. "$SLURM_SUBMIT_DIR/slurm/env.sh"' in shipped
    assert "\n".join(env_sh()) in text  # the same environment and requeue trap, as text
    assert subprocess.run(["bash", "-n"], input=shipped, text=True).returncode == 0


HOSTILE = [
    "a; touch pwned",
    "`touch pwned`",
    "$(touch pwned)",
    "a'b",
    'a"b',
    "a\nb",
    "a\rb",
    "a\x00b",
    "a b",
    "-x",
    "--wrap=x",
    "a\u2028b",
    "a|b",
    "a>b",
    "a&b",
    "a*b",
    "#SBATCH",
    "",
]
FIELDS = ["partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation", "python", "env"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_is_refused_in_one_line_with_its_key(field: str, value: str) -> None:
    given: Any = {"KEY": value} if field == "env" else value
    with pytest.raises(ConfigError) as caught:
        config(cluster={**SLURM, field: given})
    assert str(caught.value).startswith(f"cluster.{field}") and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["A;B", "A B", "1A", "A-B", "A=B", "", "A\n"])
def test_a_hostile_variable_name_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.env"):
        config(cluster={**SLURM, "env": {key: "x"}})


@pytest.mark.parametrize("run", [v for v in HOSTILE if v != "a'b"] + ["../x", "a/b", ".", "a%j"])
def test_a_hostile_run_name_is_refused(run: str) -> None:
    with pytest.raises(ConfigError, match=r"^run: "):
        config(run=run)


@pytest.mark.parametrize("folder", HOSTILE[:5] + HOSTILE[8:11] + HOSTILE[12:17] + ["a  b", "é", "x' #"])
def test_a_run_folder_with_shell_syntax_is_quoted(folder: str, tmp_path: Path) -> None:
    runs = tmp_path / folder
    text = script(config(runs_dir=str(runs)), JOBS["train"], []) if folder != "a\u2028b" else None
    if text is not None:
        job = runs / "tiny/jobs/train"
        assert srun_words(text)[-1] == f"{job}/spec.json"
        assert options(text)["--output"] == f"{job}/slurm/%j_0_log.out"
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        # What bash makes of the command line is the path, and nothing runs.
        line = next(x for x in text.splitlines() if x.startswith("srun "))
        shown = subprocess.run(
            ["bash", "-c", f'srun() {{ printf "%s\\0" "$@"; }}\n{line}'], cwd=tmp_path, capture_output=True, text=True
        )
        assert shown.stdout.split("\0")[-2] == f"{job}/spec.json" and not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("folder", ["a\nb", "a\rb", "a%jb", "a\\b", "a\u2028b", "a\x7fb", "a\tb"])
def test_a_run_folder_that_slurm_would_change_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(SoraHPCError, match="runs_dir") as caught:
        script(config(runs_dir=str(tmp_path / folder)), JOBS["train"], [])
    assert len(str(caught.value).splitlines()) == 1


def test_the_working_folder_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "a\nb"
    bad.mkdir()
    monkeypatch.chdir(bad)
    with pytest.raises(ConfigError, match="runs_dir"):
        script(config(), JOBS["train"], [])


def test_secrets_of_the_environment_are_not_in_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "hunter2canary")
    assert "hunter2canary" not in script(config(), JOBS["train"], [])


def test_the_requeue_trap_keeps_the_exit_code_and_requeues_only_a_running_job(tmp_path: Path) -> None:
    for program, body in (("squeue", 'echo "$STATE"'), ("scontrol", 'echo "$@" >> calls')):
        (tmp_path / program).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / program).chmod(0o755)

    def run(code: int, state: str, **env: str) -> tuple[int, str]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "STATE": state, **env}
        text = "\n".join([*env_sh(), f"(exit {code})"])
        done = subprocess.run(["bash", "-c", text], env=env, cwd=tmp_path)
        return done.returncode, calls.read_text().strip() if calls.exists() else ""

    assert run(10, "RUNNING") == (10, "requeue 7")
    assert run(10, "RUNNING", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3") == (10, "requeue 5_3")
    assert run(10, "COMPLETING") == (10, "")  # cancelled
    for code in (0, 1, 2, 3, 4, 5, 16, 20, 137, 143):
        assert run(code, "RUNNING") == (code, "")


def test_a_requests_time_and_memory_are_whole(tmp_path: Path) -> None:
    train = {**tiny.config_data()["train"], "resources": {"tasks_per_node": 2, "mem_gb": 0.0001}}
    assert options(script(config(train=train), JOBS["train"], []))["--mem"] == "1M"


def test_the_pipeline_is_the_jobs_that_the_config_has_sections_for() -> None:
    assert [j.name for j in pipeline_jobs(config())] == ["prepare", "encode", "train", "sample"]
    whole = ["prepare", "caption", "encode", "train", "sample"]
    assert [j.name for j in pipeline_jobs(config(caption={"path": "llm"}))] == whole
    assert "caption" not in [j.name for j in pipeline_jobs(config(caption={"path": "llm", "clips": False}))]
    data = tiny.config_data()
    del data["prepare"], data["text"]
    with pytest.raises(ConfigError, match="text: missing; `encode` needs"):
        pipeline_jobs(parse_config(data))
    with pytest.raises(ConfigError, match="expected at least one"):
        pipeline_jobs(parse_config({"run": "x"}))


def test_sbatch_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sorahpc.runs import JobFolder

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SoraHPCError, match="sbatch: not found; run this on a login node"):
        submit.submit(JobFolder(tmp_path, "train"), "")


def test_only_one_module_imports_submitit() -> None:
    found = [
        p.name
        for p in (tiny.ROOT / "sorahpc").rglob("*.py")
        if re.search(r"^\s*(import|from) submitit", p.read_text(), re.M)
    ]
    assert found == ["submit.py"]
