"""How far the models are from golden tensors.

`python -m tests.parity_report` prints the worst difference per file and kind of tensor.
"""

import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, safe_open

import melodi_hf
from melodi_hf.models.meliad import to_meliad

KINDS = ("logits", "hidden", "layers", "state", "loss", "grads")


def golden_files():
    """The files beside the tests, or those of the folder that MELODI_GOLDEN names."""
    folder = Path(os.environ.get("MELODI_GOLDEN", Path(__file__).parent / "golden"))
    systems = ("melodi_*", "transformer_xl*", "block_recurrent*", "memorizing_*")
    return [path for name in systems for path in sorted(folder.glob(f"{name}.safetensors"))]


def read_golden(path):
    """The parameters of a file, the tensors of it that can be compared, and its sizes."""
    with safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    # The window cache of a side layer is never written there.
    tensors = {n: t for n, t in tensors.items() if "side_layer/kvi_cache/" not in n}
    return {n: t for n, t in tensors.items() if t.numel() or n.startswith("params/")}, sizes


def held(memory, name, config, tokens_given=0):
    """The part of a model's memory that the JAX code calls `name`.

    tokens_given: to each row since the first call, new documents or not: they say where in its ring
    the JAX code writes next, at the slot that is the oldest.
    """
    if "recurrent_memory" in name:
        index = tokens_given % config.memory_length
        if name.endswith("write_index_test"):
            return torch.tensor(index)
        field = name.rpartition("/")[2].removesuffix("_test")
        slots = getattr(memory.layers[config.memory_layer], field)
        return slots[:, :, -config.memory_length :].transpose(1, 2).roll(index, dims=1)
    window_length = config.window_length
    layer = memory.layers[int(re.search(r"(?:melodi_layers_|transformer)(\d+)", name)[1])]
    if "recurrent_state" in name:
        return layer.state
    if "previous_mems" not in name:  # the last tokens of each row, of one window or of two
        slots = (layer.keys if "keys" in name else layer.values).transpose(1, 2)
        fill = (memory.progress.tokens_read % window_length).tolist()
        rows = zip(slots, fill, strict=True)
        return torch.stack([row[begun : begun + window_length] for row, begun in rows])
    return layer.short if "short_memory" in name else layer.long


def read_segment(model, input_ids, memory, start):
    """Return the output of one call, what each layer returned, and a list beside it: the summary
    tokens that each layer returned, windows in order; or the side layer's input and output."""
    left, beside = [], []

    def watch(module, args, kwargs, output):
        beside.extend(kwargs["plan"].unpack(x) for x in (args[0], output[0]))

    def watch_layer(module, args, kwargs, output):
        left.append((kwargs["plan"].unpack(output[0]), output[1]))

    hooks = [
        layer.register_forward_hook(watch_layer, with_kwargs=True) for layer in model.model.layers
    ]
    sides = [layer.side for layer in model.model.layers if hasattr(layer, "side")]
    hooks += [side.register_forward_hook(watch, with_kwargs=True) for side in sides]
    output = model(
        input_ids,
        memory=memory,
        reset_memory=start,
        labels=input_ids,
        return_memory=True,
        output_hidden_states=True,
    )
    for hook in hooks:
        hook.remove()
    has_summary = model.config.model_type == "melodi"
    us = [windows_in_order(result[1], len(input_ids)) for result in left] if has_summary else beside
    return output, [result[0] for result in left], us


def windows_in_order(summaries, rows):
    """Summary tokens of all windows, window after window of all rows: C*B U D -> B C*U D."""
    return summaries.unflatten(0, (-1, rows)).transpose(0, 1).flatten(1, 2)


def named_layers(prefix, sizes, xs, beside):
    """What left the layers, by the names of the JAX code."""
    named = {f"{prefix}/layer{i}/xs": x for i, x in enumerate(xs)}
    if "memory_layer_indices" not in sizes:
        return named | {f"{prefix}/layer{i}/us": u for i, u in enumerate(beside)}
    (behind,) = sizes["memory_layer_indices"]
    x, y = beside
    return named | {f"{prefix}/layer{behind}/xs": x, f"{prefix}/side_layer/xs": y}


def gradients(model):
    """By the names of the JAX code; zeros for a parameter that the loss does not depend on."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return to_meliad(found, model.config)


def measure(path, model=None, segments=None, with_gradients=True):
    """Read all segments of a golden file, or the first -> each tensor's largest difference."""
    golden, sizes = read_golden(path)
    model = model or melodi_hf.from_meliad(path)
    golden = {name: tensor.to(model.device) for name, tensor in golden.items()}
    memory, differences, tokens_given = None, {}, 0
    for segment in range(segments or sizes["num_segments"]):
        inputs = f"inputs/seg{segment}"
        ids, start = golden[f"{inputs}/input_ids"], golden[f"{inputs}/start_of_sequence"]
        output, xs, us = read_segment(model, ids, memory, start)
        memory, tokens_given = output.memory, tokens_given + ids.shape[1]
        found = {
            f"outputs/seg{segment}/logits": output.logits,
            f"loss/seg{segment}/mean_cross_entropy": output.loss,
            f"outputs/seg{segment}/final_hidden": output.hidden_states[-1],
            **named_layers(f"layers/seg{segment}", sizes, xs, us),
        }
        state = [name for name in golden if name.startswith(f"state/seg{segment}/")]
        found |= {name: held(memory, name, model.config, tokens_given) for name in state}
        prefix = "grads" if segment == 0 else f"grads_seg{segment}"
        if with_gradients and f"{prefix}/embed/embedding" in golden:
            model.zero_grad()
            output.loss.backward()
            found |= {f"{prefix}/{name}": g for name, g in gradients(model).items()}
        differences |= {
            name: largest_difference(name, found[name], golden[name])
            for name in found.keys() & golden.keys()
        }
    return differences


def largest_difference(name, ours, theirs):
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    return (ours.detach().to(theirs.device) - theirs).abs().max().item()


def kind_of(name):
    top = name.split("/")[0]
    if top == "outputs":
        return "hidden" if name.endswith("final_hidden") else "logits"
    return "grads" if top.startswith("grads") else top


def main():
    sys.stdout.write(f"{'file':28}" + "".join(f"{kind:>10}" for kind in KINDS) + "\n")
    for path in golden_files():
        worst = {}
        for name, difference in measure(path).items():
            kind = kind_of(name)
            worst[kind] = max(worst.get(kind, 0.0), difference)
        cells = (f"{worst[kind]:.1e}" if kind in worst else "-" for kind in KINDS)
        sys.stdout.write(f"{path.stem:28}" + "".join(f"{cell:>10}" for cell in cells) + "\n")


if __name__ == "__main__":
    main()
