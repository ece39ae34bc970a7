"""The same behaviour with all supported versions of transformers, and errors with others."""

import json
import os
import subprocess
import sys
import warnings
from functools import wraps
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.utils.generic import TransformersKwargs

from melodi_hf import MelodiCache
from melodi_hf.models.validation import (
    CACHE_NAME,
    HARMLESS_KEYWORDS,
    NEWEST_TESTED,
    give_both_cache_names,
    rename_cache,
    warn_if_untested,
)

from .cases import every_case
from .models import DOCUMENT, EACH, WINDOW, assert_equal, build, draw
from .text import tiny_tokenizer

NAMES = ("cache", "past_key_values")
OLDEST, BEFORE, NEWEST = "5.17.0", "5.23.0", "5.24.0"


@pytest.fixture
def system():
    """One for all: the arguments are read in code that no system overrides."""
    return build("melodi")


# The cache has two names


@pytest.mark.old_names
@pytest.mark.parametrize("name", NAMES)
def test_forward_accepts_and_returns_the_cache_under_both_names(system, name):
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        wanted = system(ids).logits
        for part in (system, system.model):
            cache = MelodiCache(system.config)
            outputs = part(ids[:, :-3], **{name: cache})
            assert outputs.cache is outputs.past_key_values is cache
            assert outputs["cache"] is outputs["past_key_values"] is cache
        rest = system(ids[:, -3:], **{name: outputs[name]})
    assert_equal(rest.logits.argmax(-1), wanted[:, -3:].argmax(-1))
    assert cache.get_seq_length() == DOCUMENT


@pytest.mark.old_names
@pytest.mark.parametrize("name", NAMES)
def test_generate_and_read_document_accept_the_cache_under_both_names(system, name):
    ids = draw(1, DOCUMENT)
    how = {"max_new_tokens": WINDOW, "do_sample": False}
    wanted = system.generate(ids, **how)
    cache = system.read_document(ids[:, :WINDOW], **{name: MelodiCache(system.config)})
    system.read_document(ids[:, WINDOW:-1], **{name: cache})
    assert cache.get_seq_length() == DOCUMENT - 1
    found = system.generate(ids, return_dict_in_generate=True, **{name: cache}, **how)
    assert_equal(found.sequences, wanted)
    assert found.cache is found.past_key_values is cache


def test_both_names_at_once_are_refused(system):
    ids, caches = draw(1, 3), [MelodiCache(system.config) for _ in range(2)]
    given = dict(zip(NAMES, caches, strict=True))
    for call in (system, system.model, system.read_document, system.generate):
        with pytest.raises(ValueError, match="two names of the same argument; pass one"):
            call(ids, **given)
    system(ids, cache=caches[0], past_key_values=caches[0])
    assert caches[0].get_seq_length() == 3


def test_the_cache_is_renamed_only_where_it_is_given():
    assert rename_cache({"a": 1}) == {"a": 1}
    for name in NAMES:
        assert rename_cache({"a": 1, name: 2}) == {"a": 1, CACHE_NAME: 2}
        assert rename_cache({name: None}) == {CACHE_NAME: None}


def test_outputs_have_the_fields_of_the_installed_version(system):
    outputs = system(draw(1, 3))
    assert list(outputs.keys()) == ["logits", CACHE_NAME]
    assert len(outputs.to_tuple()) == 2
    assert give_both_cache_names(type(outputs)) is type(outputs)


# Unknown keywords are refused


@every_case("name", ["kv_cache", "attention_masks", "labelz"])
def test_unknown_keywords_are_refused(system, name):
    for part in (system, system.model):
        with pytest.raises(TypeError, match=rf"unknown keyword: {name}\. Pass .*install a version"):
            part(draw(1, 3), **{name: None})


def test_harmless_keywords_change_nothing(system):
    ids = draw(2, DOCUMENT)
    columns = torch.arange(DOCUMENT).expand(2, -1)
    given = {
        "position_ids": columns,
        "logits_to_keep": 1,
        "tokenizer": object(),
        "token_type_ids": torch.zeros_like(ids),
        "output_attentions": False,
        "output_hidden_states": False,
        "output_router_logits": False,
        "num_items_in_batch": None,
        "ignore_index": -100,
        "return_dict": True,
        "is_causal": True,
        "cu_seq_lens_q": None,
        "cu_seq_lens_k": None,
        "max_length_q": None,
        "max_length_k": None,
        "seq_idx": torch.zeros_like(ids),
    }
    assert given.keys() == HARMLESS_KEYWORDS.keys()
    wanted = system.model(ids).last_hidden_state
    for name, value in given.items():
        assert_equal(system.model(ids, **{name: value}).last_hidden_state, wanted)
    with pytest.raises(ValueError, match="is_causal is False: these models are causal"):
        system(ids, is_causal=False)


def test_the_keywords_of_every_model_of_the_library_are_known():
    assert TransformersKwargs.__optional_keys__ <= HARMLESS_KEYWORDS.keys()


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_generate_with_a_tokenizer(system, how):
    """Which it passes on to every call of the model."""
    ids, tokenizer = draw(1, 9), tiny_tokenizer()
    how = {"max_new_tokens": 5, "do_sample": False} | how
    found = system.generate(ids, tokenizer=tokenizer, stop_strings=["never there"], **how)
    assert_equal(found, system.generate(ids, **how))


# generate() raises an error where it would ignore the cache


def subclass(model, **methods):
    """Return the model as an instance of a subclass with other methods."""
    base = type(model)
    model = build("melodi")
    model.__class__ = type(f"Other{base.__name__}", (base,), methods)
    return model


