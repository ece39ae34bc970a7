"""Probes measure what is remembered: who knows is right at every distance, who does not is not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from learn_probe import draw_batch, parse, run
from probe import main
from torch import nn

from melodi_hf.data.segments import IGNORED
from melodi_hf.evaluation import probe_plots, probes
from melodi_hf.evaluation.probe_files import read_examples
from melodi_hf.evaluation.probes import (
    BLANK,
    CHOICES,
    CUE_TOKENS,
    MAKERS,
    MARK,
    Material,
    make_examples,
)
from melodi_hf.evaluation.probing import bootstrap_interval, evaluate_probe, wilson_interval
from melodi_hf.evaluation.queue_attention import queue_attention, ratios_by_age
from melodi_hf.evaluation.tables import queue_table
from melodi_hf.models.modules import Attention

from .cases import every_case
from .models import EACH, VOCABULARY, WINDOW, assert_near, build, draw
from .text import tiny_tokenizer

DISTANCES = (0, 5, 2 * WINDOW + 3, 6 * WINDOW)
DIGITS = {digit: 4 + i for i, digit in enumerate("0123456789")}
WORDS = 20  # the first id of a word


def encode(texts):
    """Digits one by one, as ids of their own; other letters fall into the ids above."""
    return [[DIGITS.get(c, WORDS + ord(c) % (VOCABULARY - WORDS)) for c in t] for t in texts]


def material():
    ids = np.random.default_rng(0).integers(WORDS, VOCABULARY, 2000)
    return Material(VOCABULARY, ids, start_id=1, encode=encode)


def examples_of(probe, distances=DISTANCES, count=3, size=None):
    made = [
        make_examples(probe, distance, count, material(), size=size, seed=7)
        for distance in distances
    ]
    return [example for group in made for example in group]


class Oracle(nn.Module):
    """Looks for the last tokens among all that it has read, and says what followed there: a memory
    that forgets nothing beyond `reach` tokens. Its memory is the ids that each row has read."""

    def __init__(self, reach=10**9, cue=1):
        super().__init__()
        self.config = SimpleNamespace(window_length=WINDOW, vocab_size=VOCABULARY)
        self.device = torch.device("cpu")
        self.reach, self.cue = reach, cue

    def forward(self, ids, attention_mask, memory, logits_to_keep, **_):
        rows = [[], *[[] for _ in ids[1:]]] if memory is None else memory[0].tolist()
        lengths = [0] * len(rows) if memory is None else memory[1].tolist()
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        logits = torch.zeros(*ids.shape, VOCABULARY)
        for i, row in enumerate(rows):
            for column, token in enumerate(ids[i][: int(attention_mask[i].sum())].tolist()):
                row.append(token)
                logits[i, column, self.says(row[-self.reach :])] = 9.0
        width = max(map(len, rows))
        held = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        memory = held, torch.tensor([len(row) for row in rows])
        return SimpleNamespace(logits=logits[:, logits_to_keep], memory=memory)

    def says(self, row):
        cue = row[-self.cue :]
        places = range(len(row) - self.cue - 1, -1, -1)
        found = [p for p in places if row[p : p + self.cue] == cue]
        return row[found[0] + self.cue] if found else BLANK


class Copier(Oracle):
    """Says what stands at the same place before the blanks as the answer does behind the mark."""

    def says(self, row):
        return row[len(row) - 1 - row.index(MARK)] if MARK in row else BLANK


ORACLES = {
    "passkey": Oracle(cue=4),  # "is " and the digits so far
    "repeat": Oracle(cue=CUE_TOKENS - 1),
    "recall": Oracle(),
    "copy": Copier(),
}


@every_case("probe", MAKERS)
def test_who_remembers_is_right_and_who_reads_the_control_is_not(probe):
    for num_rows, segment_windows in ((1, 1), (5, 3)):
        shape = {"num_rows": num_rows, "segment_windows": segment_windows}
        rows = evaluate_probe(ORACLES[probe], examples_of(probe), progress=False, **shape)
        assert [row["distance"] for row in rows] == list(DISTANCES)
        for row in rows:
            assert row["accuracy"] == 1
            assert row["gain"] > 1
            assert row["control_accuracy"] < 0.5


@pytest.mark.parametrize("probe", ["repeat", "recall"])
def test_who_forgets_is_right_up_to_there(probe):
    oracle = Oracle(reach=6 * WINDOW + 20, cue=ORACLES[probe].cue)
    size = {"repeat": CUE_TOKENS + 4, "recall": 3}[probe]
    examples = examples_of(probe, (0, 4 * WINDOW, 20 * WINDOW), size=size)
    near, middle, far = evaluate_probe(oracle, examples, progress=False)
    assert near["accuracy"] == middle["accuracy"] == 1
    assert far["accuracy"] == 0
    assert far["gain"] == 0


@pytest.mark.parametrize(
    ("name", "probe"), [(EACH[0], probe) for probe in MAKERS] + [(EACH[1], "passkey")]
)
def test_how_texts_are_grouped_changes_nothing(name, probe, monkeypatch):
    monkeypatch.setattr(probes, "LEAD_TOKENS", 2 * WINDOW + 1)
    model = build(name)
    examples = examples_of(
        probe, (3, 4 * WINDOW), count=2, size=CUE_TOKENS + 3 if probe == "repeat" else 4
    )
    alone, together = (
        evaluate_probe(model, examples, progress=False, num_rows=rows, segment_windows=windows)
        for rows, windows in ((1, 100), (3, 2))
    )
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("probe", MAKERS)
def test_the_score_is_that_of_the_whole_text(probe):
    model = build("melodi")
    (example,) = examples_of(probe, (2 * WINDOW + 1,), count=1)
    (row,) = evaluate_probe(model, [example], progress=False, segment_windows=2)
    ids, targets, _ = example.text
    if example.choices:
        right = example.choices[example.answer]
        ids, targets = np.append(ids, right.ids), np.append(targets, right.targets)
    with torch.no_grad():
        logits = model(torch.tensor(ids)[None]).logits[0]
    wanted = nn.functional.cross_entropy(logits, torch.tensor(targets))
    assert row["nll"] == pytest.approx(wanted.item(), abs=1e-5)


def test_the_fact_lies_where_it_is_said_to():
    distance = 37
    (passkey,) = examples_of("passkey", (distance,), count=1)
    question = len(" The number of the safe is")
    last_digit = np.flatnonzero(passkey.text.ids != passkey.control.ids)[-1]
    length = len(passkey.text.ids) + 1  # the last token of the question begins each choice
    assert last_digit + len(".") + distance + question == length - 1
    assert len({tuple(choice.targets) for choice in passkey.choices}) == CHOICES
    (repeat,) = examples_of("repeat", (distance,), count=1, size=CUE_TOKENS + 3)
    passage = [*repeat.text.ids[-(CUE_TOKENS + 2) :], repeat.text.targets[-1]]
    end_of_gap = len(repeat.text.ids) - (CUE_TOKENS + 2)
    first = repeat.text.ids[: end_of_gap - distance][-(CUE_TOKENS + 3) :]
    assert first.tolist() == passage
    (copy,) = examples_of("copy", (distance,), count=1)
    assert (copy.text.ids == BLANK).sum() == distance


def test_the_same_seed_gives_the_same_examples():
    for probe in MAKERS:
        first, second = (examples_of(probe, (5,)) for _ in range(2))
        assert all(map(np.array_equal, first[0].text, second[0].text))
        assert not np.array_equal(first[0].text.ids, first[1].text.ids)


# Files


BOOK = "It was the best of times. It was the worst of times. " * 40
RECORD = {
    "book": "one",
    "start": 10,
    "insert_at": 200,
    "end": 700,
    "inserted": "The answer is 42.",
    "control": "There is none.",
    "question": "What is",
    "answer": " 42",
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [path]


def read(path, *records, **how):
    return read_examples(write(path, *records), material(), {"one": BOOK}, **how)


def test_probes_of_books_are_read(tmp_path):
    choices = [" 17", " 42", " 99"]
    records = [
        RECORD | {"task": task, "distance": 512, "choices": given}
        for task, given in (("needle", choices), ("repeat", None))
    ]
    found = read(tmp_path / "probes.jsonl", *records)
    text = f"{BOOK[10:200]} The answer is 42. {BOOK[200:700].strip()} What is"
    control = text.replace("The answer is 42.", "There is none.")
    surplus = len(text) - len(control)
    prompt = [1, *encode([text])[0][surplus:]]
    (needle,), (repeat,) = found["needle"], found["repeat"]
    assert needle.text.ids.tolist() == prompt[:-1]
    right = needle.choices[needle.answer]
    assert right.ids.tolist() == [prompt[-1], *encode([" 4"])[0]]
    assert right.targets.tolist() == encode([" 42"])[0]
    assert repeat.text.ids.tolist() == prompt + encode([" 4"])[0]
    assert repeat.text.targets[-3:].tolist() == encode([" 42"])[0]
    assert needle.control.ids.tolist() == [1, *encode([control])[0]][:-1]
    (row,) = evaluate_probe(Oracle(cue=3), [needle], progress=False)
    assert row["accuracy"] == 1
    assert row["distance"] == len(BOOK[200:700].strip())


def test_probes_of_symbols_are_read(tmp_path):
    ids = [4, 34, 5, 35, 6, 36, 0, 6, 4, 0, 0, 0, 0, 5]
    recall = {"task": "mqar", "length": 14, "pairs": 3, "ids": ids}
    recall |= {"query_positions": [7, 8, 13], "targets": [36, 34, 35]}
    copy = {"task": "copy", "symbols": [4, 9, 7], "gap": 30}
    found = read(tmp_path / "probes.jsonl", recall, copy)
    (example,) = found["mqar"]
    asked = example.text.targets != IGNORED
    assert asked.nonzero()[0].tolist() == [7, 8, 13]
    assert example.text.distances[asked].tolist() == [2, 4, 8]  # of 2, 7 and 10
    rows = evaluate_probe(Oracle(), found["mqar"], progress=False)
    assert [(row["distance"], row["accuracy"], row["control_accuracy"]) for row in rows] == [
        (2, 1, 0),
        (4, 1, 0),
        (8, 1, 0),
    ]
    (row,) = evaluate_probe(Copier(), found["copy"], progress=False)
    assert (row["distance"], row["accuracy"]) == (30, 1)
    assert found["copy"][0].text.ids.tolist() == [4, 9, 7, *[0] * 30, MARK, 4, 9]


def test_records_are_chosen_by_distance(tmp_path):
    copies = [{"task": "copy", "symbols": [s], "gap": gap} for gap in (3, 9) for s in (4, 5, 6)]
    path = tmp_path / "probes.jsonl"
    assert len(read(path, *copies)["copy"]) == 6
    found = read(path, *copies, distances=[9], limit=2)["copy"]
    assert [example.text.ids[0] for example in found] == [4, 5]
    assert all(len(example.text.ids) == 11 for example in found)


@pytest.mark.parametrize(
    ("record", "how", "words"),
    [
        (RECORD | {"task": "needle", "distance": 5, "book": "two"}, {}, "--books"),
        ({"task": "poem", "distance": 3}, {}, "'poem', allowed are"),
        ({"task": "copy", "symbols": [3]}, {}, "of which one must be"),
        ({"task": "copy", "symbols": [3], "gap": 3}, {"distances": [7]}, r"the files have \[3\]"),
    ],
)
def test_bad_records_are_refused(tmp_path, record, how, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "probes.jsonl", record, **how)


@pytest.mark.parametrize("task", ["needle", "repeat"])
def test_without_a_memory_there_is_nothing_to_gain(tmp_path, task):
    """Whatever the length of the control: windows fall alike behind the fact."""
    choices = {"choices": [" 17", " 42"] if task == "needle" else None}
    record = RECORD | choices | {"task": task, "distance": 16, "end": 216}
    (examples,) = read(tmp_path / "probes.jsonl", record).values()
    gains = [
        evaluate_probe(build("melodi", **changes), examples, progress=False)[0]["gain"]
        for changes in ({"num_short_memory_tokens": 0, "long_memory_layers": ()}, {})
    ]
    assert gains[0] == pytest.approx(0, abs=1e-6)
    assert abs(gains[1]) > 1e-5


# Intervals


def test_intervals_are_those_of_the_textbook():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 29 of 29
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (29, 29, 0.8830, 1.0000),
    ):
        assert wilson_interval(hits / count, count) == pytest.approx((low, high), abs=1e-4)
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.03)


# Attention to the queue


ATTEND_SLOTS = Attention.attend_slots


def keep_call(seen, attention, *given):
    result = ATTEND_SLOTS(attention, *given)
    seen.append((given, result))
    return result


def test_queue_attention_is_what_the_layer_computes(monkeypatch):
    for masked in (False, True):
        model = build("melodi", mask_empty_memory=masked)
        seen = []
        monkeypatch.setattr(
            Attention, "attend_slots", lambda *given, seen=seen: keep_call(seen, *given)
        )
        ids = draw(6 * WINDOW + 3)
        measured = queue_attention(model, ids, segment_windows=2, progress=False)
        (layer,) = measured["layers"]
        assert measured["windows_read"] == 6
        assert layer["ages"] == [[1, 1], [2, 3]]
        assert len(seen) == 6
        weights, breadths = [], []
        for window, ((q, k, v, _), out) in enumerate(seen):
            scores, slots = q @ k.transpose(-1, -2), k.shape[2]
            if masked:
                scores[..., : max(slots - 2 * window, 0)] = -torch.inf
            weight = scores.softmax(-1).nan_to_num()
            assert_near(weight @ v, out)
            weights.append(weight.mean((0, 2)))
            slots = min(2 * window, slots) if masked else slots
            logs = (weight * weight.clamp(min=1e-30).log()).sum(-1)
            breadths.append(((-logs).exp() / max(slots, 1)).mean((0, 2)))
        wanted = ratios_by_age(torch.stack(weights), 2)
        assert layer["ratio"] == [
            pytest.approx([head[0].item(), head[1:].mean().item()], abs=1e-5) for head in wanted
        ]
        mean = torch.stack(breadths[1:]).mean(0)
        assert layer["breadth"] == pytest.approx(mean.tolist(), abs=1e-5)
        share = 1 - model.model.layers[1].gate.detach().sigmoid()
        assert [sum(head) / len(head) for head in layer["share"]] == pytest.approx(
            share.mean(1).tolist()
        )


def test_an_even_spread_has_a_ratio_of_one_and_a_glance_shows_its_age():
    even = torch.zeros(5, 1, 6)  # a queue of 3 windows with 2 slots each, the oldest first
    for window, held in enumerate((0, 1, 2, 3, 3)):
        even[window, 0, 6 - 2 * held :] = 1 / max(2 * held, 1)
    assert ratios_by_age(even, 2).tolist() == [[1, 1, 1]]
    glance = torch.zeros(5, 1, 6)
    glance[3:, 0, 0] = 1  # the oldest there is
    assert ratios_by_age(glance, 2).tolist() == [pytest.approx([0, 0, 3])]


@every_case(
    ("name", "changes", "tokens", "words"),
    [
        ("melodi", {"long_memory_layers": ()}, 99, "has no queue"),
        ("transformer_xl", {}, 99, "has no queue"),
        ("melodi", {"long_memory_capacity": 5}, 99, "a multiple of the entries"),
        ("melodi", {}, 2 * WINDOW - 1, "pass at least 16"),
    ],
)
def test_a_queue_that_cannot_be_looked_at_is_refused(name, changes, tokens, words):
    with pytest.raises(ValueError, match=words):
        queue_attention(build(name, **changes), draw(tokens), progress=False)


# Commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("melodi", eos_token_id=2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def drawn(path):
    return all(path.with_suffix(suffix).stat().st_size > 1000 for suffix in (".png", ".svg"))


def test_a_model_is_probed_by_a_command(folder, tmp_path, capsys):
    output = tmp_path / "probes.json"
    how = ["--distances", "8", "40", "--examples", "2", "--size", "20", "--output", str(output)]
    main([str(folder), "--probe", "repeat", "recall", *how])
    results = json.loads(output.read_text())
    for name in ("repeat", "recall"):
        assert [row["distance"] for row in results["probes"][name]] == [8, 40]
    assert results["window_length"] == WINDOW
    assert results["versions"].keys() >= {"torch", "transformers"}
    assert drawn(tmp_path / "probes_accuracy.png")
    assert drawn(tmp_path / "probes_gain.png")
    assert "control_accuracy" in capsys.readouterr().out


def test_the_queue_is_shown_by_a_command(folder, tmp_path, capsys):
    (tmp_path / "book.txt").write_text(BOOK)
    output = tmp_path / "queue.json"
    how = ["--books", str(tmp_path / "book.txt"), "--read-tokens", "100", "--output", str(output)]
    main([str(folder), "--queue", *how])
    measured = json.loads(output.read_text())["queue"]
    assert measured["windows_read"] == 100 // WINDOW
    assert drawn(output)
    assert queue_table(measured) in capsys.readouterr().out
    main([str(folder), "--queue", *how[:-2]])  # without a file to write to
    assert queue_table(measured) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--probe", "passkey", "--distances", "5"], "different numbers by the same ids"),
        (["--probe", "recall", "--size", "99"], "use a smaller size"),
        (["--probe", "passkey", "--size", "1"], "2 to 18 digits"),
        (["--probe", "repeat", "--size", "9"], "the cue"),
        (["--probe", "repeat", "--distances", "99999999"], "a shorter distance"),
    ],
)
def test_what_cannot_be_probed_is_told(folder, tmp_path, given, words):
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    with pytest.raises(SystemExit, match=words):
        main([str(folder), "--books", str(book), *given])


def test_training_never_sees_an_example_of_the_evaluation():
    options = parse(["--num-rows", "200", "--train-distances", "4"])
    ids, targets = draw_batch(np.random.default_rng(0), options)
    asked = {tuple(e.text.ids) for e in make_examples(
        "copy", 4, 100, Material(options.vocab_size), size=options.size, seed=0)}  # fmt: skip
    assert ids.shape == targets.shape == (200, 8 + 4 + 1 + 7)
    assert not asked & set(map(tuple, ids.tolist()))


@pytest.mark.parametrize("value", probe_plots.PLOTTED_VALUES)
def test_lines_are_drawn_where_the_numbers_are(tmp_path, value):
    rows = evaluate_probe(Oracle(), examples_of("recall"), progress=False)
    files = probe_plots.plot_by_distance({"oracle": rows}, tmp_path / "plot", value=value)
    assert [file.suffix for file in files] == [".png", ".svg"]
    svg = files[1].read_text()
    for words in (probe_plots.PLOTTED_VALUES[value][0], "oracle", "0", "4", "64"):
        assert f">{words}<" in svg


@pytest.mark.slow
def test_a_memory_learns_what_a_window_cannot():
    options = parse(["--distances", "0", "16", "--examples", "32"])
    chance = 1 / (options.vocab_size - 2)
    for name, remembers in (("short and long", True), ("no memory", False)):
        near, far = run(name, options, seed=0)["rows"]
        assert near["distance"] == 0
        assert far["accuracy"] > 0.5 if remembers else far["accuracy"] < 3 * chance
        assert far["control_accuracy"] < 3 * chance
