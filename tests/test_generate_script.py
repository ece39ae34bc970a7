"""A document is continued from its memory as if it had been read whole; the scripts do as said."""

import json
import re
from pathlib import Path

import evaluate as evaluate_script
import generate as generate_script
import pytest
import torch

from melodi_hf import (
    MelodiConfig,
    MelodiForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.data.text import Document
from melodi_hf.data.tokens import encode_documents, train_tokenizer
from melodi_hf.evaluation.continuation import continue_text, read_and_continue
from melodi_hf.evaluation.perplexity import evaluate_perplexity, list_settings

from .cases import every_case

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "window_length": 8,
    "pad_token_id": 1,
}
MEMORY = {
    "num_summary_tokens": 2,
    "num_short_memory_tokens": 2,
    "long_memory_layers": (1,),
    "num_long_memory_tokens": 1,
    "long_memory_windows": 3,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("a", TEXT)], 300, progress=False)


@pytest.fixture(params=["melodi", "transformer_xl"])
def model(request, tokenizer):
    torch.manual_seed(0)
    if request.param == "melodi":
        model = MelodiForCausalLM(MelodiConfig(vocab_size=len(tokenizer), **SIZES, **MEMORY))
    else:
        model = TransformerXLForCausalLM(TransformerXLConfig(vocab_size=len(tokenizer), **SIZES))
    return model.eval()


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@every_case("length", [1, 2, 8, 9, 40, 41])
def test_reading_in_pieces_continues_as_reading_whole(model, length):
    ids = torch.randint(0, model.config.vocab_size, (length,))
    everything = {"attention_mask": torch.ones(1, length, dtype=torch.long)}  # id 0, too
    whole = model.generate(ids[None], max_new_tokens=12, do_sample=False, **everything)[0, length:]
    for piece_windows in (1, 2, 100):
        new_ids, info = read_and_continue(
            model, ids, 12, piece_windows=piece_windows, progress=False, do_sample=False
        )
        assert new_ids.tolist() == whole.tolist()
        assert info["tokens_read"] == length
        assert info["tokens_generated"] == 12


def test_what_is_held_does_not_grow(model):
    ids = torch.randint(0, model.config.vocab_size, (400,))
    sizes = {
        read_and_continue(model, ids[:length], 1, progress=False)[1]["memory_bytes"]
        for length in (40, 41, 400)
    }
    assert len(sizes) == 1
    assert min(sizes) > 0


def test_text_is_read_as_a_document(model, tokenizer):
    (document,) = encode_documents([Document("a", TEXT)], tokenizer)
    ids = [tokenizer.eos_token_id, *document.ids.tolist()]
    new_ids, _ = read_and_continue(model, ids, 6, progress=False)
    text, info = continue_text(model, tokenizer, TEXT, 6, progress=False)
    assert text == tokenizer.decode(new_ids)
    assert info["tokens_read"] == len(ids)


def test_ids_of_another_vocabulary_are_refused(model):
    vocabulary = model.config.vocab_size
    with pytest.raises(ValueError, match=f"from 1 to {vocabulary}, .* 0 to {vocabulary - 1}"):
        read_and_continue(model, [1, vocabulary], 1)
    with pytest.raises(ValueError, match="at least one token"):
        read_and_continue(model, [], 1)


def test_generate_writes_the_continuation_and_what_it_took(folder, model, tokenizer, capsys):
    expected, info = continue_text(model, tokenizer, TEXT, 8, progress=False)
    capsys.readouterr()
    generate_script.main([folder, "--prompt", TEXT, "--max-new-tokens", "8"])
    written = capsys.readouterr()
    assert written.out.rstrip("\n") == expected.rstrip("\n")
    assert f"read {info['tokens_read']:,} tokens" in written.err
    assert f"memory of {info['memory_bytes']:,} bytes" in written.err
    assert "tok/s" in written.err


def test_generate_reads_a_file_and_repeats_what_a_seed_draws(folder, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT)
    drawn = []
    for seed in ("1", "1", "2"):
        generate_script.main([folder, "--prompt-file", str(prompt), "--sample", "--seed", seed])
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER/none", "--prompt", "a"], "/none; pass an output folder of training/train.py"),
        (["no_folder", "--prompt", "a"], "there is no folder no_folder"),
        (["EMPTY", "--prompt", "a"], "/empty (Unrecognized model"),
        (["FOLDER", "--prompt", " \n"], "the prompt is empty"),
        (["FOLDER", "--prompt-file", "no_such_file"], "no_such_file"),
    ],
)
def test_generate_says_what_is_wrong(folder, arguments, message):
    empty = Path(folder).with_name("empty")
    empty.mkdir()
    arguments = [word.replace("FOLDER", folder).replace("EMPTY", str(empty)) for word in arguments]
    with pytest.raises(SystemExit, match=re.escape(message)):
        generate_script.main(arguments)


def test_generate_refuses_what_it_would_ignore(capsys):
    with pytest.raises(SystemExit):
        generate_script.main(["folder", "--prompt", "a", "--temperature", "0.5"])
    assert "add --sample" in capsys.readouterr().err


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(folder, tmp_path):
    larger = train_tokenizer([Document("a", TEXT + "other words " * 9)], 400, progress=False)
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(SystemExit, match=f"has {len(larger)} tokens, but the model's vocabulary"):
        evaluate_script.main([folder, "--tokenizer", str(tmp_path / "larger")])


def test_evaluate_prints_and_writes_what_is_measured(folder, model, tokenizer, tmp_path, capsys):
    texts = [Document(f"{n}.txt", TEXT[:n]) for n in (50, 150, 200)]
    for name, text in texts:
        (tmp_path / name).write_text(text)
    output = tmp_path / "results.json"
    files = [str(tmp_path / name) for name, _ in texts]
    evaluate_script.main(
        [folder, "--data", *files, "--limit-documents", "2", "--output", str(output)]
    )
    documents = encode_documents(texts[:2], tokenizer)
    expected = evaluate_perplexity(
        model, documents, start_id=tokenizer.eos_token_id, progress=False
    )
    results, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert results["data"]["files"] == ["50.txt", "150.txt", "200.txt"]
    assert results["data"]["documents"] == 2
    assert results["parameters"] == model.num_parameters()
    assert {"commit", "versions", "hardware"} <= results.keys()
    written = results["evaluation"]
    for name, setting in written["settings"].items():
        nll = expected["settings"][name]["nll"]
        assert setting["nll"] == pytest.approx(nll, rel=1e-5)
        assert f"| {name} | {setting['tokens']:,} |" in shown
    assert [row["id"] for row in written["settings"]["carried"]["by_document"]] == [
        "50.txt",
        "150.txt",
    ]


def test_evaluate_takes_out_what_it_is_told_to(folder, model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    options = ["--data", str(tmp_path / "a.txt"), "--settings"]
    evaluate_script.main([folder, *options, "all"])
    rows = capsys.readouterr().out
    for name in list_settings(model):
        assert f"| {name} | " in rows
    evaluate_script.main([folder, *options, "emptied", "short_off"])
    rows = capsys.readouterr().out
    assert "| short_off | " in rows
    assert "| carried | " not in rows


def test_evaluate_says_what_is_wrong(folder):
    with pytest.raises(SystemExit, match="no_such_file"):
        evaluate_script.main([folder, "--data", "no_such_file.txt"])
    with pytest.raises(SystemExit, match=r"unknown setting 'queue': choose from .* and queue_N"):
        evaluate_script.main([folder, "--settings", "queue"])
