"""How weights come into a model: from disk when read, as 8-bit integers, never from a pickle."""

import re
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from .models import DOCUMENT, FEW, WINDOW, assert_equal, build, draw

ROOT = Path(__file__).parents[1]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def generate(model, ids):
    return model.generate(ids, max_new_tokens=WINDOW, do_sample=False)


# accelerate places a parameter that a model owns itself, and does not know it again
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")
@pytest.mark.parametrize("name", FEW)
def test_offloading_to_disk_changes_nothing(tmp_path, name):
    model, ids = build(name), draw(2, DOCUMENT)
    model.save_pretrained(tmp_path / "model")
    size = sum(weight.nbytes for weight in model.parameters())
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.7 * size)},
        offload_folder=str(tmp_path / "offload"),
    )
    places = set(offloaded.hf_device_map.values())
    assert places == {"cpu", "disk"}
    assert_equal(logits(offloaded, ids), logits(model, ids))
    assert_equal(generate(offloaded, ids), generate(model, ids))


@pytest.mark.parametrize("name", FEW)
def test_int8_weights(tmp_path, name):
    model, ids = build(name), draw(2, DOCUMENT)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    of_int8 = [w for w in quantised.parameters() if type(w) is not torch.nn.Parameter]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(of_int8) == len(linear) - 1, "all matrices but the head"
    wanted = logits(model, ids)
    error = (logits(quantised, ids) - wanted).std() / wanted.std()
    assert 1e-5 < error < 0.05
    assert generate(quantised, ids).shape == (2, DOCUMENT + WINDOW)


def test_saved_weights_are_safetensors(tmp_path):
    model = build("melodi")
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in files
    assert not [name for name in files if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl"}]
    saved = load_file(tmp_path / "model.safetensors")
    assert_equal(saved["model.norm.weight"], model.model.norm.weight)


def test_pickled_weights_are_not_loaded_unasked(tmp_path):
    model = build("melodi")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert_equal(loaded.model.norm.weight, model.model.norm.weight)


class Harm:
    """What a pickle can do to who loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_cannot_do_harm(tmp_path):
    build("melodi").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {**build("melodi").state_dict(), "harm": Harm(tmp_path / "harm")}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnpicklingError, match="weights_only"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "harm").exists(), "it would have been done"


def test_our_code_unpickles_nothing():
    sources = [p for room in ("melodi_hf", "training") for p in (ROOT / room).rglob("*.py")]
    assert len(sources) > 20
    for source in sources:
        text = source.read_text()
        for call in re.findall(r"torch\.load\(.*?\)", text, re.DOTALL):
            assert "weights_only=True" in call, f"{source}: {call}"
        assert not re.search(r"^\s*(import|from) (c?[pP]ickle|dill|joblib|shelve)\b", text, re.M)
        assert "allow_pickle=True" not in text, source
