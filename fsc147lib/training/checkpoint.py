"""Checkpoints: model folders (`CountingModel.save`) that a run also resumes from.

Beside the weights, or adapters, lie `moments.st` (the optimizer's moments, written by safetensors; under its own ending
a server would load them as weights), `training_state.json` (step, epoch, history), `validation.csv`, and a manifest
with the size and checksum of each file.  Nothing is pickled.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import MANIFEST, DamagedFolder, new_folder, read_manifest, write_manifest
from ..model.network import CountingModel, ModelError

TENSORS, STATE, VALIDATION = "moments.st", "training_state.json", "validation.csv"

RUN_ID = "run_id"
"""File of a run's folder with the run's id, which is in the manifest of each of its checkpoints."""


def save_checkpoint(
    folder: Path, model: CountingModel, optimizer: torch.optim.Optimizer, state: dict, run: str, validation: str | None
) -> None:
    """Write a checkpoint; the previous one in `folder` is kept beside it, with ".old" added to its name.

    Args:
        state: other values that `load_training_state` returns, as JSON.
        run: the run's id.
        validation: CSV of the validation, a row for each image.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    try:
        with new_folder(folder, replace=True, keep=True) as draft:
            model.write_into(draft)
            moments = optimizer.state_dict()["state"]
            tensors = {f"{i}.{key}": value.contiguous() for i, row in moments.items() for key, value in row.items()}
            save_file(tensors, draft / TENSORS)
            (draft / STATE).write_text(json.dumps(state, indent=1, allow_nan=False))
            if validation is not None:
                (draft / VALIDATION).write_text(validation)
            write_manifest(draft, run=run)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint {folder} cannot be written ({error}): what was saved before is whole; make room, then go "
            "on with --resume"
        ) from error


def sound_checkpoint(out: Path) -> Path:
    """The checkpoint that a run resumes from: last/, or last.old/ if last/ is damaged or belongs to another run.

    Raises:
        ModelError: both are damaged.
    """
    last, before, run_id = out / "last", out / "last.old", out / RUN_ID
    run = run_id.read_text() if run_id.is_file() else ""
    fault = fault_of(last, run)
    if not fault:
        return last
    if fault_of(before, run):
        raise ModelError(
            f"{fault}: the checkpoint is damaged, and there is none before it; train again from its weights, with "
            f"--model {last} and another --out, or from best/"
        )
    print(f"{fault}: going on from the checkpoint before it, {before}", file=sys.stderr)
    return before


def fault_of(folder: Path, run: str) -> str:
    """The first fault of a checkpoint of this run, or ""."""
    try:
        manifest = read_manifest(folder)
    except DamagedFolder as error:
        return str(error)
    if manifest is None:
        return f"{folder} has no {MANIFEST}"
    missing = [name for name in manifest["files"] if not (folder / name).is_file()]
    if missing:
        return f"{folder} holds no {missing[0]}"
    return f"{folder} is a checkpoint of another run" if manifest.get("run") != run else ""


def link_checkpoint(source: Path, folder: Path) -> None:
    """Copy a checkpoint, with hard links if the disk has them."""
    with new_folder(folder, replace=True) as draft:
        try:
            shutil.copytree(source, draft, copy_function=os.link)
        except OSError:
            shutil.copytree(source, draft, dirs_exist_ok=True)


def load_training_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Load the optimizer's moments from a sound checkpoint; returns the `state` given to `save_checkpoint`."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / TENSORS).items():
        i, key = name.split(".", 1)
        moments.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / STATE).read_text())
