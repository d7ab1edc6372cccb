"""What CONTRIBUTING promises: a loss, a control, a schedule, a metric or another form of answer is one entry."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fsc147lib.__main__ import main
from fsc147lib.evaluation import answering
from fsc147lib.model import prompt
from fsc147lib.options import ConfigError
from fsc147lib.training import TrainConfig, controls, losses, step, train


@pytest.mark.medium
def test_a_loss_a_target_and_a_schedule_are_an_entry_each(root, tmp_path, monkeypatch):
    options = {"data": root, "limit": 8, "batch_size": 4, "tracking": "disabled"}
    for name in ("attention_loss", "attention_target", "schedule"):
        with pytest.raises(ConfigError, match=f"{name} .* is mine, but must be one of"):
            TrainConfig(**options, **{name: "mine"})
    monkeypatch.setitem(losses.ATTENTION_LOSSES, "mine", lambda target, heatmap: (target - heatmap).abs().sum((1, 2)))
    monkeypatch.setitem(controls.ATTENTION_TARGETS, "mine", lambda batch, _: torch.full_like(batch["target"], 1 / 196))
    monkeypatch.setitem(step.SCHEDULES, "mine", lambda done: 0.25)
    words = ["train", "--data", str(root), "--out", str(tmp_path / "cli"), "--limit", "8", "--tracking", "disabled"]
    assert main([*words, "--attention-loss", "mine", "--attention-target", "mine", "--schedule", "mine"]) == 0
    config = TrainConfig(
        out=tmp_path / "run", attention_loss="mine", attention_target="mine", schedule="mine", learning_rate=1e-3,
        log_every=1, warmup=0, **options,
    )  # fmt: skip
    result = train(config)
    assert result.steps[-1]["learning_rate"] == pytest.approx(0.25e-3)
    assert 0 < result.steps[0]["attention_loss"] < 2


@pytest.mark.medium
def test_a_metric_of_counts_and_one_of_maps_reach_table_and_files(root, tmp_path, monkeypatch, capsys):
    counting, alignment = answering.counting_metrics, answering.alignment
    monkeypatch.setattr(answering, "counting_metrics", lambda *args: {**counting(*args), "my_error": 1.25})
    monkeypatch.setattr(
        answering, "alignment", lambda a, p: {**alignment(a, p), "my_overlap": torch.minimum(a, p).sum((1, 2))}
    )
    words = ["evaluate", "--data", str(root), "--split", "val", "--limit", "4", "--json", str(tmp_path / "e.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "my_error" in printed and "1.250" in printed and "my_overlap" in printed
    rows = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert all(0 < float(row["my_overlap"]) <= 1 for row in rows if row["kl"])


def test_another_form_of_answer_is_one_edit(monkeypatch):
    source = Path(prompt.__file__).read_text()
    edited = source.replace('BEFORE, AFTER = "COUNT: ", ""', 'BEFORE, AFTER = \'{"count": \', "}"')
    assert edited != source
    spec = importlib.util.spec_from_loader("fsc147lib.model.prompt_as_json", loader=None)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    exec(compile(edited, "prompt_as_json.py", "exec"), module.__dict__)
    assert module.answer(37) == '{"count": 37}'
    assert module.parse_count('{"count": 37}') == 37 and module.parse_count("COUNT: 37") is None

    class Letters:
        eos_token_id = 0

        def encode(self, text, add_special_tokens):
            return [ord(letter) for letter in text]

    before, digits, after = module.number_tokens(Letters())
    assert (before, digits, after) == ([ord(x) for x in '{"count": '], list(range(48, 58)), ord("}"))
    assert module.longest_answer(Letters()) == len('{"count": 999999}') + 1
