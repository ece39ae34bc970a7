"""Compare implementations of attention with a trained T5 bias and a strict causal mask.

    as it is          what `melodi_hf.models.modules.attend` does on this device: torch's fused
                      attention with the bias as a mask of numbers that wants a gradient
    written out       softmax(q k + b) v, compiled
    flex, bucket      FlexAttention whose score_mod looks the bucket of each pair up in the table
    flex, distance    FlexAttention whose score_mod looks up a number per distance; the table is
                      laid out by distance before, and its gradient is summed there afterwards

Times are device times: on CUDA the calls are captured in a graph. Errors are the largest
differences from float64, relative to its largest number, for the output and the gradients of the
table and of q. The library does not use these variants; the results show which would be faster.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from melodi_hf.models.modules import MASK_VALUE, attend, distance_bucket, spread_by_distance

from .bench import capture_graph, record_error

BUCKETS, MAX_DISTANCE = 32, 128  # of the T5 bias, as in the configuration
REPEATED = 10  # calls per graph


class AttentionInputs:
    """Queries at the last positions of the keys, and a bias table (H buckets)."""

    def __init__(self, bench, shape, dtype):
        rows, heads, self.queries, self.keys, channels = self.shape = shape
        torch.manual_seed(0)

        def draw(tokens):
            return torch.randn(rows, heads, tokens, channels, device=bench.device)

        unit = torch.nn.functional.normalize
        q, k, v = (
            unit(draw(self.queries), dim=-1) * 4,
            unit(draw(self.keys), dim=-1),
            draw(self.keys),
        )
        self.table = torch.randn(heads, BUCKETS, device=bench.device, requires_grad=True)
        self.q, self.k, self.v = (t.to(dtype).requires_grad_() for t in (q, k, v))
        self.gradient = torch.randn_like(q).to(dtype)
        # Distances, from the largest: L; distance of each pair (i, j): T J
        total = self.queries + self.keys - 1
        self.distances = self.keys - 1 - torch.arange(total, device=bench.device)
        self.bucket = distance_bucket(
            torch.arange(self.keys, device=bench.device), BUCKETS, MAX_DISTANCE
        )

    def inputs(self):
        return self.table, self.q, self.k, self.v

    def exact(self):
        """Return the same inputs in float64."""
        twin = object.__new__(AttentionInputs)
        vars(twin).update(vars(self))
        for name in ("table", "q", "k", "v"):
            tensor = getattr(self, name).detach().double().requires_grad_()
            setattr(twin, name, tensor)
        twin.gradient = self.gradient.double()
        return twin

    def bias(self, table):
        """Return the bias (H T J), masked except for previous positions."""
        by_distance = table[:, distance_bucket(self.distances, BUCKETS, MAX_DISTANCE)]
        by_distance = by_distance.masked_fill(self.distances <= 0, MASK_VALUE)
        return spread_by_distance(by_distance, self.queries, self.keys)

    def block_mask(self):
        before = self.keys - self.queries

        def strictly_before(b, h, i, j):
            return j < i + before

        device = self.q.device
        return create_block_mask(strictly_before, None, None, self.queries, self.keys, device)


def library_attention(cell):
    def attended(table, q, k, v):
        return attend(q, k, v, cell.bias(table), in_order=True)

    return attended


def written_out(cell):
    def attended(table, q, k, v):
        scores = q @ k.transpose(-1, -2) + cell.bias(table).to(q.dtype)
        weights = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1)
        return weights.to(q.dtype) @ v

    return attended


def flex_bucket(cell):
    before, bucket, mask = cell.keys - cell.queries, cell.bucket, cell.block_mask()

    def attended(table, q, k, v):
        def score(score, b, h, i, j):
            distance = (i + before - j).clamp(min=0)
            return score + table[h, bucket[distance]]

        return flex_attention(q, k, v, score_mod=score, block_mask=mask, scale=1.0)

    return attended


def flex_distance(cell):
    before, bucket, mask = cell.keys - cell.queries, cell.bucket, cell.block_mask()

    def attended(table, q, k, v):
        by_distance = table[:, bucket]  # H J

        def score(score, b, h, i, j):
            return score + by_distance[h, (i + before - j).clamp(min=0)]

        return flex_attention(q, k, v, score_mod=score, block_mask=mask, scale=1.0)

    return attended


VARIANTS = {
    "as it is": (library_attention, False),
    "written out": (written_out, True),
    "flex, distance": (flex_distance, True),
    "flex, bucket": (flex_bucket, True),
}


def attention(bench, found):
    """Measure every variant at every shape, as long as time permits."""
    rows = found["rows"] = []
    dtype = torch.bfloat16 if bench.is_cuda else torch.float32
    for shape in bench.sizes.cells:
        cell = AttentionInputs(bench, shape, dtype)
        twin = cell.exact()
        exact = outputs_and_gradients(written_out(twin), twin)
        del twin
        for name, (way, compiles) in VARIANTS.items():
            if name == "flex, bucket" and shape != bench.sizes.cells[0]:
                continue  # compilation is slow, and one shape is enough to compare the two
            row = {"shape": "B{} H{} T{} J{} K{}".format(*shape), "way": name}
            rows.append(row)
            with record_error(row):
                measure(bench, cell, way(cell), compiles, exact, row)
        if shape == bench.sizes.cells[0]:
            with record_error(found):
                found["backends of torch's own, ms"] = backends(bench, cell)
    found["fastest forward and backward"] = fastest(rows)


def measure(bench, cell, attended, compiles, exact, row):
    is_flex = row["way"].startswith("flex")
    if compiles and bench.is_cuda:
        torch.compiler.reset()
        attended = torch.compile(attended, fullgraph=True, dynamic=False)
    if is_flex and not bench.is_cuda:  # without CUDA and compilation it has no backward
        with torch.no_grad():
            output = attended(*(tensor.detach() for tensor in cell.inputs()))
        row["error of output"] = relative(output, exact[0])
        row["note"] = "no CUDA: forward alone, not compiled"
        return
    row["seconds with compilation"] = bench.seconds(lambda: outputs_and_gradients(attended, cell))
    output, table, q = outputs_and_gradients(attended, cell)
    row["error of output"] = relative(output, exact[0])
    row["error of the table's gradient"] = relative(table, exact[1])
    row["error of q's gradient"] = relative(q, exact[2])
    row["forward, ms"] = 1e3 * device_seconds(bench, lambda: attended(*cell.inputs()))
    both = device_seconds(bench, lambda: outputs_and_gradients(attended, cell))
    row["forward and backward, ms"] = 1e3 * both
    row["peak GiB"] = peak(bench, lambda: outputs_and_gradients(attended, cell))


def outputs_and_gradients(attended, cell):
    """Return the output and the gradients of table and queries."""
    output = attended(*cell.inputs())
    table, q, *_ = torch.autograd.grad(output, cell.inputs(), cell.gradient)
    return output.detach(), table, q


def relative(tensor, exact):
    return ((tensor - exact).abs().max() / exact.abs().max()).item()


def device_seconds(bench, work):
    """Return the device seconds of one call, without launch overhead."""
    if not bench.is_cuda:
        return bench.median_seconds(work)

    def repeated():
        for _ in range(REPEATED):
            work()

    return bench.median_seconds(capture_graph(repeated)) / REPEATED


def peak(bench, work):
    """Return the peak memory above the current one, in GiB."""
    bench.free()
    if not bench.is_cuda:
        return None
    before = torch.cuda.memory_allocated() / (1 << 30)
    work()
    return bench.peak_gib() - before


def backends(bench, cell):
    """Measure the forward of each backend of torch's fused attention, or record its error.

    Once with a bias that requires a gradient, and once with one of four axes without gradient.
    """
    if not bench.is_cuda:
        return "no CUDA"
    found = {}
    for wants_gradient in (True, False):
        table = cell.table if wants_gradient else cell.table.detach()
        bias = cell.bias(table).to(cell.q.dtype)
        bias = bias if wants_gradient else bias[None]

        def attended(bias=bias):
            args = cell.q, cell.k, cell.v, bias
            return torch.nn.functional.scaled_dot_product_attention(*args, scale=1.0)

        found["with gradient" if wants_gradient else "without"] = {
            backend.name: backend_seconds(bench, backend, attended)
            for backend in (
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.MATH,
            )
        }
    return found


def backend_seconds(bench, backend, attended):
    try:
        with sdpa_kernel([backend]):
            return 1e3 * bench.median_seconds(attended)
    except RuntimeError as error:
        return str(error).splitlines()[0][:100]


def fastest(rows):
    """Return the fastest variant for each shape."""
    best = {}
    for row in rows:
        fastest_row = best.setdefault(row["shape"], row)
        best[row["shape"]] = min(fastest_row, row, key=forward_backward_ms)
    return {shape: row["way"] for shape, row in best.items()}


def forward_backward_ms(row):
    return row.get("forward and backward, ms", float("inf"))
