"""The document inside every checkpoint that says what it is, and the digest of each of its files.

It is the last file of a checkpoint to be written. Orbax alone does not notice a flipped byte in its data, so
every file is checked against its digest before orbax reads it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_jax.checkpoint.errors import RECOVER, CheckpointError

FORMAT_VERSION = 1
NAME = "moe_jax.json"
_THREADS = 8

Manifest = dict[str, Any]
"""``format_version``, ``step``, ``items`` (folders of arrays), ``leaves`` (array: ``{"shape", "dtype"}``),
``made_by``, ``meta`` (the caller's), ``files`` (``{"bytes", "sha256"}``) and ``sha256`` (of the rest)."""


def draft_manifest(
    step: int,
    items: Iterable[str],
    leaves: Mapping[str, object],
    made_by: Mapping[str, object],
    meta: Mapping[str, object],
) -> Manifest:
    """A manifest whose files are not written yet.

    Raises:
        CheckpointError: `meta` is not strict JSON.
    """
    draft = {"step": step, "items": list(items), "leaves": leaves, "made_by": made_by, "meta": meta}
    try:
        return {"format_version": FORMAT_VERSION, **json.loads(json.dumps(draft, allow_nan=False))}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"step {step}: meta must be JSON values without NaN ({error})") from error


def write_manifest(folder: Path, draft: Manifest) -> None:
    """Completes `draft` with the files that lie in the items of `folder`, and puts it there."""
    paths = sorted(path for item in draft["items"] for path in (folder / item).rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_file_sha256, paths)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    manifest = {**draft, "files": files}
    with open(folder / NAME, "w", encoding="utf-8") as stream:
        json.dump({**manifest, "sha256": _content_sha256(manifest)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        CheckpointError: it is damaged, or from another version of this format.
    """
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        damaged = version == FORMAT_VERSION and _content_sha256(manifest) != manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); {RECOVER}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this version of moe_jax reads format "
            f"{FORMAT_VERSION}; use the version it was made by: {manifest.get('made_by')}"
        )
    if damaged:
        raise CheckpointError(f"{path} is damaged (its own digest differs); {RECOVER}")
    return manifest


def missing_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files of the manifest that are not in `folder` with their full size; reads none of them."""

    def size_bytes(path: Path) -> int:
        return path.stat().st_size if path.is_file() else -1

    return [name for name, file in manifest["files"].items() if size_bytes(folder / name) != file["bytes"]]


def check_files(folder: Path, manifest: Manifest, items: Iterable[str]) -> None:
    """Reads every file of `items` and compares it with its digest.

    Raises:
        CheckpointError: a file is missing, cut or changed.
    """
    names = [name for item in items for name in manifest["files"] if name.startswith(f"{item}/")]
    missing = [name for name in missing_files(folder, manifest) if name in names]
    if missing:
        raise CheckpointError(f"{folder} is damaged: {missing[0]} is missing or cut; {RECOVER}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(
            names, pool.map(lambda name: _file_sha256(folder / name), names), strict=True
        ):
            if digest != manifest["files"][name]["sha256"]:
                raise CheckpointError(f"{folder} is damaged: {name} changed since it was saved; {RECOVER}")


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content_sha256(manifest: Manifest) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
