"""What the README tells a new user to type, typed: the section on one's own videos, on a tiny folder of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sorahpc.data.toyworld import write_world

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# A new user edits the copied config; this one makes the training short.
EDITS = {
    "steps: 1000": "steps: 6",
    "warmup_steps: 50": "warmup_steps: 2",
    "depth: 6": "depth: 2",
    "dim: 128": "dim: 32",
    "steps: 25": "steps: 3",
}


def blocks(title: str) -> list[str]:
    """The shell blocks of a section."""
    section = re.split(r"^## ", README.split(f"## {title}\n", 1)[1], flags=re.MULTILINE)[0]
    return re.findall(r"^```sh\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def test_every_command_the_readme_names_exists() -> None:
    out = subprocess.run([sys.executable, "-m", "sorahpc.cli", "--help"], capture_output=True, text=True, check=True)
    verbs = set(re.findall(r"^  ([a-z][a-z-]+) ", out.stdout, flags=re.MULTILINE))
    named = set(re.findall(r"^sorahpc ([a-z-]+)|`sorahpc ([a-z-]+)", README, flags=re.MULTILINE))
    assert {a or b for a, b in named} <= verbs


def test_every_path_of_the_checkout_the_readme_names_exists() -> None:
    for path in re.findall(r"(?:configs|slurm)/[\w./]*\w", README):
        assert (ROOT / path).exists(), path


@pytest.mark.timeout(600)
def test_the_commands_for_own_videos_run_on_a_folder_of_mp4_files(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    write_world(tmp_path / "my_videos", 12, 7)
    (tmp_path / "my_videos" / "broken.mp4").write_bytes(b"\0" * 100)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = "\n".join(blocks("Your own videos"))
    assert script.count("sorahpc ") == 7
    edits = "".join(f"sed -i 's/{a}/{b}/' my_videos.yaml\n" for a, b in EDITS.items())
    script = script.replace("printf", f"{edits}printf", 1)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "my_videos"
    assert sorted(p.name for p in (run / "samples").glob("*.mp4")) == [
        "00000-a-dog-runs-on-the-beach.mp4",
        "00001-a-red-car-at-night.mp4",
    ]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "a dog runs on the beach" in page and page.count("<video") == 2 + 2 * 6
