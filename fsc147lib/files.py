"""Write files and folders all or nothing: beside their place first, then renamed; and check files before reading."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

MAX_BYTES = 2**30  # largest file that is read; FSC147's largest has 30 MB


def need_inside(path: Path, root: Path) -> Path:
    """Return the path; OSError if it is a link to a place outside the root."""
    real = os.path.realpath(path)
    if os.path.islink(path) and not Path(real).is_relative_to(os.path.realpath(root)):
        raise OSError(f"it links out of the root, to {real}")
    return path


def need_file(path: str | Path, most: int | None = MAX_BYTES) -> Path:
    """Return the path; OSError unless it is a regular file of at most `most` bytes (a pipe may never end)."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is a pipe, a device or a folder, and no file")
    if most is not None and found.st_size > most:
        raise OSError(f"{path} has {found.st_size:,} bytes, more than {most:,}")
    return Path(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file and make its folder.  The old file stays until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".writing")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: str | Path, value) -> None:
    """Write a value as JSON; ValueError for NaN and infinity, which JSON does not have."""
    try:
        write_text(path, json.dumps(value, indent=1, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error


@contextmanager
def new_folder(folder: Path, replace: bool = False, keep: bool = False) -> Iterator[Path]:
    """Yield the path of a draft folder to make and fill; at the end it is renamed to `folder`.

    Args:
        replace: put it in the place of a folder with content; False raises FileExistsError for such a folder.
        keep: leave the replaced folder beside it, with the ending ".old".
    """
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: name a new folder, or remove it first")
    draft = folder.with_name(folder.name + ".writing")
    shutil.rmtree(draft, ignore_errors=True)  # left by a crash
    try:
        yield draft
        recover_folder(folder)
        old = set_aside(folder)
        draft.rename(folder)
        if not keep:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a folder, if it exists, to its name with ".old"; returns that path."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old


def recover_folder(folder: Path) -> None:
    """Undo `set_aside` if the folder is missing, after a crash in the middle of a replacement."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock, which ends with the process; filelock.Timeout if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, timeout=0):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not remove a file in use
                path.unlink()


MANIFEST = "manifest.json"  # sizes and SHA-256 of a folder's files
START = 2**20  # bytes at the start of a file that are always compared


class DamagedFolder(ValueError):
    """A file of a folder differs from its manifest; the message names it."""


def write_manifest(folder: Path, **about) -> None:
    """Write a folder's manifest: each file's size and SHA-256 (of the start and of the whole), and `about`."""
    files = {
        path.name: {"bytes": path.stat().st_size, "start": _sha256(path, START), "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1))


def read_manifest(folder: str | Path, whole: bool = False) -> dict | None:
    """Compare a folder's files with its manifest and return the manifest; None if it has none.

    By default sizes and the first MiB are compared, and missing files are ignored.  `whole` compares all bytes.

    Raises:
        DamagedFolder: a file differs from the manifest, or (with `whole`) is missing.
    """
    folder, path = Path(folder), Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        for name, known in manifest["files"].items():
            file = folder / Path(name).name
            if not file.exists() and not whole:
                continue
            size = need_file(file, most=None).stat().st_size
            if size != known["bytes"]:
                raise DamagedFolder(f"{file} has {size:,} bytes, but {known['bytes']:,} were written")
            if _sha256(file, START) != known["start"] or whole and _sha256(file) != known["sha256"]:
                raise DamagedFolder(f"{file} holds other bytes than were written (if on purpose: remove {path})")
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFolder(f"{path} cannot be used ({type(error).__name__}: {error})") from error
    return manifest


def _sha256(path: Path, most: int = -1) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if most < 0 else hashlib.sha256(file.read(most))
    return digest.hexdigest()
