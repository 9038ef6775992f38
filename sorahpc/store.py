"""The weights store: what `sorahpc fetch` brought to this cluster, and how a config names it.

    <store>/<name>/manifest.json    repository, commit, size and sha256 of each file: written last, with it all is there
    <store>/<name>/vae/...          the files, as they lie in the repository

The store is $SORAHPC_STORE, or ~/.cache/sorahpc. A name in `vae.path` or `text.path` stands for a folder in it, unless
there is a file or folder of that name. Only a login node needs a network: a job's tasks have none and ask for none.

What comes from a repository is taken by an allow-list, safetensors, JSON and tokenizer files, and held against the
sizes and hashes that the repository states. No code and no pickle comes with it. No torch here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sorahpc.errors import ConfigError, DataError, SetupError
from sorahpc.runs import fsync_dir, read_json, write_json

MANIFEST = "manifest.json"
_WANTED = re.compile(
    r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors|[\w.-]+\.json|[\w-]+\.model|merges\.txt|vocab\.txt"
)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})((?:/{_PART})*)(?:@({_PART}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    folders: of the repository, the first of them the model's own; "" is its root. kind: what they are, "vae", "text"
    or "vgg"; "" if only the user knows.
    """

    repository: str
    folders: tuple[str, ...]
    kind: str = ""
    revision: str = "main"


def _text(repository: str, folder: str = "text_encoder", tokenizer: str = "tokenizer") -> Source:
    return Source(repository, (folder, tokenizer) if folder else ("",), "text")


