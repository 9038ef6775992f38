"""The weights store, fetched from a hub of our own: allow-listed, checked, whole or not there, and found by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_vae

from sorahpc import cli, store
from sorahpc.configfile import parse_config
from sorahpc.errors import ConfigError, DataError, SetupError
from sorahpc.models.text import load_text
from sorahpc.models.vae import WEIGHTS, load_vae

COMMIT = "0123456789abcdef" * 2 + "01234567"
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class Hub(ThreadingHTTPServer):
    """Speaks what the hub's client asks of it for public repositories. `files`: repository -> path -> bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.spoil: set[str] = set()  # paths that are served with other bytes than stated
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if self.command == "GET":
            self.server.asked.append(path)
        words = path.split("/")
        if words[:2] == ["api", "models"] and len(words) == 6 and words[4] == "revision":
            files = self.server.files.get("/".join(words[2:4]))
            if files is None:
                self._send(404, b"", X_Error_Code="RepoNotFound")
            elif words[5] not in ("main", COMMIT):
                self._send(404, b"", X_Error_Code="RevisionNotFound")
            else:
                body = {"id": "/".join(words[2:4]), "sha": COMMIT, "siblings": [_stated(*f) for f in files.items()]}
                self._send(200, json.dumps(body).encode(), Content_Type="application/json")
        elif len(words) > 4 and words[2] == "resolve" and words[3] == COMMIT:
            name = "/".join(words[4:])
            data = self.server.files.get("/".join(words[:2]), {}).get(name)
            if data is None:
                self._send(404, b"", X_Error_Code="EntryNotFound")
                return
            etag = hashlib.sha256(data).hexdigest()
            data = data[:-1] + b"?" if name in self.server.spoil else data
            self._send(200, data, X_Repo_Commit=COMMIT, ETag=f'"{etag}"')
        else:
            self._send(404, b"")


