"""Check results on the device: golden files, precision, schedules and padding.

environment   what it ran on
parity        the golden tensors in float32 without TF32
precision     bfloat16 against float32, the same weights and tokens, one segment
ragged        rows padded on the left against each row alone, in float32; then what they cost
              against equal rows with as many tokens
"""

import copy
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

from benchmarks import ragged as ragged_batches
from melodi_hf import from_meliad
from tests import parity_report

from .bench import GIB, with_goal

ROOT = Path(__file__).resolve().parents[2]


def environment(bench, found):
    """Record device and versions."""
    found |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": command_output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "device": platform.machine(),
        "model": bench.sizes.config or "defaults of MelodiConfig",
    }
    if bench.is_cuda:
        device = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version", "--format=csv,noheader"
        found |= {
            "device": device.name,
            "memory GiB": device.total_memory / GIB,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": command_output("nvidia-smi", *query),
        }


def command_output(*command):
    """Return the first line of a command's output; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]


def parity(bench, found):
    """Record the largest difference by kind of tensor, overall and by golden file."""
    worst, by_file = {}, {}
    found |= {"worst": worst, "files": by_file}
    for path in parity_report.golden_files():
        kinds = by_file.setdefault(path.stem, {})
        model = from_meliad(path).to(bench.device)
        for name, difference in parity_report.measure(path, model).items():
            kind = parity_report.kind_of(name)
            kinds[kind] = max(kinds.get(kind, 0.0), difference)
            worst[kind] = max(worst.get(kind, 0.0), difference)
    goal = 1e-4 if bench.is_cuda else 1e-5
    found["largest difference"] = with_goal(max(worst.values()), goal, at_most=True)


def precision(bench, found):
    """Compare bfloat16 with float32: under autocast, as in training, and with bfloat16 weights."""
    model = bench.model().eval()
    ids = bench.ids(1, bench.sizes.segment)
    exact = logits_loss_gradients(model, ids)
    with torch.autocast(bench.device.type, torch.bfloat16):
        rounded = logits_loss_gradients(model, ids)
    found["autocast"] = deviation(exact, rounded)
    rounded = logits_loss_gradients(copy.deepcopy(model).to(torch.bfloat16), ids)
    found["bfloat16 weights"] = deviation(exact, rounded)


def logits_loss_gradients(model, ids):
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    named = model.named_parameters()
    gradients = {name: p.grad.float().clone() for name, p in named if p.grad is not None}
    return output.logits.detach().float(), output.loss.item(), gradients


def deviation(exact, rounded):
    """Compare two results of `logits_loss_gradients`."""
    difference, scale = rounded[0] - exact[0], exact[0].std()
    cosines = {
        name: torch.cosine_similarity(rounded[2][name].flatten(), gradient.flatten(), dim=0).item()
        for name, gradient in exact[2].items()
        if gradient.any()
    }
    worst = min(cosines, key=cosines.get)
    rms, largest = difference.square().mean().sqrt(), difference.abs().max()
    return {
        "rms difference of logits / their deviation": (rms / scale).item(),
        "largest difference of logits / their deviation": (largest / scale).item(),
        "loss in float32": exact[1],
        "difference of loss": rounded[1] - exact[1],
        "gradient cosine, median of parameters": statistics.median(cosines.values()),
        "gradient cosine, worst": cosines[worst],
        "worst parameter": worst,
    }


def largest_difference(exact, other):
    """Of tensors by name, the largest difference, and that beside the largest number of its own
    tensor."""
    pairs = {name: ((other[name] - x).abs().max(), x.abs().max()) for name, x in exact.items()}
    relative = {name: (gap / top.clamp(min=1e-30)).item() for name, (gap, top) in pairs.items()}
    worst = max(relative, key=relative.get)
    absolute = max(gap.item() for gap, _ in pairs.values())
    return {"absolute": absolute, "relative": relative[worst], "worst": worst}


def ragged(bench, found):
    """Check and time a batch with padding."""
    window = bench.config().window_length
    gap = ragged_difference(bench, [round(n * window) for n in (0.6, 1.2, 2.1, 3.0)])
    found["difference from rows alone"] = gap
    found["largest difference"] = with_goal(gap["relative"], 1e-4, at_most=True)
    model = bench.model().to(torch.bfloat16).eval()
    found["rows"] = []
    for described in ("evenly spread", "one is long"):
        lengths = [round(n * window) for n in ragged_batches.LENGTHS[described]]
        found["rows"].append({"lengths": described} | ratios(bench, model, lengths))


@torch.no_grad()
def ragged_difference(bench, lengths):
    """Compare the last logits of left-padded rows with those of each row alone."""
    model = bench.model().eval()
    vocab_size = model.config.vocab_size
    ids, mask = (t.to(bench.device) for t in ragged_batches.batch(lengths, vocab_size, "left"))
    batched = model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
    pairs = zip(ids, lengths, strict=True)
    alone = [model(row[-n:][None], logits_to_keep=1).logits[0, -1] for row, n in pairs]
    return largest_difference({"logits": torch.stack(alone)}, {"logits": batched})


def ratios(bench, model, lengths):
    """Return the median time relative to equal rows with the same number of tokens."""
    tokens, each = sum(lengths), []
    for batch in ([tokens // len(lengths)] * len(lengths), lengths):
        ids, mask = ragged_batches.batch(batch, model.config.vocab_size, "left")
        each.append(
            ragged_batches.make_workloads(model, ids.to(bench.device), mask.to(bench.device))
        )
    found = {}
    for name in each[0]:
        equal, uneven = each[0][name], each[1][name]
        equal(), uneven()  # buffers are allocated, kernels chosen
        pairs = [(bench.seconds(uneven), bench.seconds(equal)) for _ in range(bench.sizes.steps)]
        found[name] = statistics.median(a / b for a, b in pairs)
    return found
