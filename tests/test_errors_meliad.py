"""`from_meliad` refuses a file that it cannot read whole, and says which and why."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, safe_open, save_file

import melodi_hf

from .cases import every_case

SOURCE = Path(__file__).parent / "golden" / "melodi_base.safetensors"


def rewritten(path, change_tensors=lambda tensors: None, change_sizes=lambda sizes: None):
    """A golden file's parameters, changed, as a file of their own."""
    with safe_open(SOURCE, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    tensors = {n: t for n, t in load_file(SOURCE).items() if n.startswith("params/")}
    change_tensors(tensors)
    change_sizes(sizes)
    save_file(tensors, path, metadata={"config": json.dumps(sizes)})
    return path


def test_parameters_alone_suffice(tmp_path):
    melodi_hf.from_meliad(rewritten(tmp_path / "parameters.safetensors"))


@every_case("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_file(tmp_path, kept):
    path, content = tmp_path / "cut.safetensors", SOURCE.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        melodi_hf.from_meliad(path)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors"):
        melodi_hf.from_meliad(tmp_path / "nowhere.safetensors")


def test_file_without_sizes(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file(load_file(SOURCE), path)
    with pytest.raises(ValueError, match=r"bare\.safetensors.*config"):
        melodi_hf.from_meliad(path)


def test_unknown_model(tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("melodi_layer", "another_layer")] = tensors.pop(name)

    with pytest.raises(ValueError, match=r"another\.safetensors"):
        melodi_hf.from_meliad(rewritten(tmp_path / "another.safetensors", rename))


@pytest.mark.parametrize("name", ["embed/embedding", "layer_stack/final_layernorm/scale"])
def test_missing_parameter(tmp_path, name):
    path = tmp_path / "incomplete.safetensors"
    with pytest.raises(ValueError, match=name):
        melodi_hf.from_meliad(rewritten(path, lambda tensors: tensors.pop(f"params/{name}")))


def test_parameter_that_the_model_does_not_have(tmp_path):
    def add(tensors):
        scale = tensors["params/layer_stack/final_layernorm/scale"]
        tensors["params/layer_stack/another_layernorm/scale"] = scale.clone()

    with pytest.raises(ValueError, match="another_layernorm"):
        melodi_hf.from_meliad(rewritten(tmp_path / "more.safetensors", add))


def test_sizes_that_the_parameters_do_not_have(tmp_path):
    path = tmp_path / "wider.safetensors"
    with pytest.raises(ValueError, match=r"mlp_dim|ffn"):
        melodi_hf.from_meliad(rewritten(path, change_sizes=lambda sizes: sizes.update(mlp_dim=65)))


def test_sizes_that_lack_one(tmp_path):
    path = tmp_path / "fewer.safetensors"
    with pytest.raises(ValueError, match="num_heads"):
        melodi_hf.from_meliad(rewritten(path, change_sizes=lambda sizes: sizes.pop("num_heads")))


def test_sizes_that_cannot_be(tmp_path):
    path = tmp_path / "no_windows.safetensors"
    with pytest.raises(ValueError, match="window_length"):
        melodi_hf.from_meliad(
            rewritten(path, change_sizes=lambda sizes: sizes.update(window_length=0))
        )


def test_sizes_that_are_not_json(tmp_path):
    path = tmp_path / "garbled.safetensors"
    save_file(load_file(SOURCE), path, metadata={"config": "{"})
    with pytest.raises(ValueError, match=r"garbled\.safetensors"):
        melodi_hf.from_meliad(path)


def test_parameter_that_is_not_a_number(tmp_path):
    def spoil(tensors):
        tensors["params/embed/embedding"][0, 0] = float("nan")

    with pytest.raises(ValueError, match="embed"):
        melodi_hf.from_meliad(rewritten(tmp_path / "spoiled.safetensors", spoil))


def test_side_layer_that_cannot_be_read(tmp_path):
    source, path = SOURCE.with_name("memorizing_dense.safetensors"), tmp_path / "two.safetensors"
    with safe_open(source, "pt") as file:
        sizes = json.loads(file.metadata()["config"]) | {"memory_layer_indices": [0, 1]}
    save_file(load_file(source), path, metadata={"config": json.dumps(sizes)})
    with pytest.raises(ValueError, match=r"memory_layer_indices are \[0, 1\] .*one side layer"):
        melodi_hf.from_meliad(path)
