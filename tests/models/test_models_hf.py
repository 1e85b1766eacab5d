"""transformers knows our format, whichever of the two packages is imported first."""

import subprocess
import sys

import pytest
import torch
from models_written import rules, save_llama, tokens, write

ORDERS = {
    "posttrain first": "import posttrain\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "import transformers\nimport posttrain\n"
    "from transformers import AutoModelForCausalLM",
    "after the table of quantizers": "import transformers.quantizers.auto\nimport posttrain\n"
    "from transformers import AutoModelForCausalLM",
    "from a part of posttrain": "from posttrain.errors import UserError\n"
    "from transformers import AutoModelForCausalLM",
}
PRINT_NORM = """
from safetensors.torch import load_file
import sys, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
kind = type(model.model.layers[0].mlp.up_proj).__name__
with torch.no_grad():
    print(kind, model(load_file(sys.argv[2])["t"]).logits.double().norm().item())
"""


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    base = save_llama(folder / "base", hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    from safetensors.torch import save_file

    save_file({"t": tokens()}, folder / "tokens")
    return write(base, folder / "q", rules("nf4", "a8")).out_dir


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(checkpoint, order):
    from posttrain.models.load import load

    done = run(ORDERS[order] + PRINT_NORM, checkpoint, checkpoint.parent / "tokens")
    assert done.returncode == 0, done.stderr[-2000:]
    kind, norm = done.stdout.split()
    with torch.no_grad():
        mine = load(checkpoint)(tokens()).logits.double().norm().item()
    assert kind == "QuantLinear" and float(norm) == mine


def test_without_posttrain_transformers_does_not_know_the_format(checkpoint):
    script = "from transformers import AutoModelForCausalLM" + PRINT_NORM
    done = run(script, checkpoint, checkpoint.parent / "tokens")
    assert done.returncode != 0 or "QuantLinear" not in done.stdout


def test_importing_posttrain_imports_nothing_heavy():
    script = """
import sys, posttrain
from posttrain.errors import UserError
heavy = {"torch", "transformers", "numpy", "safetensors", "gguf", "yaml", "tqdm"}
assert posttrain.UserError is UserError
assert {"__version__", "compare", "evaluate", "load", "quantize", "run"} <= set(posttrain.__all__)
print(sorted(heavy & set(sys.modules)))
"""
    done = run(script)
    assert done.stdout.strip() == "[]", done.stderr


def test_registering_twice_is_harmless():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from posttrain.models import hf

    hf.register()
    hf.register()
    assert AUTO_QUANTIZER_MAPPING["posttrain"] is hf.PosttrainQuantizer


def test_a_loaded_model_generates(checkpoint):
    from transformers import AutoModelForCausalLM

    import posttrain
    from posttrain.models.load import load

    assert posttrain.load is not None
    peer = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokens()[:1, :5]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load(checkpoint).generate(ids, **options), peer.generate(ids, **options))


def test_a_model_loaded_by_transformers_saves_and_loads_again(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    from posttrain.models.load import load

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(tokens()).logits, model(tokens()).logits)
