"""Save a run so that it loads as a model anywhere, and goes on here as if it had never stopped.

A checkpoint is a model folder (`CountingModel.save`) with `training_state.safetensors` (optimizer
moments) and `training_state.json` (schedule, epoch, history) beside the weights.  Nothing is pickled.

Left out: when to save (`train`).
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import new_draft, replace_folder
from ..model.network import CountingModel, ModelError

TENSORS, STATE = "training_state.safetensors", "training_state.json"


def save_checkpoint(folder: Path, model: CountingModel, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write a checkpoint; the one that was there stays until the new one is complete.

    Args:
        folder: for example runs/train/last.
        model: with its trained weights.
        optimizer: plain torch optimizer, its moments are saved.
        state: everything else that `load_training_state` shall give back, as JSON values.
    """
    draft = new_draft(folder)
    model.write_into(draft)
    moments = optimizer.state_dict()["state"]
    tensors = {f"{i}.{key}": value.contiguous() for i, row in moments.items() for key, value in row.items()}
    save_file(tensors, draft / TENSORS)
    (draft / STATE).write_text(json.dumps(state, indent=1))
    replace_folder(draft, folder)


def link_checkpoint(source: Path, folder: Path) -> None:
    """Make `folder` the same checkpoint as `source`, sharing the files on disk where the disk can."""
    draft = new_draft(folder)
    shutil.copytree(source, draft, copy_function=_link)
    replace_folder(draft, folder)


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
    except (ValueError, SafetensorError) as error:
        raise ModelError(
            f"the training state in {folder} is damaged ({error}): train again from its weights, with "
            f"--model {folder} and another --out"
        ) from error
    saved = optimizer.state_dict()
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        i, key = name.split(".", 1)
        moments.setdefault(int(i), {})[key] = value
    known = sum(len(group["params"]) for group in saved["param_groups"])
    if any(i >= known for i in moments):
        raise ModelError(f"{folder / TENSORS} belongs to a model with more parameters than this one's {known}")
    optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
    return state