@pytest.mark.parametrize("given", [False, True])
def test_a_step_that_does_not_write_to_the_cache_is_refused(given):
    base = type(build("melodi"))

    @wraps(base.forward)  # transformers looks at the names of its arguments
    def forward(self, input_ids, **kwargs):
        return base.forward(self, input_ids, cache=MelodiCache(self.config))

    def prepare(self, *args, **kwargs):  # transformers looks for the cache in the outputs
        kept = kwargs.get(CACHE_NAME)
        self.kept = getattr(self, "kept", kept)
        return base.prepare_inputs_for_generation(self, *args, **kwargs | {CACHE_NAME: self.kept})

    model = subclass(build("melodi"), forward=forward, prepare_inputs_for_generation=prepare)
    cache = {"cache": build("melodi").read_document(draw(1, 5))} if given else {}
    ids = draw(1, 9)
    mask = {"attention_mask": torch.ones(1, 9 + 5 * given, dtype=torch.long)}
    with pytest.raises(RuntimeError, match=r"a cache that still holds \d+ columns after a step"):
        model.generate(ids, max_new_tokens=3, **cache, **mask)


@pytest.mark.parametrize("name", ["kv", "state"])
def test_another_name_of_the_cache_is_refused(name):
    """As if transformers renamed it again: in calls, or only in the loop of generate()."""
    base = type(build("melodi"))

    def renamed(self, *args, **kwargs):
        kwargs = rename_cache(kwargs)
        return base.prepare_inputs_for_generation(
            self, *args, **kwargs | {name: kwargs.pop(CACHE_NAME, None)}
        )

    def ignored(self, *args, **kwargs):
        kwargs = rename_cache(kwargs)
        kwargs.pop(CACHE_NAME, None)
        return base.prepare_inputs_for_generation(self, *args, **kwargs)

    model = subclass(build("melodi"), prepare_inputs_for_generation=renamed)
    with pytest.raises(TypeError, match=rf"unknown keyword: {name}"):
        model.generate(draw(1, 9), max_new_tokens=3)
    model = subclass(build("melodi"), prepare_inputs_for_generation=ignored)
    with pytest.raises(RuntimeError, match="continues with no cache after a step"):
        model.generate(draw(1, 9), max_new_tokens=3)


def recorded(model, ids):
    """Return the names of the cache that one generate() uses in calls and outputs."""
    seen = {"prepare": set(), "inputs": set(), "outputs": set(), "generated": set()}
    base = type(model)

    def record_prepare(self, input_ids, **kwargs):
        inputs = base.prepare_inputs_for_generation(self, input_ids, **kwargs)
        seen["prepare"] |= {
            name for name, value in kwargs.items() if isinstance(value, DynamicCache)
        }
        seen["inputs"] |= {
            name for name, value in inputs.items() if isinstance(value, DynamicCache)
        }
        return inputs

    @wraps(base.forward)
    def record_forward(self, *args, **kwargs):
        outputs = base.forward(self, *args, **kwargs)
        seen["outputs"] |= {k for k, value in outputs.items() if isinstance(value, DynamicCache)}
        return outputs

    names = {"prepare_inputs_for_generation": record_prepare, "forward": record_forward}
    model.__class__ = type(base.__name__, (base,), names)
    output = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    seen["generated"] |= {k for k, value in output.items() if isinstance(value, DynamicCache)}
    return seen


def test_the_cache_has_the_name_that_the_installed_llama_gives_it():
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    wanted = recorded(llama, draw(1, 5))
    assert all(len(names) == 1 for names in wanted.values()), wanted
    assert recorded(build("melodi"), draw(1, 5)) == wanted


# Untested versions


def test_a_newer_version_than_the_newest_tested_warns_and_others_do_not():
    major, minor = NEWEST_TESTED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in (OLDEST, BEFORE, NEWEST, f"{major}.{minor}.9", f"{major}.{minor}.0.dev0"):
            warn_if_untested(version)
    for version in (f"{major}.{minor + 1}.0", f"{major + 1}.0.0", f"{major}.{minor + 1}.0.dev0"):
        with pytest.warns(UserWarning, match=rf"tested with transformers up to {major}\.{minor}"):
            warn_if_untested(version)


def test_the_import_warns_once():
    program = "import transformers; transformers.__version__ = '99.0'; import melodi_hf, melodi_hf"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert told.stderr.count("tested with transformers up to") == 1


# One version saves, another loads


def run(folder, *arguments, package):
    path = [str(folder), str(Path(__file__).parents[1])] if package else [str(folder)]
    return subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("versions_user.py")), *arguments],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path), "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """A folder of packages for each version, used with the installed torch."""
    folders = {}
    for version in (OLDEST, BEFORE, NEWEST):
        folders[version] = tmp_path_factory.mktemp(f"transformers-{version}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folders[version])]
        subprocess.run([*command, f"transformers=={version}"], check=True, timeout=600)
    return folders


@pytest.mark.slow
@pytest.mark.network
def test_what_one_version_saves_generates_the_same_tokens_on_the_others(environments, tmp_path):
    tokens = {}
    for saver, folder in environments.items():
        run(folder, "save", str(tmp_path / saver), package=True)
        for loader, other in environments.items():
            told = json.loads(run(other, "load", str(tmp_path / saver), package=False))
            assert told["transformers"] == loader
            tokens[saver, loader] = told["tokens"]
    wanted = tokens[OLDEST, OLDEST]
    assert wanted.keys() == set(EACH)
    for name, found in wanted.items():
        assert found["True"] == found["False"], name
    assert all(found == wanted for found in tokens.values())
