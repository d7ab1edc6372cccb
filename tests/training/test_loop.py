"""The loop reports what it does, learns, stops and goes on, and keeps small updates."""

import json
import math
import shutil
import sys
import traceback
from functools import partial, partialmethod
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fsc147lib.data.fsc147 import FSC147
from fsc147lib.evaluation import Evaluation, ImageResult
from fsc147lib.model.collate import Collate
from fsc147lib.model.load import load_model
from fsc147lib.model.network import Recipe
from fsc147lib.options import ConfigError
from fsc147lib.training import loop as training
from fsc147lib.training import setup
from fsc147lib.training.batches import SizeBatches, TrainingImages
from fsc147lib.training.loop import TrainConfig, epoch_line, train
from fsc147lib.training.losses import DualLoss
from fsc147lib.training.run import TrainResult
from fsc147lib.training.step import NonFiniteLoss, learning_rate_factor

SETTINGS = {"model": "tiny-random", "batch_size": 8, "log_every": 1, "tracking": "disabled"}


@pytest.fixture
def config(root, tmp_path):
    def make(**changes):
        return TrainConfig(**{"data": root, "out": tmp_path / "run", **SETTINGS, **changes})

    return make


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The folder of a run of one epoch, and its result."""
    settings = TrainConfig(data=root, out=tmp_path_factory.mktemp("finished") / "run", epochs=1, **SETTINGS)
    return settings.out, train(settings)


@pytest.fixture
def started(config, finished):
    """A copy of that folder, in the place that `config` names."""
    return shutil.copytree(finished[0], config().out)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_logged_losses_are_those_of_the_batch(config, finished):
    """The first script of this project logged 0.0000; here the log is computed again, from outside."""
    settings = config()
    model = load_model("tiny-random", seed=settings.seed)
    images = TrainingImages(list(FSC147(settings.data, "train")))
    collate = Collate(model.tokenizer, model.image_processor)
    lengths = [collate.lengths(sample) for sample in images.samples]
    first_batch = next(iter(SizeBatches(lengths, settings.batch_size, settings.seed)))
    parts = DualLoss(model.network)(collate([images[place] for place in first_batch]), 0.1)
    first = lines(finished[0])[1]
    assert first["step"] == 1
    assert first["count_loss"] == pytest.approx(parts.count.item(), rel=1e-5)
    assert first["attention_loss"] == pytest.approx(parts.attention.item(), rel=1e-5)
    assert first["total"] == pytest.approx(parts.count.item() + 0.1 * parts.attention.item(), rel=1e-5)
    assert first["attention_loss"] > 0.1 and first["count_loss"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "accumulation": 2},
        {"heatmap": "token_gradient", "heatmap_every": 2, "heatmap_images": 3},
        {"attention_loss": "mse", "attention_weight": 1.0},
    ],
)
def test_empty_scenes_train_and_are_answered(half_empty_root, config, changes):
    """Half of the pictures, in windows of any kind: nothing is NaN, and a window without a target says so."""
    train(config(data=half_empty_root, **changes))
    steps, epochs = ([line for line in lines(config().out) if ("val" in line) == val] for val in (False, True))
    assert all(math.isfinite(line["total"]) and math.isfinite(line["gradient_norm"]) for line in steps)
    looked_at = [line["attention_loss"] is not None for line in steps]
    assert all(line["attention_loss"] > 0 for line in steps if line["attention_loss"] is not None)
    assert any(looked_at) and all(looked_at) == ("attention_loss" in changes)
    mean = sum(sample.count for sample in FSC147(half_empty_root)) / 24
    assert epochs[0]["val"]["unparsed"] == 1 and epochs[0]["val"]["absurd"] == 0
    counts = [sample.count for sample in FSC147(half_empty_root, "val")]
    assert epochs[0]["val"]["mae"] == pytest.approx(sum(count or mean for count in counts) / len(counts))
    assert all(math.isfinite(value) for line in epochs for value in line["val"].values())


@pytest.mark.slow
def test_logged_validation_is_that_of_the_checkpoint(finished, root):
    model = load_model(finished[0] / "last")
    batch = Collate(model.tokenizer, model.image_processor)(list(FSC147(root, "val")))
    parts = DualLoss(model.network)(batch, 0.1)
    logged = lines(finished[0])[-1]["val"]
    assert logged["count_loss"] == pytest.approx(parts.count.item(), rel=1e-4)
    assert logged["kl"] == pytest.approx(parts.attention.item(), rel=1e-4)


def test_an_epoch_is_told_in_a_line():
    result = TrainResult(Path("run"), {}, {})
    result.epochs = [{"epoch": i, "val": {"mae": mae, "kl": kl}} for i, (mae, kl) in enumerate([(4.0, 1.5), (5, 1.2)])]
    steps = [(1, 0.5, 0.9), (1, 0.3, None), (2, 9.0, 9.0)]
    result.steps = [{"epoch": e, "count_loss": count, "attention_loss": looked} for e, count, looked in steps]
    told = "count loss 0.400, attention loss 0.900, MAE 5.00 (4.00 before), the best, KL 1.20 (1.50); 7 s"
    assert epoch_line(result, 3, 7.2) == f"epoch 1 of 3: {told}"
    result.epochs.append({"epoch": 2, "val": {"mae": 4.5, "kl": None}})
    line, warning = epoch_line(result, 3, 7.2).splitlines()
    assert "MAE 4.50 (4.00 before), the best; 7 s" in line and "try a lower learning rate" in warning


@pytest.mark.slow
def test_both_losses_fall(config):
    result = train(config(epochs=6, flip=False))
    assert result.steps[-1]["count_loss"] < result.steps[0]["count_loss"] / 3
    assert result.steps[-1]["attention_loss"] < result.steps[0]["attention_loss"]
    assert result.epochs[0]["epoch"] == 0 and len(result.epochs) == 7


@pytest.mark.slow
def test_the_run_folder(config):
    settings = config(epochs=2)
    result = train(settings)
    assert json.loads((settings.out / "config.json").read_text())["batch_size"] == 8
    assert [line["step"] for line in lines(settings.out)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    summary = json.loads((settings.out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary()))
    assert summary["best"]["mae"] == min(line["val"]["mae"] for line in result.epochs[1:])
    files = {path.name for path in (settings.out / "last").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"} < files
    assert {"moments.st", "training_state.json"} < files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert load_model(settings.out / "best").network is not None


@pytest.mark.slow
def test_same_seed_same_run(config, tmp_path, finished):
    first, second = finished[1], train(config(epochs=1))
    assert [line["total"] for line in first.steps] == [line["total"] for line in second.steps]
    other = train(config(out=tmp_path / "c", epochs=1, seed=1))
    assert [line["total"] for line in first.steps] != [line["total"] for line in other.steps]


@pytest.mark.slow
def test_resume_needs_the_same_run(config, started, tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(config(out=tmp_path / "other", resume=True))
    with pytest.raises(ConfigError, match="holds a run already.*--resume"):
        train(config(epochs=1))
    with pytest.raises(ConfigError, match="attention_weight is 0.2, but .* was started with 0.1"):
        train(config(epochs=1, attention_weight=0.2, resume=True))


@pytest.mark.slow
def test_a_crash_between_the_renames_is_mended(config, started):
    """Killed when last/ was set aside and the new one not yet in its place; and when best/ was still to come."""
    out = started
    (out / "last").rename(out / "last.old")
    shutil.rmtree(out / "best")
    train(config(epochs=1, resume=True))
    assert (out / "best" / "model.safetensors").is_file() and not (out / "last.old").exists()


@pytest.mark.slow
def test_accumulation_is_one_large_batch(config, tmp_path):
    """24 images of different answer lengths: as 1 x 24, and as a window of 3 x 8."""
    large = train(config(out=tmp_path / "large", batch_size=24, epochs=1))
    window = train(config(out=tmp_path / "window", batch_size=8, accumulation=3, epochs=1))
    assert len(large.steps) == len(window.steps) == 1
    for key in ("count_loss", "attention_loss", "gradient_norm"):
        assert window.steps[0][key] == pytest.approx(large.steps[0][key], rel=1e-4)


@pytest.mark.slow
def test_a_tiny_learning_rate_moves_fp32_weights_under_bf16(config):
    """bf16 *weights* would swallow updates of 1e-6; fp32 master weights keep them."""
    train(config(epochs=1, limit=2, learning_rate=1e-6, warmup=0, precision="bf16", weight_decay=0))
    start = load_model("tiny-random").network.state_dict()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    after = weights(config().out / "last")
    assert after[name].dtype == torch.float32
    moved = (after[name] - start[name]).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-5
    in_bf16 = (start[name].bfloat16() + (after[name] - start[name]).bfloat16()) != start[name].bfloat16()
    assert in_bf16.float().mean() < 0.2  # the same updates, added to bf16 weights, are mostly lost


@pytest.mark.slow
def test_vision_stays_frozen_until_its_epoch(config):
    settings = config(epochs=2, unfreeze_vision_at=1)
    seen = {}

    def watch(line):
        if "val" in line and line["epoch"]:  # the checkpoint of the epoch before is on disk, this epoch's not yet
            seen[line["epoch"]] = (settings.out / "last").is_dir() and weights(settings.out / "last")

    train(settings, watch)
    start, visual = load_model("tiny-random").network.state_dict(), "model.visual.blocks.0.mlp.linear_fc1.weight"
    text = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(seen[2][visual], start[visual])  # what epoch 1 left
    assert not torch.equal(seen[2][text], start[text])
    assert not torch.equal(weights(settings.out / "last")[visual], start[visual])


def test_clipping_bounds_the_gradient(config, monkeypatch):
    """With plain gradient descent, for AdamW would hide the gradient's size; any optimizer of torch will do."""
    descent = partial(torch.optim.SGD, lr=1.0)
    monkeypatch.setattr(setup, "make_optimizer", lambda network, *_: descent(network.parameters()))
    result = train(config(epochs=1, limit=8, clip=1e-3, learning_rate=1.0, warmup=0))
    assert len(result.steps) == 1 and result.steps[0]["gradient_norm"] > 1e-3  # logged as it was before
    before = dict(load_model("tiny-random").network.named_parameters())
    after = dict(load_model(config().out / "last").network.named_parameters())
    moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
