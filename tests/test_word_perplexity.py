"""The metric loads from a clone, without our package and without the network."""

import json
import math
import os
import subprocess
import sys

import pytest

from melodi_hf.evaluation import WORD_PERPLEXITY
from melodi_hf.evaluation.perplexity import setting_metrics

FOLDER = WORD_PERPLEXITY
NLL, WORDS = [5210.3, 8711.9, 100.5], [1012, 1705, 20]

# In a process of its own: here `evaluate` is training/evaluate.py.
USER = """
import json, sys

sys.modules["melodi_hf"] = None
import evaluate

nll, words = json.loads(sys.argv[2])
metric = evaluate.load(sys.argv[1])
metric.add_batch(nll=nll[:2], words=words[:2])
metric.add_batch(nll=nll[2:], words=words[2:])
found = [metric.compute(), metric.compute(nll=nll[:1], words=words[:1])]
try:
    metric.compute(nll=[1.0], words=[0])
except ValueError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_the_metric_loads_alone_and_sums_before_it_divides(tmp_path):
    script = tmp_path / "user.py"
    script.write_text(USER)
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, str(script), str(FOLDER), json.dumps([NLL, WORDS])],
        env=known | offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    batches, alone, refused = json.loads(done.stdout.splitlines()[-1])
    assert batches == {"word_perplexity": math.exp(math.fsum(NLL) / sum(WORDS))}
    ours = setting_metrics(
        "a", {"a": sum(NLL), "words": sum(WORDS)}, {"perplexity_per_word": "words"}
    )
    assert ours == {"perplexity_per_word": pytest.approx(batches["word_perplexity"])}
    assert alone == {"word_perplexity": math.exp(NLL[0] / WORDS[0])}
    assert "0 words in total: pass at least 1" in refused
