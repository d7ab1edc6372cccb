"""Write files and folders beside their place and rename them, so that an error never leaves half of one; and look
at what is to be read before it is opened.

Left out: formats.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

MAX_BYTES = 2**30  # a larger file is not read: FSC147's largest has 30 MB


def need_inside(path: Path, root: Path) -> Path:
    """The path, unless it is a link that leads out of the root: then OSError."""
    real = os.path.realpath(path)
    if os.path.islink(path) and not Path(real).is_relative_to(os.path.realpath(root)):
        raise OSError(f"it links out of the root, to {real}")
    return path


def need_file(path: str | Path, most: int | None = MAX_BYTES) -> Path:
    """The path of a file that ends; OSError where opening it might wait for ever, as a pipe does."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is a pipe, a device or a folder, and no file")
    if most is not None and found.st_size > most:
        raise OSError(f"{path} has {found.st_size:,} bytes, more than {most:,}")
    return Path(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, making its folder; what was there stays until the new text is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".writing")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: str | Path, value) -> None:
    """Write a value as JSON, all or nothing; a ValueError where it holds NaN or infinity, which JSON has not."""
    try:
        write_text(path, json.dumps(value, indent=1, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error


@contextmanager
def new_folder(folder: Path, replace: bool = False, keep: bool = False) -> Iterator[Path]:
    """A draft beside the folder, not made yet, to fill; it is put in the folder's place at the end.

    Args:
        replace: put it in the place of what the folder holds; else FileExistsError if that is anything.
        keep: leave what was replaced beside it, see `set_aside`.
    """
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: name a new folder, or remove it first")
    draft = folder.with_name(folder.name + ".writing")
    shutil.rmtree(draft, ignore_errors=True)  # of an earlier crash
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
    """Move a folder, if it is there, to its name with ".old"; returns that name."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old


def recover_folder(folder: Path) -> None:
    """Bring back what a crash in the middle of a replacement, or a failed new start, left set aside."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


@contextmanager
def file_lock(path: Path, wait: bool) -> Iterator[None]:
    """Hold a lock that frees itself where the process dies; filelock.Timeout if another has it, unless we `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, timeout=-1 if wait else 0):
        try:
            yield
        finally:
            with suppress(OSError):  # where a file in use cannot be removed, it stays
                path.unlink()


# --- Manifests: whether a folder holds what was written into it

MANIFEST = "manifest.json"
START = 2**20
"""Bytes at the start of a file that are always compared; of most files that is all of it."""


class DamagedFolder(ValueError):
    """A folder's files are not those that were written into it; the message names one."""


def write_manifest(folder: Path, **about) -> None:
    """Write down each file's size and SHA-256, of the whole and of its start, and what else is to be known of them."""
    files = {
        path.name: {"bytes": path.stat().st_size, "start": _sha256(path, START), "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1))


def read_manifest(folder: str | Path, whole: bool = False) -> dict | None:
    """A folder's manifest, after its files were compared with it; None where the folder has none.

    Args:
        whole: compare all bytes, and not only sizes and starts.

    Raises:
        DamagedFolder: a file of the manifest is another, or is missing though `whole` is asked for.
    """
    folder, path = Path(folder), Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        for name, known in manifest["files"].items():
            file = folder / Path(name).name
            if not file.exists() and not whole:  # whoever needs it says so
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
