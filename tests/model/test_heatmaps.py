"""The heatmap is the eager attention's, on the right tokens, and it trains."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from plain import plain_inputs

from fsc147lib.data.targets import resample_map
from fsc147lib.evaluation import EvaluateConfig
from fsc147lib.model import heatmaps
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import answer_logits, read_prompts
from fsc147lib.model.heatmaps import (
    METHODS,
    Attention,
    RelativeAttention,
    default_layers,
    digits_mass,
    make_heatmap,
    visual_mass,
)
from fsc147lib.model.looking import corner_share, look, mean_map
from fsc147lib.model.prompt import IMAGE_TOKEN, NEUTRAL
from fsc147lib.options import ConfigError
from fsc147lib.training import TrainConfig


@torch.no_grad()
def eager_attentions(plain, batch):
    """Every layer's full attention matrix in transformers' eager attention, from ids, mask and pixels: [B, H, T, T]."""
    return plain(**plain_inputs(batch), output_attentions=True).attentions


@torch.no_grad()
def test_rows_are_eager_attention(tiny, plain, batch):
    """For every layer and head, on a padded batch of mixed sizes."""
    layers = tuple(range(tiny.network.config.text_config.num_hidden_layers))
    _, rows = answer_logits(tiny.network, batch, rows_of=layers)
    assert list(rows) == list(layers)
    eager = eager_attentions(plain, batch)
    for layer in layers:
        for i in range(len(batch["count"])):
            used = batch["answer_labels"][i] != -100
            positions = batch["answer_positions"][i, used]
            torch.testing.assert_close(rows[layer][i][:, used], eager[layer][i][:, positions], atol=1e-6, rtol=1e-5)


def digit_maps(eager, batch, layers, heads):
    """Mean rows of the digits' positions on the 14x14 grid, not renormalised, image by image."""
    maps = []
    for i in range(len(batch["count"])):
        digits = batch["answer_positions"][i, batch["digit_weights"][i] > 0]
        rows = torch.stack([eager[layer][i][list(heads)][:, digits] for layer in layers]).mean(dim=(0, 1, 2))
        visual = rows[batch["mm_token_type_ids"][i].bool()].double()
        _, height, width = (batch["image_grid_thw"][i] // 2).tolist()
        maps.append(torch.from_numpy(resample_map(visual.reshape(height, width).numpy(), (14, 14))))
    return maps


@torch.no_grad()
def test_heatmap_from_eager_attention_by_hand(tiny, plain, batch):
    """Layers 1 and 3, heads 0 and 2, image by image: cut out the visual tokens, fold them, move them to 14x14."""
    got = Attention(tiny.network, (1, 3), (0, 2))(batch)
    for i, moved in enumerate(digit_maps(eager_attentions(plain, batch), batch, (1, 3), (0, 2))):
        torch.testing.assert_close(got[i].double(), moved / moved.sum(), atol=1e-6, rtol=1e-4)


def test_mass_on_text_is_left_out(batch):
    text = (1 - batch["mm_token_type_ids"]).float()
    assert visual_mass(text, batch).abs().max() == 0
    visual = batch["mm_token_type_ids"].float()
    torch.testing.assert_close(visual_mass(visual, batch).sum(dim=(1, 2)), visual.sum(dim=1))


@torch.no_grad()
def test_autocast_does_not_touch_the_map(batch):
    rows = torch.rand(len(batch["count"]), batch["answer_labels"].shape[1], batch["input_ids"].shape[1])
    plain = digits_mass(rows, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(digits_mass(rows, batch), plain)


@torch.no_grad()
def test_looking_at_samples_is_the_heatmap_of_each(tiny, mixed_samples, batch):
    """Each layer and head, and their mean."""
    seen = look(tiny, mixed_samples, layers=(1, 2, 3), batch_size=3, answer="true")
    assert seen.maps.shape == (4, 3, 4, 14, 14)
    torch.testing.assert_close(mean_map(seen, [1, 2]).maps, Attention(tiny.network)(batch), atol=1e-6, rtol=1e-4)
    one = seen.maps[:, 1, 3]
    one = one / one.sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(one, Attention(tiny.network, (2,), (3,))(batch), atol=1e-6, rtol=1e-4)


def test_corner_share():
    maps = torch.ones(2, 1, 2, 14, 14)
    maps[:, 0, 1] = 0
    maps[:, 0, 1, 0, 0] = 0.5
    torch.testing.assert_close(corner_share(maps), torch.tensor([[1 / 196, 1.0]]))


@pytest.mark.parametrize(("depth", "layers"), [(4, (2, 3)), (28, (14, 18, 22, 26)), (36, (18, 23, 28, 33)), (2, (1,))])
def test_default_layers(depth, layers):
    assert default_layers(depth) == layers


def readme_example():
    """A user's own file with a method, as the README shows it."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "@register" in code]
    return textwrap.dedent(code)


@torch.no_grad()
def test_the_readme_s_example_is_a_method(tiny, batch, monkeypatch):
    """It looks at the first digit: as `attention` where there is one digit, and else not."""
    monkeypatch.setattr(heatmaps, "METHODS", dict(heatmaps.METHODS))
    exec(readme_example(), {"__name__": "my_method"})
    got, attention = make_heatmap(tiny.network, "first_digit")(batch), Attention(tiny.network)(batch)
    single = torch.tensor(batch["count"]) < 10
    assert single.any() and not single.all()
    torch.testing.assert_close(got[single], attention[single])
    assert (got - attention)[~single].abs().amax(dim=(1, 2)).min() > 1e-6


@pytest.mark.slow
def test_a_user_s_own_file_trains_and_evaluates_with_its_method(root, tmp_path):
    """In processes of its own, through the same command line."""
    (tmp_path / "my_method.py").write_text(readme_example())

    def run(*words):
        done = subprocess.run([sys.executable, "my_method.py", *map(str, words)], capture_output=True, text=True,
                              cwd=tmp_path, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    run("train", "--data", root, "--out", "run", "--limit", 4, "--batch-size", 2, "--log-every", 1,
        "--heatmap", "first_digit", "--tracking", "disabled")  # fmt: skip
    for method in ("first_digit", "attention"):
        run("evaluate", "--data", root, "--model", "run/last", "--limit", 4, "--heatmap", method,
            "--json", f"{method}.json")  # fmt: skip
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())["last"]
    kl = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["metrics"]["kl"]
        for name in ("first_digit", "attention")
    }
    assert kl["first_digit"] == pytest.approx(trained["kl"], rel=1e-4)
    assert kl["first_digit"] != pytest.approx(kl["attention"], rel=1e-4)


@pytest.mark.parametrize(("config", "absent"), [(TrainConfig, "relative_attention"), (EvaluateConfig, "saliency")])
def test_a_method_that_a_command_cannot_use_is_refused(config, absent):
    with pytest.raises(ConfigError, match=rf"heatmap \(--heatmap\) is {absent}, but must be one of attention, "):
        config(data=Path("root"), heatmap=absent)


@torch.no_grad()
def test_relative_attention_from_eager_attention_by_hand(tiny, plain, mixed_samples, batch):
    """Two whole sequences of transformers' own: with the question, and with a neutral one."""
    got = RelativeAttention(tiny.network, (1, 3), (0, 2))(batch)
    attention = digit_maps(eager_attentions(plain, batch), batch, (1, 3), (0, 2))
    for i, sample in enumerate(mixed_samples):
        alone = Collate(tiny.tokenizer, tiny.image_processor)([sample])
        inputs = {**plain_inputs(alone), **neutral_question(tiny, int(alone["mm_token_type_ids"].sum()))}
        eager = plain(**inputs, output_attentions=True).attentions
        rows = torch.stack([eager[layer][0, [0, 2], -1] for layer in (1, 3)]).mean(dim=(0, 1))
        _, height, width = (alone["image_grid_thw"][0] // 2).tolist()
        visual = rows[inputs["mm_token_type_ids"][0].bool()].double()
        neutral = resample_map(visual.reshape(height, width).numpy(), (14, 14))
        ratio = attention[i] / torch.from_numpy(neutral)
        torch.testing.assert_close(got[i].double(), ratio / ratio.sum(), atol=1e-6, rtol=1e-3)


def neutral_question(model, visual):
    """The neutral question about an image of so many tokens, encoded in one piece."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": NEUTRAL}]}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * visual), return_tensors="pt").input_ids
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.network.config.image_token_id).int(),
    }


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name in METHODS if name != "occlusion"])  # hides bytes: test_occlusion
def test_a_question_that_was_read_already_changes_no_map(tiny, batch, method):
    """`look`, `evaluate` and `predict` hand it on; logits are the same, too."""
    heatmap = make_heatmap(tiny.network.eval(), method)
    (logits, whole), (read, behind) = (
        heatmap.with_logits(batch, prompts=prompts) for prompts in (None, read_prompts(tiny.network, batch))
    )
    used = batch["answer_labels"] != -100
    torch.testing.assert_close(read[used], logits[used], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(behind, whole, atol=1e-6, rtol=1e-4)


def test_what_a_method_or_a_model_does_not_have_is_refused(tiny):
    for name in ("token_gradient", "input_gradient", "occlusion"):
        for choice in ({"layers": (1,)}, {"heads": (0,)}):
            with pytest.raises(ConfigError, match=f"{name} has no layers and heads to choose: leave attention_layers"):
                make_heatmap(tiny.network, name, **choice)
    for name, choice, last in (("layers", (1, 4), 3), ("heads", (-1,), 3), ("layers", (), 3)):
        with pytest.raises(ConfigError, match=f"attention_{name} is .*, but this model has 0 to {last}"):
            make_heatmap(tiny.network, "relative_attention", **{name: choice})
    with pytest.raises(ConfigError, match="heatmap is 'saliency', but must be one of attention, relative_attention"):
        make_heatmap(tiny.network, "saliency")
    with pytest.raises(ConfigError, match="for looking.*train with one of attention, token_gradient, input_gradient"):
        make_heatmap(tiny.network, "relative_attention").with_logits({}, create_graph=True)
