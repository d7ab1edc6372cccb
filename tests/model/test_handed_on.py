"""After training, answering and predicting nothing of torch or transformers is changed, and the network is theirs.

In a process of its own, which looks at both before the library is imported.
"""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def run_alone(tmp_path, samples, layers):
    """This file as a program."""
    (tmp_path / "samples").write_bytes(pickle.dumps(samples))
    done = subprocess.run(
        [sys.executable, __file__, tmp_path, layers], capture_output=True, text=True, check=False, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.medium
def test_a_network_is_handed_on_as_it_came(tmp_path, mixed_samples):
    run_alone(tmp_path, mixed_samples, "plain")


@pytest.mark.slow
def test_a_compiled_network_is_handed_on_as_it_came(tmp_path, mixed_samples):
    run_alone(tmp_path, mixed_samples, "compiled")


# --- The program


def process_state():
    """What belongs to everybody in a process, by name."""
    import signal

    import torch
    import torch._dynamo.config
    import torch._inductor.config
    import tqdm
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.models.qwen3_vl import modeling_qwen3_vl
    from transformers.utils import logging

    found = {f"dynamo {key}": value for key, value in torch._dynamo.config.get_config_copy().items()}
    found |= {f"inductor {key}": value for key, value in torch._inductor.config.get_config_copy().items()}
    found |= {f"transformers {key}": value for key, value in vars(modeling_qwen3_vl).items()}
    classes = [value for value in vars(modeling_qwen3_vl).values() if isinstance(value, type)]
    classes += [*torch.nn.Module.__subclasses__(), torch.nn.Module]
    for kind in classes:
        found |= {f"{kind} {name}": vars(kind).get(name) for name in ("__call__", "forward", "_call_impl")}
    for interface in (AttentionInterface, AttentionMaskInterface):
        found |= {f"{interface} {name}": interface()[name] for name in ("sdpa", "eager") if name in interface()}
    cuda = torch.backends.cuda
    found |= {
        f"backend {name}": getattr(cuda, f"{name}_sdp_enabled")()
        for name in ("flash", "math", "mem_efficient", "cudnn")
    }
    found |= {f"signal {number}": signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    found["tqdm"] = vars(tqdm.tqdm)["__init__"]
    found["verbosity"] = logging.get_verbosity()
    found["numbers"] = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    found["threads"] = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    return found


def network_state(network):
    """Hooks, functions of single modules, and attention implementations."""
    found = {}
    for name, module in network.named_modules():
        hooks = [key for key, value in vars(module).items() if "hook" in key and value]
        found[name] = hooks, "forward" in vars(module), getattr(module, "training", None), set(vars(module))
    configs = network.config, network.config.text_config, network.config.vision_config
    found["attention"] = [config._attn_implementation for config in configs]
    found["requires_grad"] = [weight.requires_grad for weight in network.parameters()]
    return found


def differences(before, after):
    """What was there already and is another thing."""
    return {key: (value, after.get(key)) for key, value in before.items() if after.get(key) != value}


def use(model, samples, compiled):
    """A step of training, a validation, a prediction."""
    from fsc147lib.evaluation import evaluate_samples
    from fsc147lib.model import Collate, choose_compute, make_heatmap, predict
    from fsc147lib.model.network import compile_layers
    from fsc147lib.training.losses import DualLoss
    from fsc147lib.training.step import TrainingStep, make_accelerator, make_optimizer

    compute, heatmap = choose_compute("fp32"), make_heatmap(model.network)
    batch = Collate(model.tokenizer, model.image_processor)(samples)
    if compiled:
        compile_layers(model.network, heatmap.layers)
    optimizer = make_optimizer(model.network, 1e-3)
    step = TrainingStep(DualLoss(model.network, heatmap=heatmap), optimizer, make_accelerator(compute), compute)
    for method in ("attention", "token_gradient"):
        step.loss.heatmap = make_heatmap(model.network, method)
        step([batch], 0.1)
    evaluate_samples(model, samples)
    predict(model, samples[0].image, "apples")
    return batch


def main(folder, layers):
    """AssertionError where something is not as it was."""
    before = process_state()

    import torch
    from plain import generated, plain_inputs, plain_network

    from fsc147lib.model import load_model

    samples = pickle.loads((folder / "samples").read_bytes())
    model = load_model("tiny-dual")
    network = model.network
    as_loaded = network_state(network)
    if layers == "compiled":  # graphs run as they are: no C++ compiler, less than a minute
        compile_ = torch.nn.Module.compile
        torch.nn.Module.compile = lambda module, **how: compile_(module, backend="aot_eager", **how)
    batch = use(model, samples, layers == "compiled")
    if layers == "compiled":
        torch.nn.Module.compile = compile_

    changed = differences(before, process_state())
    if layers == "compiled":  # a public limit, raised for graphs of several kinds
        assert changed.pop("dynamo recompile_limit")[1] == torch.compiler.config.recompile_limit == 32
    assert not changed, changed
    left = differences(as_loaded, network_state(network))
    assert layers == "compiled" or not left, left

    model.save(folder / "model")
    assert "sdpa_with_rows" not in (folder / "model" / "config.json").read_text()
    plain = plain_network(folder / "model")
    inputs, end = plain_inputs(batch), model.tokenizer
    with torch.no_grad():
        wanted, said = plain(**inputs).logits[batch["attention_mask"].bool()], generated(plain, batch, end, 8)
        for handed_on in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert plain.state_dict().keys() == handed_on.state_dict().keys()
            logits = handed_on(**inputs).logits[batch["attention_mask"].bool()]
            torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-5)  # patches are a product, not a convolution
            assert generated(handed_on, batch, end, 8) == said
    assert len({tuple(answer) for answer in said}) > 1


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main(Path(sys.argv[1]), sys.argv[2])