def _stated(path: str, data: bytes) -> dict[str, object]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": git}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return entry


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With one repository, of a pipeline: a VAE that loads, and what should never be taken."""
    vae = write_vae(tmp_path / "made")
    server.files = {
        WAN: {
            "vae/config.json": (vae / "config.json").read_bytes(), f"vae/{WEIGHTS}": (vae / WEIGHTS).read_bytes(),
            "vae/diffusion_pytorch_model.fp16.safetensors": b"a variant", "vae/diffusion_pytorch_model.bin": b"pickle",
            "vae/code.py": b"import os", "README.md": b"#", "model_index.json": b"{}", "vae/../x.json": b"{}",
            "transformer/diffusion_pytorch_model.safetensors": b"huge",
        },
        "a/pickles": {"config.json": b"{}", "pytorch_model.bin": b"\x80"},
    }  # fmt: skip
    server.spoil, server.asked = set(), []
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("SORAHPC_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return server


def test_a_name_is_fetched_once_by_an_allow_list_and_loads_by_that_name(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match=r"^vae.path: wan-2.1 is not in the store \S+; run `sorahpc fetch wan-2.1` on"):
        load_vae("wan-2.1")
    assert cli.main(["fetch", "wan-2.1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    folder = tmp_path / "store/wan-2.1"
    assert told["fetched"] is True and told["revision"] == COMMIT and told["path"] == str(folder / "vae")
    there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert there == ["manifest.json", "vae/config.json", f"vae/{WEIGHTS}"]
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["wan-2.1"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["repository"] == WAN and manifest["revision"] == COMMIT
    weights = hub.files[WAN][f"vae/{WEIGHTS}"]
    assert manifest["files"][f"vae/{WEIGHTS}"] == {
        "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()
    }  # fmt: skip

    config = parse_config({"run": "r", "vae": {"path": "wan-2.1"}})
    assert config.vae is not None
    vae = load_vae(config.vae.path)
    assert vae.weights_sha256 == load_vae(tmp_path / "made").weights_sha256

    hub.asked.clear()
    assert store.fetch("wan-2.1", tmp_path / "store")["fetched"] is False and not hub.asked
    with pytest.raises(ConfigError, match=f"holds revision {COMMIT}, not 2.0"):
        store.fetch("wan-2.1@2.0", tmp_path / "store")
    (tmp_path / "wan-2.1").mkdir()  # a path stays a path
    with pytest.raises(ConfigError, match=r"^vae.path: no config.json in wan-2.1"):
        load_vae("wan-2.1")


def test_of_two_fetches_at_once_one_is_first_and_a_folder_that_is_not_whole_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = tmp_path / "store", os.rename

    def late(source: Any, target: Any) -> None:
        """The other one is through between our last file and our rename."""
        if target == place / "wan-2.1":
            shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert store.fetch("wan-2.1", place)["fetched"] is False
    assert [p.name for p in place.iterdir()] == ["wan-2.1"] and store.verify("wan-2.1", place)
    (place / "wan-2.1" / store.MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"wan-2.1 has no readable manifest.json: .*delete it and fetch again"):
        store.fetch("wan-2.1", place)


def test_verify_names_every_file_that_is_missing_or_altered(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.fetch("wan-2.1", tmp_path / "store")
    store.fetch(f"{WAN}/vae@{COMMIT}", tmp_path / "store")
    assert cli.main(["fetch", "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ok, 2 files, ")[0] for line in lines] == ["Wan-AI--Wan2.1-T2V-1.3B-Diffusers--vae", "wan-2.1"]
    folder = tmp_path / "store/wan-2.1/vae"
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    (folder / "config.json").unlink()
    assert cli.main(["fetch", "--verify", "wan-2.1"]) == DataError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "config.json: no file there; delete" in lines[0] and "sha256" in lines[1]
    assert cli.main(["fetch", "--verify", "mochi"]) == ConfigError.exit_code
    assert "run `sorahpc fetch mochi`" in capsys.readouterr().err


def test_a_manifest_that_points_elsewhere_is_refused(hub: Hub, tmp_path: Path) -> None:
    store.fetch("wan-2.1", tmp_path / "store")
    manifest = tmp_path / "store/wan-2.1/manifest.json"
    value = json.loads(manifest.read_text())
    value["files"] = {"../../secret": {"bytes": 1, "sha256": "0"}, "vae/config.json": 3}
    manifest.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"names '\.\./\.\./secret', which is no file of its folder") as caught:
        store.verify("wan-2.1", tmp_path / "store")
    assert len(str(caught.value).splitlines()) == 2


def test_what_comes_damaged_is_no_entry_and_the_next_try_goes_on_with_the_rest(hub: Hub, tmp_path: Path) -> None:
    hub.spoil = {f"vae/{WEIGHTS}"}
    with pytest.raises(DataError, match=rf"vae/{WEIGHTS}: sha256 \w+ expected, found"):
        store.fetch("wan-2.1", tmp_path / "store")
    assert not (tmp_path / "store/wan-2.1").exists()
    with pytest.raises(SetupError, match="not in the store"):
        store.resolve(Path("wan-2.1"), "vae", "vae.path")
    hub.spoil, hub.asked = set(), []
    assert store.fetch("wan-2.1", tmp_path / "store")["fetched"] is True
    assert load_vae("wan-2.1").channels == 4
    assert not [path for path in hub.asked if path.endswith("config.json")]  # it was there


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("wan", ConfigError, "fetch: expected clip-l, .* or owner/repository"),
        ("../../etc/passwd", ConfigError, "fetch: expected"),
        ("a/b/../c", ConfigError, "fetch: expected"),
        ("a/nothing", SetupError, "fetch: a/nothing: no such repository"),
        ("wan-2.1@nine", SetupError, "it has no revision nine"),
        ("a/pickles", DataError, "has no config.json with safetensors in its folder '/' .*pickles are never fetched"),
        (f"{WAN}/transformer", DataError, "has no config.json with safetensors in its folder 'transformer'"),
    ],
)
def test_what_can_not_be_fetched_is_one_line_and_leaves_nothing(
    hub: Hub, tmp_path: Path, what: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        store.fetch(what, tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_without_a_network_it_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SetupError, match="expected a machine with a network, such as a login node"):
        store.fetch("wan-2.1", tmp_path / "store")


def test_a_name_of_the_other_kind_is_refused_where_it_stands(hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"^vae.path: umt5-xxl names a text, expected a vae"):
        load_vae("umt5-xxl")
    with pytest.raises(SetupError, match=r"^text.path: umt5-xxl is not in the store .*run `sorahpc fetch umt5-xxl`"):
        load_text("umt5-xxl")


def test_a_text_encoder_of_a_pipeline_brings_its_tokenizer(hub: Hub, tmp_path: Path) -> None:
    from sorahpc.models.text import make_tiny_t5

    make_tiny_t5(tmp_path / "t5", ["a red circle"], dim=16)
    hub.files[WAN] |= {
        f"{'tokenizer' if 'token' in p.name else 'text_encoder'}/{p.name}": p.read_bytes()
        for p in (tmp_path / "t5").iterdir()
    }
    store.fetch("umt5-xxl", tmp_path / "store")
    assert torch.equal(load_text("umt5-xxl").encode(["a"])[0], load_text(tmp_path / "t5").encode(["a"])[0])


def test_without_a_name_it_lists_what_can_be_named(
    hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store.fetch("wan-2.1", tmp_path / "store")
    assert cli.main(["fetch", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["names"]
    assert names["wan-2.1"] is True and names["mochi"] is False and set(names) == set(store.NAMES)
