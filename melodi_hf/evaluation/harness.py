"""The model `melodi` for lm-evaluation-harness, which reads whole documents with memory.

The model `hf` of the harness splits texts longer than `max_length` into independent parts. `melodi`
reads the whole text segment by segment, with the logits of one segment in memory at a time.

    python -m melodi_hf.evaluation.harness run --model melodi --tasks wikitext \
        --model_args pretrained=runs/quickstart,segment_length=4096

All other arguments are those of `hf`. Benchmarks of long documents need their length as metadata.
BABILong is downloaded from the Hub. Of RULER, niah_single_1 is generated locally and needs
`pip install "lm_eval[ruler]"`; most others download essays or questions and need a large enough
vocabulary for their examples:

    ... --tasks babilong_qa1 --metadata '{"max_seq_lengths": "4k"}'
    ... --tasks niah_single_1 --metadata '{"max_seq_lengths": [4096, 8192]}'
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import melodi_hf  # noqa: F401  registers the models with the Auto classes
from melodi_hf.evaluation.command_line import require_packages

try:
    require_packages("harness", "lm_eval")
except ImportError as error:
    if __name__ == "__main__":
        sys.exit(f"harness: {error}")
    raise

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

NO_LIMIT = 10**12  # tokens


@register_model("melodi")
class MelodiLM(HFLM):
    """The model `melodi`.

    Args:
        segment_length: tokens per forward.
    """

    def __init__(self, pretrained, *args, segment_length=4096, **kwargs):
        super().__init__(pretrained, *args, **kwargs)
        self.segment_length = int(segment_length)
        check_settings(self.segment_length, self.batch_size, self._max_length)

    @property
    def max_length(self):
        """Return a length without limit, so that the harness does not truncate."""
        return NO_LIMIT

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        batch_size, found = override_bs or self.batch_size, {}
        for first in tqdm(range(0, len(order), batch_size), disable=disable_tqdm or self.rank != 0):
            batch = order[first : first + batch_size]
            answers = self.score([requests[i][1:] for i in batch])
            for i, answer in zip(batch, answers, strict=True):
                found[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [found[i] for i in range(len(requests))]

    @torch.inference_mode()
    def score(self, pairs):
        """Score pairs of (context, continuation) ids.

        Returns the log-probability of each continuation, and whether greedy search gives it.
        """
        rows = [torch.tensor([*context, *continuation]) for context, continuation in pairs]
        ids = pad_sequence(rows, batch_first=True)
        first = torch.tensor([len(context) - 1 for context, _ in pairs])[:, None]
        last = torch.tensor([len(row) - 1 for row in rows])[:, None]
        memory, total = None, torch.zeros(len(rows), dtype=torch.double, device=self.device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        for start in range(0, ids.shape[1] - 1, self.segment_length):
            columns = torch.arange(start, min(start + self.segment_length, ids.shape[1] - 1))
            scored = ((first <= columns) & (columns < last)).to(self.device)
            logits, memory = self.read(ids[:, columns].to(self.device), memory)
            targets = ids[:, columns + 1].to(self.device)
            chosen = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
            total += chosen.double().masked_fill(~scored, 0).sum(1)
            greedy &= ((logits.argmax(-1) == targets) | ~scored).all(1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def read(self, ids, memory):
        """Return logits in float32 and the new memory."""
        half = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            output = self.model(ids, memory=memory, return_memory=True, use_cache=False)
        return output.logits.float(), output.memory

    def _model_generate(self, context, max_length, stop, **kwargs):
        kwargs = {"prefill_chunk_size": self.segment_length, **kwargs}
        return super()._model_generate(context, max_length, stop, **kwargs)


def check_settings(segment_length, batch_size, max_length):
    if segment_length < 1:
        raise ValueError(f"segment_length={segment_length}: pass 1 or more")
    if not isinstance(batch_size, int):
        raise ValueError(f"batch_size={batch_size!r}: pass a number")
    if max_length is not None:
        raise ValueError(
            f"max_length={max_length} is not supported, melodi reads whole texts: leave it out, or "
            "use --model hf for truncation"
        )


if __name__ == "__main__":
    cli_evaluate()
