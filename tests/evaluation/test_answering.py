import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from plain import generated, plain_network

from fsc147lib.__main__ import main
from fsc147lib.data.faults import SPLITS
from fsc147lib.data.fsc147 import FSC147
from fsc147lib.evaluation import EvaluateConfig, Reading, answering, evaluate, evaluate_samples
from fsc147lib.evaluation.answering import answering_chunks, answering_tokens, to_csv
from fsc147lib.model.answers import longest_answer
from fsc147lib.model.collate import Collate
from fsc147lib.model.device import choose_compute
from fsc147lib.model.features import KeptFeatures
from fsc147lib.model.heatmaps import make_heatmap
from fsc147lib.model.load import SHIPPED, load_model
from fsc147lib.model.prompt import answer


@pytest.mark.slow
def test_a_model_that_knows_the_answers_is_seen_to(taught, mixed_samples):
    result = evaluate_samples(taught(60), mixed_samples, reading=Reading(2))
    assert [image.answer for image in result.images] == [answer(sample.count) for sample in mixed_samples]
    assert result.metrics["mae"] == 0 and result.metrics["unparsed"] == 0
    assert [image.name for image in result.images] == [sample.name for sample in mixed_samples]


@pytest.mark.medium
def test_images_that_are_kept_need_no_processes(tiny, root, monkeypatch):
    samples, started, loader = list(FSC147(root, "val"))[:4], [], answering.DataLoader

    def counted(*args, num_workers, **kwargs):
        started.append(num_workers)
        return loader(*args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr(answering, "DataLoader", counted)
    kept = KeptFeatures.encode(tiny, samples, choose_compute("fp32"), "host", 0)
    first, second = (
        evaluate_samples(tiny, samples, reading=Reading(2, workers=2, features=features)).metrics
        for features in (None, kept)
    )
    assert started == [2, 0] and first == pytest.approx(second, rel=1e-4)


def test_answers_are_generate_s_whatever_the_order_of_work(mixed_samples):
    """In batches by length, of plain transformers' `generate` image by image."""
    dual, plain = load_model("tiny-dual"), plain_network(SHIPPED / "tiny-dual")
    collate, longest = Collate(dual.tokenizer, dual.image_processor), longest_answer(dual.tokenizer)
    expected = [generated(plain, collate([sample]), dual.tokenizer, longest)[0] for sample in mixed_samples]
    for sizes in ({"batch_size": 3}, {"batch_tokens": 400}):
        images = evaluate_samples(dual, mixed_samples, reading=Reading(**sizes)).images
        assert [image.answer for image in images] == dual.tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_chunks_are_in_order_of_length():
    assert answering_chunks([5, 9, 4, 7], 3) == [[2, 0, 3], [1]]
    assert answering_chunks([5, 9, 4, 7], 1, batch_tokens=15) == [[2, 0], [3], [1]], "with padding, whatever the size"
    assert answering_chunks([50], 1, batch_tokens=15) == [[0]], "one that is too long has a chunk of its own"


def test_answers_without_a_gradient_have_room_for_four_times_as_many(tiny):
    of = {answering_tokens(1000, make_heatmap(tiny.network, name)): name for name in ("attention", "occlusion")}
    assert of == {4000: "attention", 1000: "occlusion"}


def let_it_say(said, samples, model, monkeypatch):
    """Have a model answer each sample with a text."""
    ids = model.tokenizer(said, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
    by_name = dict(zip([sample.name for sample in samples], ids, strict=True))
    read = answering.read_prompts

    def read_prompts(network, batch):
        prompts = read(network, batch)
        prompts.greedy = lambda *_: torch.stack([by_name[name] for name in batch["names"]])
        return prompts

    monkeypatch.setattr(answering, "read_prompts", read_prompts)


def test_unparsed_answers_cost_the_true_count(tiny, root, monkeypatch):
    samples = list(FSC147(root, "val"))
    said = [answer(sample.count) for sample in samples]
    said[2], said[5] = "a lot", "COUNT: 3.7"
    let_it_say(said, samples, tiny, monkeypatch)
    result = evaluate_samples(tiny, samples, reading=Reading(3))
    assert result.metrics["unparsed"] == pytest.approx(2 / len(samples))
    assert result.metrics["mae"] == pytest.approx((samples[2].count + samples[5].count) / len(samples))
    assert result.images[2].predicted is None and result.images[2].error == samples[2].count


def test_answers_in_other_words_count_leniently_alone(tiny, root, monkeypatch):
    samples, end = list(FSC147(root, "val"))[:4], tiny.tokenizer.eos_token
    said = [f"There are {samples[0].count + 2}.{end}", f"{answer(samples[1].count)}{end}", "I see 3", f"no{end}"]
    let_it_say(said, samples, tiny, monkeypatch)
    result = evaluate_samples(tiny, samples)
    counts = [sample.count for sample in samples]
    assert [image.predicted for image in result.images] == [None, counts[1], None, None]
    assert [image.predicted_leniently for image in result.images] == [counts[0] + 2, counts[1], None, None]
    assert (result.metrics["unparsed"], result.metrics["unparsed_leniently"]) == (0.75, 0.5)
    assert result.metrics["mae"] == pytest.approx((counts[0] + counts[2] + counts[3]) / 4)
    assert result.metrics["mae_lenient"] == pytest.approx((2 + counts[2] + counts[3]) / 4)


def test_an_answer_may_be_longer(tiny, root):
    samples, _ = list(FSC147(root, "val"))[:2], tiny.network.train()
    usual, longer = (evaluate_samples(tiny, samples, reading=Reading(longest=longest)).images for longest in (None, 30))
    tokens = [[len(tiny.tokenizer.encode(image.answer)) for image in images] for images in (usual, longer)]
    assert all(few < many for few, many in zip(*tokens, strict=True))
    assert tiny.network.training, "the mode is given back"


def test_empty_scenes_are_answered_and_have_no_map(tiny, root, empty_samples):
    some, none = [sample for sample in FSC147(root, "val") if sample.count][:3], empty_samples
    result, without = (
        evaluate_samples(tiny, samples, training_counts=[9]) for samples in ([none[0], *some, none[1]], some)
    )
    assert [image.count for image in result.images] == [0, *(sample.count for sample in some), 0]
    for key in ("kl", "mass_on_objects", "pearson", "pointing"):
        assert result.images[0].alignment[key] is None
        assert result.metrics[key] == pytest.approx(without.metrics[key], rel=1e-4, abs=1e-6)
    assert result.metrics["nae"] == without.metrics["nae"] and result.bins["0"]["images"] == 2
    assert [result.images[i].error for i in (0, 4)] == [9, 9]  # an untaught model says no number
    alone = evaluate_samples(tiny, none)
    assert alone.metrics["kl"] is None and alone.metrics["mae"] == 1
    json.dumps(alone.metrics, allow_nan=False)


def test_an_empty_scene_without_an_answer_costs_the_training_mean(half_empty_root, tiny, tmp_path):
    """The mean of the root's training split, which is not the one that is answered."""
    tiny.save(tmp_path / "model")
    result = evaluate(EvaluateConfig(half_empty_root, str(tmp_path / "model"), limit=1))
    counts = [sample.count for sample in FSC147(half_empty_root, "train")]
    assert result.images[0].count == 0 and result.images[0].predicted is None
    assert result.metrics["mae"] == np.mean(counts) > 1


@pytest.mark.medium
def test_absurd_answers_are_held_against_the_root_s_training_split(root, tiny, tmp_path, monkeypatch, capsys):
    copied = shutil.copytree(root, tmp_path / "root")
    samples, largest = list(FSC147(root, "val")), max(sample.count for sample in FSC147(root, "train"))
    said = [answer(10 * largest), answer(10 * largest + 1), *(answer(sample.count + 1) for sample in samples[2:])]
    let_it_say(said, samples, tiny, monkeypatch)
    tiny.save(tmp_path / "model")
    command = ["evaluate", "--data", str(copied), "--model", str(tmp_path / "model")]
    assert main(command) == 0
    mae = (10 * largest - samples[0].count + len(samples) - 2) / (len(samples) - 1)
    sentence = f"model: 1 answer above 10 times the largest count in training; without it MAE {mae:.2f}"
    assert sentence in capsys.readouterr().out
    splits = json.loads((copied / SPLITS).read_text())
    (copied / SPLITS).write_text(json.dumps({"val": splits["val"]}))
    assert main(command) == 0 and "in training" not in capsys.readouterr().out  # nothing is known of it


@pytest.mark.medium
def test_numbers_do_not_depend_on_the_batch_size(tiny, root):
    samples = list(FSC147(root, "val"))
    one, many = (evaluate_samples(tiny, samples, reading=Reading(size)) for size in (1, 5))
    assert [image.answer for image in one.images] == [image.answer for image in many.images]
    for key, value in one.metrics.items():
        assert many.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_files(tiny, root, tmp_path):
    tiny.save(tmp_path / "model")
    result = evaluate(EvaluateConfig(data=root, model=str(tmp_path / "model")))
    result.write(tmp_path / "out" / "val.json", split="val")
    written = json.loads((tmp_path / "out" / "val.json").read_text())
    assert written["metrics"] == result.metrics and written["split"] == "val"
    rows = list(csv.DictReader((tmp_path / "out" / "val.csv").open()))
    assert [row["name"] for row in rows] == [sample.name for sample in FSC147(root, "val")]
    assert [int(row["count"]) for row in rows] == [sample.count for sample in FSC147(root, "val")]
    assert sum(row["images"] for row in written["bins"].values()) == len(rows)


def test_a_cell_of_a_csv_is_no_formula():
    """A spreadsheet would compute what begins so; numbers stay numbers."""
    rows = [{"name": "=1+1", "answer": "+cmd", "count": -5}, {"name": "@a", "answer": "-3\n", "count": 2}]
    rows.append({"name": "a=b", "answer": "\t=1", "count": None})
    written = list(csv.reader(io.StringIO(to_csv(rows))))
    assert written[1:] == [["'=1+1", "'+cmd", "-5"], ["'@a", "'-3\n", "2"], ["a=b", "'\t=1", ""]]
