"""Adapters are saved as peft saves them; peft, `load_model` and `merge` compute what the trained network does."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from plain import plain_inputs, plain_network
from safetensors.torch import load_file

from fsc147lib.__main__ import main
from fsc147lib.model.load import count_parameters, load_model
from fsc147lib.model.network import ModelError, freeze_vision, save_memory
from fsc147lib.options import ConfigError
from fsc147lib.training.loop import TrainConfig, train
from fsc147lib.training.setup import Run

pytestmark = pytest.mark.medium

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
SAVED = {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json", "recipe.json", *TOKENIZER}


@torch.no_grad()
def logits(network, batch):
    return network.eval()(**plain_inputs(batch)).logits


def adapted(model, base, vision):
    """The model with adapters, and perhaps an encoder, that training has moved."""
    save_memory(model.network, 4, False, "fp32", str(base), vision)
    freeze_vision(model.network, not vision)
    with torch.no_grad():
        for weight in model.network.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    return model


@pytest.fixture(params=[False, True], ids=["adapters-alone", "with-the-encoder"])
def saved(request, tiny, tiny_folder, batch, tmp_path):
    """A folder of adapters, and the logits of the network that it was saved from."""
    torch.manual_seed(0)
    before = logits(tiny.network, batch)
    model = adapted(tiny, tiny_folder, request.param)
    model.save(tmp_path / "adapters")
    expected = logits(model.network, batch)
    assert (expected - before).abs().max() > 0.1
    return tmp_path / "adapters", expected


def close(found, expected):
    torch.testing.assert_close(found.float(), expected, atol=2e-4, rtol=1e-4)


def test_peft_reads_them_over_the_plain_model(saved, plain, tiny_folder, batch):
    folder, expected = saved
    assert {path.name for path in folder.iterdir()} == SAVED
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)
    close(logits(PeftModel.from_pretrained(plain, folder), batch), expected)


def test_a_folder_of_adapters_is_a_model(saved, tiny_folder, batch):
    folder, expected = saved
    model = load_model(folder)
    close(logits(model.network, batch), expected)
    assert all(weight.requires_grad for weight in model.network.parameters())
    whole = load_model(tiny_folder).network.state_dict()
    assert model.network.state_dict().keys() == whole.keys()
    assert count_parameters(folder) == count_parameters(tiny_folder)


def test_merge_writes_a_model_for_plain_transformers(saved, batch, tmp_path, capsys):
    """In bfloat16 each weight is the float32 one, rounded once."""
    folder, expected = saved
    for dtype in ("fp32", "bf16"):
        assert main(["merge", str(folder), str(tmp_path / dtype), "--dtype", dtype]) == 0
    close(logits(plain_network(tmp_path / "fp32"), batch), expected)
    wide, narrow = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("fp32", "bf16"))
    assert wide.keys() == narrow.keys()
    assert all(torch.equal(narrow[name], value.bfloat16()) for name, value in wide.items())
    assert main(["merge", str(folder), str(tmp_path / "fp32")]) == 2
    assert "is not empty" in capsys.readouterr().err


def in_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def adapters_below(folder):
    shutil.copytree(folder, folder.parent / "below")
    in_config(base_model_name_or_path=str(folder.parent / "below"))(folder)


DAMAGES = {  # what is done to a folder of adapters, and what is said of it
    "no base": (in_config(base_model_name_or_path="gone"), "cannot be loaded: there is no model folder gone"),
    "adapters below": (adapters_below, "below holds adapters, below which others cannot lie: `fsc147lib merge`"),
    "no LoRA": (in_config(peft_type="IA3"), "its adapters are .*IA3: LoRA's can be used"),
    "another rank": (in_config(r=3), "size mismatch"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "No such file.*adapter_model"),
    "more layers": (in_config(target_modules=".*(q_proj|blocks.0.attn.proj)"), "tensors that the weights lack: 2"),
    "fewer layers": (in_config(target_modules=".*layers.*k_proj"), "tensors that the model has no place for"),
    "weights, too": (lambda folder: (folder / "model.safetensors").touch(), "an adapter lies beside the weights"),
}  # fmt: skip


@pytest.mark.parametrize("saved", [False], indirect=True, ids=["adapters-alone"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters_are_refused(saved, damage):
    change, sentence = DAMAGES[damage]
    change(saved[0])
    with pytest.raises(ModelError, match=f"(?s){sentence}"):
        load_model(saved[0])


def test_an_encoder_that_trains_stays_wide_beside_narrow_weights(tiny):
    """It was narrow, too: at small learning rates it stood still, and a GradScaler refuses its fp16 gradients."""
    save_memory(tiny.network, 4, False, "bf16", "tiny", keep_vision=True)
    kinds = {name: weight.dtype for name, weight in tiny.network.named_parameters()}
    assert all(kind == torch.float32 for name, kind in kinds.items() if ".visual." in name or "lora_" in name)
    assert kinds["model.language_model.embed_tokens.weight"] == torch.bfloat16


def test_a_run_saves_adapters_alone_and_commands_take_them(root, tmp_path, tiny_folder, monkeypatch, capsys):
    """They name the model by its whole path; new adapters want whole weights below."""
    monkeypatch.chdir(tiny_folder.parent)
    settings = {"data": root, "limit": 4, "batch_size": 4, "tracking": "disabled", "lora": 2, "unfreeze_vision_at": 9}
    config = TrainConfig(out=tmp_path / "run", model=tiny_folder.name, **settings)
    train(config)
    for name in ("best", "last"):
        checkpoint = {path.name for path in (config.out / name).iterdir()}
        assert checkpoint == SAVED | {"moments.st", "training_state.json", "validation.csv", "manifest.json"}
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--data", str(root), "--limit", "4", "--split", "val", "--before", str(tiny_folder)]
    assert main([*words, "--model", "run/best"]) == 0
    assert f"before ({tiny_folder})" in capsys.readouterr().out
    with pytest.raises(ModelError, match="is the folder of a run: give one of its checkpoints"):
        load_model("run")
    with pytest.raises(ModelError, match="holds adapters, below which others cannot lie: `fsc147lib merge`"):
        Run(TrainConfig(out=tmp_path / "more", model="run/best", **settings))


def test_rank_and_seed_are_checked(root):
    with pytest.raises(ConfigError, match="lora.*at least 1"):
        TrainConfig(root, lora=0)
    with pytest.raises(ConfigError, match="seed.*is 1, but must be 0 with --lora"):
        TrainConfig(root, model="tiny-random", lora=4, seed=1)
