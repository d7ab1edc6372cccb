from fsc147lib.evaluation import constant_baselines, counting_metrics, metrics_table
from fsc147lib.evaluation.metrics import metrics_by_bin
from fsc147lib.evaluation.tables import MEASURES

PREDICTED, TRUE = [10, None, 30, 60], [10, 20, 40, 60]


def cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line[len(start) :].split()


def test_every_number_stands_under_its_heading_with_its_unit():
    models = {"before": counting_metrics([None] * 4, TRUE) | {"unparsed": 1.0, "kl": None}, "best, epoch 3":
              counting_metrics(PREDICTED, TRUE) | {"unparsed": 0.25, "kl": 0.4321}}  # fmt: skip
    text = metrics_table("four images", models, constant_baselines([10, 20, 60], TRUE), metrics_by_bin(PREDICTED, TRUE))
    heading = text.splitlines()[2]
    assert text.startswith("four images\n") and "before  best, epoch 3  mean 30.0  median 20.0" in heading
    assert cells(text, "MAE, mean error (objects)") == ["low", "32.50", "7.50", "17.50", "17.50"]
    assert cells(text, "answers that are no number") == ["low", "100", "%", "25", "%", "-", "-"]
    assert cells(text, "KL(target || map) (nats; 0 is perfect)") == ["low", "-", "0.432", "-", "-"]
    assert cells(text, "exactly right")[:5] == ["high", "0", "%", "50", "%"]
    assert cells(text, "1-20") == ["2", "10.00", "0.50", "50", "%", "50", "%"]
    line = next(line for line in text.splitlines() if line.startswith("MAE"))
    assert line.index("7.50") + 4 == heading.index("best, epoch 3") + len("best, epoch 3")  # aligned to the right


def test_absurd_answers_have_a_sentence_where_there_are_any():
    found = {
        name: counting_metrics(PREDICTED, TRUE) | {"absurd": n, "mae_without_absurd": mae}
        for name, n, mae in (("a", 0, 7.5), ("b", 1, 46.812), ("c", 2, None))
    }
    text = metrics_table("", found, {})
    assert cells(text, "median error (objects)") == ["low", *["5.00"] * 3]
    assert [line for line in text.splitlines() if "largest count" in line] == [
        "b: 1 answer above 10 times the largest count in training; without it MAE 46.81",
        "c: 2 answers above 10 times the largest count in training; without them MAE -",
    ]


def test_without_a_training_split_there_is_no_constant_to_beat():
    assert "never looks" not in metrics_table("", {"model": counting_metrics(PREDICTED, TRUE)}, {})


def test_every_metric_of_an_evaluation_has_words(tiny, root):
    from fsc147lib import FSC147, evaluate_samples

    assert set(evaluate_samples(tiny, list(FSC147(root, "val"))[:2]).metrics) == set(MEASURES)