# Those of T5 v1.1 in google's own repositories are pickles; CogVideoX carries the encoder of the xxl as safetensors.
NAMES = {
    "cogvideox": Source("THUDM/CogVideoX-2b", ("vae",), "vae"),
    "cosmos": Source("nvidia/Cosmos-1.0-Tokenizer-CV8x8x8", ("vae",), "vae"),
    "hunyuan-video": Source("hunyuanvideo-community/HunyuanVideo", ("vae",), "vae"),
    "hunyuan-video-1.5": Source("hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v", ("vae",), "vae"),
    "ltx": Source("Lightricks/LTX-Video", ("vae",), "vae"),
    "open-sora-1.2": Source("hpcai-tech/OpenSora-VAE-v1.2", ("",), "vae"),
    "mochi": Source("genmo/mochi-1-preview", ("vae",), "vae"),
    "wan-2.1": Source("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ("vae",), "vae"),
    "wan-2.2": Source("Wan-AI/Wan2.2-TI2V-5B-Diffusers", ("vae",), "vae"),
    "vgg16": Source("timm/vgg16.tv_in1k", ("",), "vgg"),
    "clip-l": _text("hunyuanvideo-community/HunyuanVideo", "text_encoder_2", "tokenizer_2"),
    "flan-t5-base": _text("google/flan-t5-base", ""),
    "flan-t5-xl": _text("google/flan-t5-xl", ""),
    "flan-t5-xxl": _text("google/flan-t5-xxl", ""),
    "t5-v1.1-xxl": _text("THUDM/CogVideoX-2b"),
    "umt5-xxl": _text("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
}


def store_dir() -> Path:
    return Path(os.environ.get("SORAHPC_STORE") or Path.home() / ".cache" / "sorahpc")


def source_of(what: str) -> tuple[str, Source]:
    """(folder name in the store, source) of a known name or `owner/repository[/folder][@revision]`.

    Raises:
        ConfigError: neither.
    """
    name, _, revision = what.partition("@")
    if name in NAMES:
        known = NAMES[name]
        return name, Source(known.repository, known.folders, known.kind, revision or known.revision)
    match = _REPOSITORY.fullmatch(what)
    if match is None:
        raise ConfigError(
            f"fetch: expected {', '.join(sorted(NAMES))} or owner/repository[/folder][@revision], found {what!r}"
        )
    folder = match[2].removeprefix("/")
    # The tokenizer of a pipeline's text encoder lies beside it.
    beside = (folder.replace("text_encoder", "tokenizer"),) if folder.startswith("text_encoder") else ()
    return name.replace("/", "--"), Source(match[1], (folder, *beside), "", match[3] or "main")


def resolve(path: Path, kind: str, where: str) -> Path:
    """The folder that a config's `path` stands for: itself, or of a known name its folder in the store.

    Args:
        kind: "vae", "text" or "vgg". where: the dotted key, for the message.

    Raises:
        ConfigError: a name of the other kind. SetupError: a name that isn't in the store.
    """
    name = str(path)
    if name not in NAMES or path.exists():
        return path
    source, folder = NAMES[name], store_dir() / name
    if source.kind != kind:
        raise ConfigError(f"{where}: {name} names a {source.kind}, expected a {kind}")
    if not (folder / MANIFEST).is_file():
        raise SetupError(
            f"{where}: {name} is not in the store {store_dir()}; run `sorahpc fetch {name}` on a machine with a "
            "network, such as a login node (SORAHPC_STORE says where the store is)"
        )
    return folder / source.folders[0]


def fetch(what: str, store: Path) -> dict[str, Any]:
    """Bring weights into the store; what is there already is left as it is, and costs nothing.

    Returns:
        name, path (of the model's folder), repository, revision (the commit), files (name -> bytes, sha256), and
        `fetched`: whether anything was brought.

    Raises:
        ConfigError: no such name, or another revision is there. SetupError: no network or no access. DataError: the
        repository lacks weights in safetensors, or what came is not what it states.
    """
    name, source = source_of(what)
    folder = store / name
    found = read_json(folder / MANIFEST)
    if found is not None:
        if source.revision != "main" and not str(found.get("revision")).startswith(source.revision):
            raise ConfigError(
                f"fetch: {folder} holds revision {found.get('revision')}, not {source.revision}; delete it to replace"
            )
        return {**found, "path": str(folder / source.folders[0]), "fetched": False}
    if folder.exists():
        raise DataError(f"fetch: {folder} has no readable {MANIFEST}: it is not whole; delete it and fetch again")
    commit, listed = _listing(source)
    wanted = {path: stated for path, stated in listed.items() if _is_wanted(path, source)}
    own = {PurePosixPath(p).name for p in wanted if _folder(p) == source.folders[0]}
    if "config.json" not in own or not any(n.endswith(".safetensors") for n in own):
        raise DataError(
            f"fetch: {source.repository}@{commit[:12]} has no config.json with safetensors in its folder "
            f"{source.folders[0] or '/'!r} (found {len(own)} files to take); pickles are never fetched"
        )
    # A name of its own for the commit: fetching again goes on with the files that are there.
    part = store / f".{name}.{commit[:12]}.part"
    files = {}
    for path, stated in sorted(wanted.items()):
        _download(source, commit, path, part)
        try:
            files[path] = _checked(part / path, stated, f"{source.repository}@{commit[:12]}: {path}")
        except DataError as error:
            (part / path).unlink(missing_ok=True)  # the client would take it for whole the next time
            raise DataError(f"fetch: {error}; fetch it again") from None
    shutil.rmtree(part / ".cache", ignore_errors=True)  # the hub client's own notes
    manifest = {"name": name, "repository": source.repository, "revision": commit, "files": files}
    write_json(part / MANIFEST, manifest)
    for path in files:
        with open(part / path, "rb") as f:
            os.fsync(f.fileno())
    for place in {part, *((part / path).parent for path in files)}:
        fsync_dir(place)
    try:
        os.rename(part, folder)
    except OSError:  # another fetch of the same name was first
        found = read_json(folder / MANIFEST)
        if found is None:
            raise
        shutil.rmtree(part, ignore_errors=True)
        return {**found, "path": str(folder / source.folders[0]), "fetched": False}
    fsync_dir(store)
    return {**manifest, "path": str(folder / source.folders[0]), "fetched": True}


def verify(what: str | None, store: Path) -> list[dict[str, Any]]:
    """Read every file of a name, or of all that is in the store, and hold it against its manifest.

    Returns:
        name, revision and bytes of each.

    Raises:
        ConfigError: nothing of that name is there. DataError: one line a file that is missing or altered.
    """
    if what is None:
        names = sorted(p.parent.name for p in store.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
    else:
        names = [source_of(what)[0]]
    results, faults = [], []
    for name in names:
        folder = store / name
        manifest = read_json(folder / MANIFEST)
        files = (manifest or {}).get("files")
        if manifest is None or not isinstance(files, dict):
            raise ConfigError(f"fetch: {name} is not in the store {store}; run `sorahpc fetch {what or name}`")
        total = 0
        for path, stated in files.items():
            try:
                if not _is_inside(path):
                    raise DataError(f"{folder / MANIFEST}: names {path!r}, which is no file of its folder")
                _checked(folder / path, stated, str(folder / path))
                total += stated["bytes"]
            except (DataError, OSError, KeyError, TypeError) as error:
                reason = str(error) if isinstance(error, DataError) else f"{folder / path}: {error}"
                faults.append(f"{reason}; delete {folder} and fetch it again")
        results.append({"name": name, "revision": manifest.get("revision"), "files": len(files), "bytes": total})
    if faults:
        raise DataError("\n".join(faults))
    return results


def _folder(path: str) -> str:
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def _is_inside(path: Any) -> bool:
    return isinstance(path, str) and all(re.fullmatch(_PART, part) for part in path.split("/"))


def _is_wanted(path: str, source: Source) -> bool:
    inside = _is_inside(path) and _folder(path) in source.folders
    name = PurePosixPath(path).name
    return inside and name != MANIFEST and _WANTED.fullmatch(name) is not None


def _checked(path: Path, stated: dict[str, Any], what: str) -> dict[str, Any]:
    """Bytes and sha256 of a file that has the size and the hash (sha256, or git's of a small file) stated."""
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{what}: no file there")
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha256.update(block)
            if "git" in stated:
                git.update(block)
    for key, found in (("bytes", size), ("sha256", sha256.hexdigest()), ("git", git.hexdigest())):
        if stated.get(key) not in (None, found):
            raise DataError(f"{what}: {key} {stated[key]} expected, found {found}")
    return {"bytes": size, "sha256": sha256.hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def _hub() -> Any:
    try:
        import huggingface_hub  # 0.2 s: only where something is fetched
    except ImportError as error:
        raise SetupError(f"fetch: huggingface_hub can't be imported ({error}); pip install huggingface_hub") from None
    return huggingface_hub


def _reached(source: Source, error: Exception) -> SetupError:
    kind = type(error).__name__
    first = next(iter(str(error).strip().splitlines()), "") or kind
    advice = {
        "RepositoryNotFoundError": "no such repository, or one that needs HF_TOKEN",
        "GatedRepoError": "accept its terms with your account and set HF_TOKEN",
        "RevisionNotFoundError": f"it has no revision {source.revision}",
        "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE here",
    }.get(kind, "expected a machine with a network, such as a login node")
    return SetupError(f"fetch: {source.repository}: {advice} ({kind}: {first[:200]})")


def _listing(source: Source) -> tuple[str, dict[str, dict[str, Any]]]:
    """(commit, file -> what the repository states of it)."""
    hub = _hub()
    try:
        info = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(
            source.repository, revision=source.revision, files_metadata=True
        )
    except (OSError, hub.errors.HTTPError) as error:
        raise _reached(source, error) from None
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise DataError(f"fetch: {source.repository}: the hub states no commit, found {info.sha!r}")
    listed = {}
    for file in info.siblings or ():
        stated = (
            {"bytes": file.size, "sha256": file.lfs.sha256} if file.lfs else {"bytes": file.size, "git": file.blob_id}
        )
        listed[file.rfilename] = {k: v for k, v in stated.items() if v is not None}
    return info.sha, listed


def _download(source: Source, commit: str, path: str, to: Path) -> None:
    hub = _hub()
    try:
        hub.hf_hub_download(
            source.repository, path, revision=commit, local_dir=to, endpoint=os.environ.get("HF_ENDPOINT")
        )
    except (OSError, hub.errors.HTTPError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, say, and not the network
            raise
        raise _reached(source, error) from None
