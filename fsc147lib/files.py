"""Write files and folders beside their place and rename them, so that an error never leaves half of one; and look
at what is to be read before it is opened.

Left out: formats.
"""

import os
import shutil
import stat
from pathlib import Path

MAX_BYTES = 2**30
"""A larger file is not read: FSC147's largest has 30 MB."""


def need_inside(path: Path, root: Path) -> Path:
    """The path, unless it is a link that leads out of the root: then OSError."""
    real = os.path.realpath(path)
    if os.path.islink(path) and not Path(real).is_relative_to(os.path.realpath(root)):
        raise OSError(f"it links out of the root, to {real}")
    return path


def need_file(path: str | Path) -> Path:
    """The path of a file that ends; OSError where opening it might wait for ever, as a pipe does."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is a pipe, a device or a folder, and no file")
    if found.st_size > MAX_BYTES:
        raise OSError(f"{path} has {found.st_size:,} bytes, more than {MAX_BYTES:,}")
    return Path(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, making its folder; what was there stays until the new text is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".writing")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def new_draft(folder: Path) -> Path:
    """The place beside `folder` to prepare its next version in; what an earlier failure left there is removed."""
    draft = folder.with_name(folder.name + ".writing")
    shutil.rmtree(draft, ignore_errors=True)
    return draft


def replace_folder(draft: Path, folder: Path) -> None:
    """Put a finished folder in its place, keeping the old one until the new one is there."""
    recover_folder(folder)
    old = set_aside(folder)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
