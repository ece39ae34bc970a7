"""The benchmarks of speed and of peers run, and tell what they could not measure."""

import json
import sys

import pytest
import torch

from benchmarks import peers, plots, speed
from benchmarks.parts import peer_models
from benchmarks.parts.floor import Machine, run_in_subprocess
from melodi_hf import MelodiCache
from melodi_hf.evaluation.tables import all_tables


def run(script, monkeypatch, output, *arguments):
    """A script's `main` with what it gives to other processes done in this one."""

    def here(_, request, trim_heap=False):
        if script is speed:
            return speed.peak_of_training(request)
        kind, device, threads, tiny, request = request
        return peers.CHILDREN[kind](request, Machine(device, threads, tiny))

    monkeypatch.setattr(script, "run_in_subprocess", here)
    argv = [script.__name__, "--tiny", "--output", str(output), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    return json.loads(output.read_text())


def test_every_phase_has_its_share_of_the_floor(tmp_path, monkeypatch):
    output = tmp_path / "benchmarks" / "results" / "speed.json"
    result = run(speed, monkeypatch, output)
    assert [row["phase"] for row in result["rows"]] == [
        "training step",
        "forward",
        "prefill",
        "decoding step",
        "closing a window",
        "decoding step, compiled",
    ]
    assert all(
        0 < row["share of the floor"] < 1 for row in result["rows"] if "closing" not in row["phase"]
    )
    assert [row["its state"] for row in result["tables"]["latency"]] == ["read", "set"]
    known = all_tables(tmp_path)
    assert {"benchmarks/speed", "benchmarks/speed/peak", "benchmarks/speed/latency"} <= set(known)
    assert "training step" in known["benchmarks/speed"]


def test_a_state_that_was_set_differs_from_one_that_read_in_its_content_alone():
    machine = Machine(quick=True)
    model = speed.build(speed.sizes(True, False)["tiny"].config, machine)
    short, long = speed.set_caches(model, (40, 100_006), machine)
    really = MelodiCache(model.config)
    speed.read(model, speed.draw(model.config, 6 + 32, machine), really)
    for layer, other in zip(long.layers, really.layers, strict=True):
        assert layer.progress.tokens_read.item() == 100_006
        assert layer.progress.offset == other.progress.offset == 100_006 % 32
        shapes = [tensor.shape for tensor in layer.memory]
        assert shapes == [tensor.shape for tensor in other.memory]
        assert layer.memory.long_keys.ne(0).all()
    assert short.get_seq_length() == 40
    assert speed.read(model, torch.tensor([[3]]), long).isfinite().all()


def test_every_peer_is_measured_or_said_to_take_too_long(tmp_path, monkeypatch):
    output = tmp_path / "peers.json"
    expected = peers.Run.expected
    monkeypatch.setattr(
        peers.Run,
        "expected",
        lambda run, name, n: 1e9 if (name, n) == ("Mamba2", 64) else expected(run, name, n),
    )
    result = run(peers, monkeypatch, output, "--rounds", "1")
    rows = {(row["model"], row["tokens"]): row for row in result["rows"]}
    assert set(rows) == {(name, n) for name in peer_models.PEERS for n in (32, 64)}
    left_out = rows.pop(("Mamba2", 64))
    assert left_out["not measured"].startswith("too long")
    assert all(row["prefill, s"] > 0 and "not measured" not in row for row in rows.values())
    states = {name: rows[name, 32]["state, bytes"] for name in peer_models.PEERS}
    assert states["Llama"] == 3 * 2 * 32 * 32 * 4  # layers, keys and values, tokens, channels
    assert rows["Llama", 64]["state, bytes"] == 2 * states["Llama"]
    for name in ("MELODI", "sliding window", "RecurrentGemma"):
        assert rows[name, 64]["state, bytes"] == states[name]
    figures = plots.plot_peers(result, tmp_path / "figures")
    assert sorted(each.name for each in figures) == [
        "peers_decoding.svg",
        "peers_prefill.svg",
        "peers_state.svg",
    ]
    assert "RecurrentGemma" in (tmp_path / "figures" / "peers_state.svg").read_text()


@pytest.mark.parametrize("name", peer_models.PEERS)
def test_peer_has_as_many_parameters(name):
    number = peer_models.parameters(peer_models.matched_config(name, "paper"))
    assert number == pytest.approx(
        peer_models.parameters(peer_models.melodi_config("paper")), rel=0.03
    )


@pytest.mark.parametrize("name", ["MELODI", "Llama", "sliding window", "Mamba2"])
def test_peer_reads_in_pieces_what_it_reads_at_once(name):
    """RecurrentGemma does not: its convolution begins again with each piece."""
    reader = peer_models.Reader(name, "tiny", Machine(quick=True))
    ids = reader.draw(40)
    reader.prefill(ids[:, :-1], None)
    at_once = reader.call(ids[:, -1:])
    reader.prefill(ids[:, :-1], 16)
    reader.prepare_decoding(1)
    torch.testing.assert_close(reader.call(ids[:, -1:]), at_once, rtol=0, atol=1e-5)


def test_state_is_every_tensor_that_the_next_token_needs():
    """RecurrentGemma holds a part in its modules."""
    reader = peer_models.Reader("RecurrentGemma", "tiny", Machine(quick=True))
    reader.prefill(reader.draw(40), None)
    recurrent = 2 * (32 * 4 + 3 * 32 * 4)  # the state, and three tokens of the convolution
    window = 2 * 32 * 4 * 15  # keys and values of one layer
    counts = {8, 24}  # one count of tokens, or three, by the version of transformers
    assert reader.state_bytes() - recurrent - window in counts


def test_a_process_that_dies_is_told(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import sys; sys.exit(3)")
    assert run_in_subprocess(script, []) == {"failed": "the process ended with status 3"}
