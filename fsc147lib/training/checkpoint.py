"""Save a run so that it loads as a model anywhere, and goes on here as if it had never stopped.

A checkpoint is a model folder (`CountingModel.save`) with `training_state.safetensors` (optimizer
moments) and `training_state.json` (schedule, epoch, history) beside the weights, and a manifest of all of them.
Nothing is pickled.

Left out: when to save (`train`).
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

TENSORS, STATE, VALIDATION = "training_state.safetensors", "training_state.json", "validation.csv"

RUN_ID = "run_id"
"""File of a run's folder that says whose its checkpoints must be."""


def save_checkpoint(
    folder: Path,
    model: CountingModel,
    optimizer: torch.optim.Optimizer,
    state: dict,
    run: str,
    validation: str | None = None,
) -> None:
    """Write a checkpoint; the one that was there is kept beside it with ".old" to its name.

    Args:
        folder: for example runs/train/last.
        model: with its trained weights.
        optimizer: plain torch optimizer, its moments are saved.
        state: everything else that `load_training_state` shall give back, as JSON values.
        run: whose checkpoint this is.
        validation: CSV of the validation image by image, to lie beside the weights.

    Raises:
        OSError: there is no room for it.
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


def sound_checkpoint(out: Path, new_run: str) -> tuple[Path, str]:
    """Which checkpoint a run goes on from: last/, or the one before where last/ is damaged or another run's.

    Returns:
        The checkpoint, and whose it is: `new_run` where an older version wrote it, which did not say.

    Raises:
        ModelError: neither is sound.
    """
    last, before, run_id = out / "last", out / "last.old", out / RUN_ID
    run = run_id.read_text().strip() if run_id.is_file() else ""
    fault = _fault_of(last, run)
    if fault and (not before.is_dir() or _fault_of(before, run)):
        raise ModelError(
            f"{fault}: the checkpoint is damaged, and there is none before it; train again from its weights, with "
            f"--model {last} and another --out, or from best/"
        )
    if fault:
        print(f"{fault}: going on from the checkpoint before it, {before}", file=sys.stderr)
    elif not (last / MANIFEST).is_file():
        print(f"{last} is of an older version, without {MANIFEST}: its files are not checked", file=sys.stderr)
    chosen = before if fault else last
    return chosen, run or (read_manifest(chosen) or {}).get("run", new_run)


def _fault_of(folder: Path, run: str) -> str:
    """What is wrong with a checkpoint's files, or ""; `run` is "" where it is not known whose they must be."""
    try:
        manifest = read_manifest(folder)
    except DamagedFolder as error:
        return str(error)
    if manifest is None:
        return f"{folder} has no {MANIFEST}, as all checkpoints of this run have" if run else ""
    missing = [name for name in manifest["files"] if not (folder / name).is_file()]
    if missing:
        return f"{folder} holds no {missing[0]}"
    return f"{folder} is a checkpoint of another run" if run and manifest.get("run") != run else ""


def link_checkpoint(source: Path, folder: Path) -> None:
    """Make `folder` the same checkpoint as `source`, sharing the files on disk where the disk can."""
    with new_folder(folder, replace=True) as draft:
        shutil.copytree(source, draft, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load_training_state(folder: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Put the optimizer's moments back and return the rest of the state.

    Raises:
        ModelError: the folder is no checkpoint of a run, damaged, or of another set of parameters.
    """
    for name in (STATE, TENSORS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}: resume needs the folder last/ of a run that was trained here")
    try:
        state, tensors = json.loads((folder / STATE).read_text()), load_file(folder / TENSORS)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            i, key = name.split(".", 1)
            moments.setdefault(int(i), {})[key] = value
        if missing := {"step", "epoch", "data", "steps", "epochs"} - set(state):
            raise ValueError(f"{STATE} has no {min(missing)}")
    except (ValueError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"the training state in {folder} is damaged ({error}): train again from its weights, with "
            f"--model {folder} and another --out"
        ) from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(i >= len(parameters) for i in moments):
        raise ModelError(f"{folder / TENSORS} is of a model with more parameters than this one's {len(parameters)}")
    for i, row in moments.items():
        for key, value in row.items():
            if value.ndim and value.shape != parameters[i].shape:
                raise ModelError(
                    f"{key} of parameter {i} in {folder / TENSORS} has the shape {list(value.shape)} instead of "
                    f"{list(parameters[i].shape)}: it is of another model"
                )
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state
