"""lm-evaluation-harness: `hf` runs on our models; `melodi` reads documents to their end."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from melodi_hf.evaluation.harness import MelodiLM

from .cases import every_case
from .models import FEW, WINDOW, build
from .text import tiny_tokenizer

PAIRS = [("The sky is", " blue"), ("", "Nothing before it"), ("To be or not", " to be, that is it")]
LONG = "A long document goes on and on, over many windows, until it is read to the end. " * 3
DOCUMENTS = [LONG, "A short one.", LONG[7:60]]


pytestmark = pytest.mark.xdist_group("harness")


@pytest.fixture(params=FEW[:2], scope="module")
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    build(request.param, eos_token_id=2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def load(kind, folder, **given):
    return kind(pretrained=folder, device="cpu", **{"batch_size": 2, **given})


def ask(lm, kind, arguments):
    requests = [Instance(kind, doc={}, arguments=given, idx=0) for given in arguments]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def rolling(lm):
    return ask(lm, "loglikelihood_rolling", [(text,) for text in DOCUMENTS])


def by_hand(lm, ids, num_scored):
    """Sum of the log-probabilities of the last tokens, from one forward."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        log_probabilities = lm.model(ids).logits[:, :-1].log_softmax(-1)
    chosen = log_probabilities.gather(-1, ids[:, 1:, None])[0, -num_scored:, 0]
    greedy = log_probabilities.argmax(-1)[0, -num_scored:] == ids[0, -num_scored:]
    return chosen.sum().item(), greedy.all().item()


def document_by_hand(lm, text):
    ids = lm.tok_encode(text)
    return by_hand(lm, [lm.prefix_token_id, *ids], len(ids))[0]


def greedy_pair(lm):
    """A text and the token that the model finds most likely after it, one that is text again."""
    for context in ("Go on", "It was", "One day", "the age", "of times", "wisdom"):
        ids = torch.tensor([lm.tok_encode(context)])
        token = lm.model(ids).logits[0, -1:].argmax(-1).tolist()
        if lm.tok_encode(lm.tok_decode(token)) == token:
            return context, lm.tok_decode(token)
    raise AssertionError("no text is followed by a token that is text again")


@pytest.mark.parametrize("kind", [HFLM, MelodiLM])
def test_continuations(folder, kind):
    lm = load(kind, folder)
    pairs = [*PAIRS, greedy_pair(lm)]
    found = ask(lm, "loglikelihood", pairs)
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        before = lm.tok_encode(context) or [lm.prefix_token_id]
        ids = lm.tok_encode(continuation)
        wanted = by_hand(lm, before + ids, len(ids))
        assert (total, is_greedy) == (pytest.approx(wanted[0], abs=1e-4), wanted[1])
    assert found[-1][1]
    assert not found[0][1]


def test_hf_begins_anew_after_max_length(folder):
    # Not a multiple of what the plain Transformer forgets after.
    whole, cut = load(HFLM, folder, max_length=1000), load(HFLM, folder, max_length=30)
    wanted = [document_by_hand(whole, text) for text in DOCUMENTS]
    assert rolling(whole) == pytest.approx(wanted, abs=1e-3)
    found = rolling(cut)
    assert found[1] == pytest.approx(wanted[1], abs=1e-3), "it fits"
    assert abs(found[0] - wanted[0]) > 0.1


@pytest.mark.parametrize("segment_length", [WINDOW, 3 * WINDOW - 5])
def test_melodi_reads_documents_to_their_end(folder, segment_length):
    lm = load(MelodiLM, folder, segment_length=segment_length)
    wanted = [document_by_hand(lm, text) for text in DOCUMENTS]
    assert rolling(lm) == pytest.approx(wanted, abs=1e-3)
    assert rolling(load(MelodiLM, folder, batch_size=1)) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("kind", [HFLM, MelodiLM])
def test_generation(folder, kind):
    lm, how = load(kind, folder), {"max_gen_toks": 12, "do_sample": False}
    if kind is MelodiLM:
        lm.segment_length = WINDOW - 1
    texts = [LONG[:50], "Once", LONG[:90]]
    for until in ([], ["e"]):
        found = ask(lm, "generate_until", [(text, {"until": until, **how}) for text in texts])
        for text, new in zip(texts, found, strict=True):
            ids = torch.tensor([lm.tok_encode(text)])
            wanted = lm.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2)
            wanted = lm.tok_decode(wanted[0, ids.shape[1] :])
            assert new == (wanted.split("e")[0] if until else wanted)


def test_a_task_is_evaluated(folder, tmp_path):
    """As the command line does it: by name, on a task from a file."""
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    given = {"pretrained": folder, "device": "cpu", "segment_length": 16}
    known = TaskManager(include_defaults=False)
    results = simple_evaluate(
        "melodi", model_args=given, tasks=[task], bootstrap_iters=0, task_manager=known
    )
    lm = load(MelodiLM, folder)
    nll = -sum(document_by_hand(lm, text) for text in DOCUMENTS)
    wanted = torch.tensor(nll / sum(len(text) for text in DOCUMENTS)).exp().item()
    assert results["results"]["ours"]["byte_perplexity,none"] == pytest.approx(wanted, rel=1e-4)


def test_babilong_is_evaluated_where_its_data_is(folder):
    """Its own prompt, examples and score; the documents are here instead of on the Hub."""
    tasks = Path(lm_eval.tasks.__file__).parent / "babilong"
    known = TaskManager(include_path=str(tasks), include_defaults=False)
    given = {"pretrained": folder, "device": "cpu", "segment_length": 50, "batch_size": 2}

    def ask_for(target):
        fields = {"input": LONG, "question": "Where is Mary?", "target": target}
        here = {"custom_dataset": lambda **_: {"qa1": Dataset.from_list([fields])}}
        group = {"group": "ours", "task": [{"task": "babilong_qa1", **here}]}
        options = {"task_manager": known, "bootstrap_iters": 0}
        found = simple_evaluate("melodi", model_args=given, tasks=[group], **options)
        (sample,) = found["samples"]["babilong_qa1"]
        assert f"{LONG.strip()}\nWhere is Mary?" in sample["arguments"][0][0]
        return found["results"]["babilong_qa1"]["acc,none"], sample["resps"][0][0].strip()

    accuracy, answer = ask_for("in no model's vocabulary: 0")
    assert answer
    assert accuracy == 0
    assert ask_for(answer) == (1, answer)


def test_it_is_known_by_its_name():
    assert get_model("melodi") is MelodiLM


@every_case(
    ("given", "words"),
    [
        ({"segment_length": 0}, "segment_length=0"),
        ({"batch_size": "auto"}, "pass a number"),
        ({"max_length": 64}, "leave it out"),
    ],
)
def test_bad_settings_are_refused(folder, given, words):
    with pytest.raises(ValueError, match=words):
        load(MelodiLM, folder, **given)
