"""lm-evaluation-harness, with documents read through the memory to their end.

The harness's own `hf` cuts a text that is longer than its `max_length` and reads each part as if it
began there. `melodi` cuts nothing: a text goes through the model segment by segment, and only one
segment's logits are held at a time.

    python -m melodi_hf.evaluation.harness run --model melodi --tasks wikitext \
        --model_args pretrained=runs/quickstart,segment_length=4096

Everything else is as with `hf`, whose arguments it takes. Benchmarks of long documents want their
length as metadata. BABILong comes from the Hub. Of RULER, niah_single_1 is made on the spot, given
the packages of `pip install "lm_eval[ruler]"`; most of the others need essays or questions from the
web, and a vocabulary in which their examples fit:

    ... --tasks babilong_qa1 --metadata '{"max_seq_lengths": "4k"}'
    ... --tasks niah_single_1 --metadata '{"max_seq_lengths": [4096, 8192]}'
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import melodi_hf  # noqa: F401  the Auto classes know our models from now on
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
    """segment_length: tokens that are read at once."""

    def __init__(self, pretrained, *args, segment_length=4096, **kwargs):
        super().__init__(pretrained, *args, **kwargs)
        self.segment_length = int(segment_length)
        refuse_settings(self.segment_length, self.batch_size, self._max_length)

    @property
    def max_length(self):
        """There is no limit, so that the harness cuts nothing."""
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
        """Pairs of (context, continuation) ids -> the log-probability of each continuation, and
        whether each of its tokens was the most likely one."""
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
        """Logits in float32, and the memory afterwards."""
        half = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            output = self.model(ids, memory=memory, return_memory=True, use_cache=False)
        return output.logits.float(), output.memory

    def _model_generate(self, context, max_length, stop, **kwargs):
        kwargs = {"prefill_chunk_size": self.segment_length, **kwargs}
        return super()._model_generate(context, max_length, stop, **kwargs)


def refuse_settings(segment_length, batch_size, max_length):
    if segment_length < 1:
        raise ValueError(f"segment_length is {segment_length}: it must be 1 or more")
    if not isinstance(batch_size, int):
        raise ValueError(f"batch_size is {batch_size!r}: give a number")
    if max_length is not None:
        raise ValueError(
            f"max_length is {max_length}: melodi reads texts to their end; leave it out, or use "
            "--model hf to have them cut"
        )


if __name__ == "__main__":
    cli_evaluate()