def test_best_is_the_epoch_with_the_lowest_error(config, monkeypatch):
    """The first of those that are equal."""
    errors = iter([9.0, 3.0, 1.0, 1.0])

    def measured(self):
        self.validation = Evaluation({}, {}, [ImageResult("1.jpg", "apples", 1, 1, "COUNT: 1", 0)])
        self.log({"step": self.step, "epoch": self.epoch, "val": {"mae": next(errors)}})

    monkeypatch.setattr(training.Run, "validate", measured)
    train(config(epochs=3))
    epochs = {
        name: json.loads((config().out / name / "training_state.json").read_text())["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 2, "last": 3}
    a, b = (weights(config().out / name) for name in ("best", "last"))
    assert not all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(config, monkeypatch):
    def poison(line):
        if line["step"] == 4:
            with torch.no_grad():
                run[0].model.network.lm_head.weight.fill_(float("nan"))

    run, make = [], training.Run.__init__

    def remember(self, *args, **more):
        run.append(self)
        make(self, *args, **more)

    monkeypatch.setattr(training.Run, "__init__", remember)
    with pytest.raises(NonFiniteLoss, match="the count loss is nan on .*jpg"):
        train(config(epochs=2), poison)
    assert all(value.isfinite().all() for value in weights(config().out / "last").values())


@pytest.mark.slow
def test_a_missing_root_costs_nothing(config, started, tmp_path):
    """Neither an earlier run that was to be overwritten, nor a second try under the same name."""
    other = tmp_path / "other"
    with pytest.raises(ValueError, match="there is no such folder"):
        train(config(data=tmp_path / "nowhere", out=other))
    assert not other.exists()
    with pytest.raises(ValueError, match="there is no such folder"):
        train(config(data=tmp_path / "nowhere", overwrite=True))
    assert lines(config().out)[-1]["epoch"] == 1


@pytest.mark.slow
def test_an_overwritten_run_comes_back_if_the_new_one_fails_at_once(config, started):
    before = weights(config().out / "best")

    def fail(line):
        if line["step"] == 2:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(config(epochs=1, seed=5, overwrite=True), fail)
    after = weights(config().out / "best")
    assert all(torch.equal(before[key], after[key]) for key in before)
    train(config(epochs=1, overwrite=True))
    assert [line["step"] for line in lines(config().out)] == [0, 1, 2, 3, 3]
    assert not config().out.with_name("run.old").exists()


def test_an_empty_split_is_named(config, root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    path = tmp_path / "data" / "Train_Test_Val_FSC_147.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "val": []}))
    with pytest.raises(ValueError, match="split 'val' in Train_Test_Val_FSC_147.json is empty"):
        train(config(data=tmp_path / "data"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(config, overwrite):
    settings = config(overwrite=overwrite)
    settings.out.mkdir()
    (settings.out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no run.*left alone"):
        train(settings)
    assert (settings.out / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("accumulation", 0), ("learning_rate", 0.0), ("clip", -1.0), ("warmup", 2.0),
     ("attention_weight", -0.1), ("attention_weight", math.inf),
     ("learning_rate", math.nan), ("clip", math.inf), ("limit", 0), ("weight_decay", -1.0), ("unfreeze_vision_at", -1)],
)  # fmt: skip
def test_values_that_cannot_be_are_named(config, field, value):
    with pytest.raises(ConfigError, match=f"{field} .*--{field.replace('_', '-')}"):
        config(**{field: value})


@pytest.mark.medium
@pytest.mark.parametrize(("name", "values"), [("layers", (4,)), ("layers", (-1,)), ("layers", (0, 9)), ("heads", (7,))])
def test_layers_and_heads_that_the_model_has_not(config, name, values):
    with pytest.raises(ConfigError, match=f"attention_{name}.*0 to 3"):
        train(config(**{f"attention_{name}": values}))


LENGTHS = [
    (24, columns, 24 * columns // 4 + text) for columns in (16, 20, 32, 36, 36, 36, 40, 98) for text in range(30)
]


@pytest.mark.parametrize("by_size", [True, False])
def test_order_is_fair(by_size):
    """Each epoch shows each image once; order, company and mirroring change, and come back with the seed."""
    batches = SizeBatches(LENGTHS, 36, seed=0, flip=True, by_size=by_size)
    epochs = []
    for epoch in (0, 1, 0):
        epochs.append([batch for (batch,) in batches.epoch(epoch)])
        assert sorted(len(batch) for batch in epochs[-1]) == [34] * 5 + [35] * 2
    assert epochs[0] == epochs[2] != epochs[1]
    for batches_of_epoch in epochs:
        assert sorted(i for batch in batches_of_epoch for i, _ in batch) == list(range(len(LENGTHS)))
    companies = [{frozenset(i for i, _ in batch) for batch in epoch} for epoch in epochs[:2]]
    assert len(companies[0] & companies[1]) <= 2  # the widest images differ from all others and meet again
    assert 60 < sum(mirrored for batch in epochs[0] for _, mirrored in batch) < 180
    padded = sum(max(LENGTHS[i][2] for i, _ in batch) * len(batch) for batch in epochs[0])
    assert (sum(length[2] for length in LENGTHS) > 0.85 * padded) == by_size


@pytest.mark.medium
def test_the_next_epoch_is_read_before_it_begins(config, monkeypatch):
    """The first step after a validation need not wait: its batch is being read as the epoch before ends."""
    run, read, collate = training.Run(config(epochs=2, workers=0)), [], Collate.__call__

    def watched(self, samples):
        read.append([sample.name for sample in samples])
        return collate(self, samples)

    monkeypatch.setattr(Collate, "__call__", watched)
    samples = run.samples["train"]
    wanted = [[samples[i].name for i, _ in batch] for epoch in (0, 1) for (batch,) in run.batches.epoch(epoch)]
    steps = run.batches.steps
    for epoch in (0, 1):
        assert [batch["names"] for (batch,) in run.windows(epoch)] == wanted[epoch * steps :][:steps]
        assert read[: len(wanted)] == wanted[: len(read)] and len(read) > (epoch + 1) * steps


@pytest.mark.medium
def test_processes_that_read_images_change_nothing(config, tmp_path):
    """Over two epochs, of which they begin the second before the first has ended."""
    histories = []
    for workers in (0, 2):
        train(config(out=tmp_path / str(workers), epochs=2, workers=workers))
        logged = lines(tmp_path / str(workers))
        histories.append([{key: line.get(key) for key in ("step", "count_loss", "val")} for line in logged])
    assert histories[0] == histories[1] and sum("val" in line for line in logged) == 3


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (4, 1), (2, 2)])
def test_every_image_weighs_alike(accumulation, processes):
    """An image weighs 1 / (images of its step): over epochs that is the same for wide and for narrow ones."""
    lengths, epochs = LENGTHS[7:], 200
    batches = SizeBatches(lengths, 14, 0, True, True, accumulation, processes)
    together, (weights, smaller) = batches.per_step * processes, np.zeros((2, len(lengths)))
    for epoch in range(epochs):
        steps = batches.epoch(epoch)
        sizes = [len(batch) for step in steps for batch in step]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= 14 and all(len(step) == together for step in steps)
        for step in steps:
            images = [i for batch in step for i, _ in batch]
            weights[images] += 1 / len(images) / epochs
            smaller[images] += (len(images) < len(lengths) * together / len(sizes)) / epochs
    assert weights.max() / weights.min() < 1.02
    assert weights[-16:].mean() == pytest.approx(weights.mean(), rel=5e-3)  # the widest
    assert smaller[-16:].mean() == pytest.approx(smaller.mean(), abs=0.1) and 0.05 < smaller.mean() < 0.95


@pytest.mark.medium
def test_a_step_asks_for_no_number(config, monkeypatch):
    """On a GPU each would be a wait; they are fetched together, every few steps.  transformers asks for one a pass."""
    run = training.Run(config(epochs=1))
    batches = list(islice(run.loader, 2))
    step = run.training_step
    step([batches[0]], 0.1)  # the first step makes the optimizer's state

    asked = []

    def watched(ask):
        def wrapped(*args):
            files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe(1)))
            asked.append(next(file for file in files if "/torch/" not in file))
            return ask(*args)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("item", "__bool__", "__float__", "__int__", "numpy"):
            patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
        step([batches[1]], 0.1)
    assert len(asked) <= 2 and all("/transformers/" in file for file in asked), asked
    assert len(step.unchecked) == 2
    step.check()
    assert not step.unchecked


def test_schedule():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == max(factors) == 1
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert learning_rate_factor(0, 1, 0.0) == 1
    assert learning_rate_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(99, 100, 0.1, "constant") == 1


def test_batches_split_by_tokens_make_the_same_steps():
    """At most so many tokens with padding, but for an image that has more; a step has the images that it had."""
    whole, split = (SizeBatches(LENGTHS, 24, 0, True, True, accumulation=2, batch_tokens=n) for n in (None, 3000))
    steps = [[{place for batch in step for place in batch} for step in b.epoch(3)] for b in (whole, split)]
    assert steps[0] == steps[1] and whole.sizes(3) == [2] * 5 and max(split.sizes(3)) > 2
    tokens = [max(LENGTHS[i][2] for i, _ in batch) * len(batch) for step in split.epoch(3) for batch in step]
    assert max(tokens) <= 3000
    assert min(tokens) > 1500  # no rest of a few images, for which torch compiles anew
    alone = SizeBatches(LENGTHS, 24, 0, True, True, batch_tokens=1).epoch(3)
    assert all(len(batch) == 1 for step in alone for batch in step)
    with pytest.raises(ConfigError, match="batch_tokens.*one process"):
        SizeBatches(LENGTHS, 24, 0, True, True, processes=2, batch_tokens=3000)


@pytest.mark.slow
def test_batches_split_by_tokens_train_the_same(config, tmp_path):
    whole, split = (train(config(out=tmp_path / str(n), epochs=1, batch_tokens=n)) for n in (None, 300))
    assert len(whole.steps) == len(split.steps)
    for one, other in zip(whole.steps, split.steps, strict=True):
        for key in ("count_loss", "attention_loss", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-3)


@pytest.mark.slow
def test_offline_tracking_writes_here_and_asks_nobody(config, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    settings = config(epochs=1, tracking="offline")
    train(settings)
    assert list((settings.out / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_whole_run_compiles_few_kinds_of_graph(config, tiny, tmp_path, monkeypatch):
    """Each costs seconds before a first step.  Two epochs of four widths, with answers before, between and after: four
    graphs of the language model, and sixteen of the encoder, whose images a CPU takes one by one.
    """
    tiny.recipe = Recipe(train_vision=False)
    tiny.save(tmp_path / "frozen")
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(config(model=str(tmp_path / "frozen"), compile=True, epochs=2, vision_cache="off"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 20
