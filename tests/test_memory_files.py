"""Memory files: saving, loading, continuing, and the errors for files that do not fit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from melodi_hf import MelodiCache
from melodi_hf.models import memory_file
from melodi_hf.models.memory_file import (
    FREE_FIELDS,
    check_memory_of,
    load_memory_file,
    memory_fields,
    save_memory_file,
)

from .cases import every_case
from .models import (
    DOCUMENT,
    EACH,
    FEW,
    assert_differ,
    assert_equal,
    build,
    build_config,
    draw,
    tensors_of,
    tokens_read,
)


def read(model, ids, **how):
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache, **how)
    return cache


def next_logits(model, cache, ids, **how):
    with torch.no_grad():
        return model(ids, cache=cache, **how).logits


def held(cache):
    """All tensors of a cache."""
    return [*tensors_of(cache), tokens_read(cache)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "book.memory"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A memory file that is not changed by any test."""
    file, model = tmp_path_factory.mktemp("memory") / "book.memory", build("melodi")
    read(model, draw(2, DOCUMENT)).save(file)
    return file


# The same memory


def test_reading_goes_on_from_a_file_as_if_it_had_not_stopped(model, file):
    ids, more = draw(2, DOCUMENT), draw(2, 3 * 8)
    cache = read(model, ids)
    cache.save(file)
    loaded = MelodiCache.load(file)
    assert_equal(held(loaded), held(cache))
    assert loaded.get_seq_length() == DOCUMENT
    assert_equal(next_logits(model, loaded, more), next_logits(model, cache, more))
    assert loaded.get_seq_length() == DOCUMENT + 3 * 8


@pytest.mark.parametrize("name", EACH)
def test_rows_that_stand_at_different_places(name, file):
    """Left-padded documents, continued with padding and without."""
    model, ids, more = build(name), draw(3, DOCUMENT), draw(3, 20)
    mask = (torch.arange(DOCUMENT) >= torch.tensor([[0], [5], [DOCUMENT - 1]])).long()
    cache = read(model, ids, attention_mask=mask)
    cache.save(file)
    loaded = MelodiCache.load(file)
    for how in ({"attention_mask": 1 - torch.eye(3, 20).long()}, {}):
        found = next_logits(model, loaded, more, **how)
        assert_equal(found, next_logits(model, cache, more, **how))
    assert_equal(held(loaded), held(cache))


IN_ANOTHER_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
from melodi_hf import MelodiCache

folder, file, answer = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
cache = MelodiCache.load(file, model=model)
ids = torch.full((1, 1), 7)
mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
new = model.generate(
    ids, attention_mask=mask, cache=cache, max_new_tokens=12, do_sample=False
)
torch.save(new, answer)
"""


def test_another_process_goes_on(file, tmp_path):
    model, ids = build("melodi"), draw(1, DOCUMENT)
    model.save_pretrained(tmp_path / "model")
    read(model, ids).save(file, model=model)
    answer = tmp_path / "answer"
    arguments = [str(tmp_path / "model"), str(file), str(answer)]
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], check=True)
    whole = torch.cat((ids, torch.full((1, 1), 7)), dim=1)
    wanted = model.generate(whole, max_new_tokens=12, do_sample=False)[:, DOCUMENT:]
    assert_equal(torch.load(answer), wanted)


def test_a_loaded_cache_is_a_cache(file):
    """It can be repeated, selected, reset, copied and saved like the original."""
    model, more = build("melodi"), draw(4, 9)
    cache = read(model, draw(2, DOCUMENT))
    cache.save(file)
    loaded = MelodiCache.load(file)
    for each in (cache, loaded):
        each.batch_repeat_interleave(2)
    loaded.clone().save(file)
    assert_equal(held(MelodiCache.load(file)), held(cache))
    assert_equal(next_logits(model, loaded, more), next_logits(model, cache, more))
    loaded.reset()
    assert_equal(next_logits(model, loaded, more), next_logits(model, None, more))


def test_a_file_that_changes_does_not_change_what_was_loaded(file):
    read(build("melodi"), draw(1, DOCUMENT)).save(file)
    loaded = MelodiCache.load(file)
    before = [tensor.clone() for tensor in held(loaded)]
    with file.open("r+b") as data:
        data.write(bytes(file.stat().st_size))
    assert_equal(held(loaded), before)


def test_a_cache_with_a_graph_is_saved_without(file):
    model, cache = build("melodi"), MelodiCache(build("melodi").config)
    model(draw(1, DOCUMENT), cache=cache)
    cache.save(file)
    assert any(tensor.requires_grad for tensor in held(cache))
    assert_equal(held(MelodiCache.load(file)), held(cache.detach_()))


def test_further_tensors_come_back(file):
    cache = read(build("melodi"), draw(2, DOCUMENT))
    extras = {"ids_read": torch.tensor([3, -(2**62)]), "marks": torch.rand(2, 0)}
    save_memory_file(cache, file, extras=extras)
    assert_equal(load_memory_file(file).extras, extras)


# Types


@every_case("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_type_is_kept(dtype, file):
    cache = read(build("melodi"), draw(1, DOCUMENT)).to(dtype)
    cache.save(file)
    loaded = MelodiCache.load(file)
    assert {tensor.dtype for tensor in tensors_of(loaded)} == {dtype}
    assert_equal(held(loaded), held(cache))


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_halves_the_file_and_is_gone_on_from_in_float32(name, file, tmp_path):
    model, more = build(name, window_length=1024), draw(1, 20)
    cache = read(model, draw(1, 200))
    cache.save(file)
    half = tmp_path / "half.memory"
    cache.save(half, dtype=torch.bfloat16)
    assert half.stat().st_size <= 0.52 * file.stat().st_size
    loaded = MelodiCache.load(half)
    rounded = [t.bfloat16().float() if t.is_floating_point() else t for t in held(cache)]
    assert_equal(held(loaded), rounded)
    wanted = next_logits(model, cache, more)
    found = next_logits(model, loaded, more)
    assert 1e-6 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("name", FEW)
def test_a_model_of_another_type_goes_on_when_it_is_named(name, file):
    model, more = build(name), draw(1, 20)
    cache = read(model, draw(1, DOCUMENT))
    cache.save(file, model=model)
    half = build(name).bfloat16()
    for loaded in (MelodiCache.load(file, model=half), MelodiCache.load(file, dtype=half.dtype)):
        assert_equal(next_logits(half, loaded, more), next_logits(half, cache.to(half.dtype), more))
        cache = MelodiCache.load(file)


def test_a_type_that_cannot_hold_a_memory(file):
    cache = read(build("melodi"), draw(1, 3))
    with pytest.raises(ValueError, match=r"dtype is torch.int8: a memory is made of floating"):
        cache.save(file, dtype=torch.int8)


# The model that wrote it

CHANGES = {
    "vocab_size": 62,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "head_dim": 14,
    "intermediate_size": 41,
    "hidden_act": "gelu",
    "mlp_bias": False,
    "window_length": 9,
    "mask_empty_memory": True,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 13,
    "rms_norm_eps": 1e-5,
    "num_summary_tokens": 2,
    "num_short_memory_tokens": 4,
    "long_memory_layers": (2,),
    "num_long_memory_tokens": 1,
    "long_memory_windows": 4,
    "long_memory_capacity": 5,
    "mix_tokens": False,
}


@every_case("field", CHANGES)
def test_another_model_is_refused_by_the_field_that_differs(field, written):
    value = CHANGES[field]
    model, cache = build("melodi", **{field: value}), MelodiCache.load(written)
    before = [tensor.clone() for tensor in held(cache)]
    shown = list(value) if isinstance(value, tuple) else value
    message = rf"by a model with {field}=\S+ and this one has {field}={shown!r}:".replace(
        "[", r"\["
    )
    # Other layers are counted first.
    if field == "num_hidden_layers":
        message = "holds 3 layers .* and this model has 4"
    with pytest.raises(ValueError, match=message):
        next_logits(model, cache, draw(2, 5))
    assert_equal(held(cache), before)
    with pytest.raises(ValueError, match=f"has {field}="):
        MelodiCache.load(written, model=model)


def test_another_system_is_refused(written):
    cache = MelodiCache.load(written)
    message = "with model_type='melodi' and this one has model_type='transformer_xl': it is that"
    with pytest.raises(ValueError, match=message):
        next_logits(build("transformer_xl"), cache, draw(2, 5))


def test_fields_that_do_not_shape_a_memory_may_differ(written):
    free = {"dropout": 0.1, "eos_token_id": 3, "use_cache": False, "logit_scale": 0.5}
    assert free.keys() <= FREE_FIELDS
    next_logits(build("melodi", **free), MelodiCache.load(written), draw(2, 5))


@pytest.mark.parametrize("name", ["melodi", "transformer_xl"])
def test_a_field_counts_unless_it_is_known_to_be_free(name):
    config = build_config(name)
    own = type(config).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    assert memory_fields(config).keys() == (own - FREE_FIELDS) | {"model_type"}
    assert own >= FREE_FIELDS
    if name == "melodi":
        assert memory_fields(config).keys() == CHANGES.keys() | {"model_type"}


def test_a_file_of_before_a_field_was_added_is_that_of_its_default():
    """Files of earlier versions lack `context_windows` of the Transformer-XL."""
    fields = memory_fields(build_config("transformer_xl", mask_empty_memory=True))
    assert fields.pop("context_windows") is None
    check_memory_of(fields, build_config("transformer_xl", mask_empty_memory=True))
    with pytest.raises(ValueError, match=r"with context_windows=None and this one has .*=2:"):
        check_memory_of(
            fields, build_config("transformer_xl", mask_empty_memory=True, context_windows=2)
        )
    del fields["mask_empty_memory"]  # False by default
    with pytest.raises(ValueError, match=r"with mask_empty_memory=False and this one has .*=True:"):
        check_memory_of(fields, build_config("transformer_xl", mask_empty_memory=True))


def test_a_config_that_went_through_a_file_is_the_same(written, tmp_path):
    config = build_config("melodi")  # its tuples are lists in JSON
    config.save_pretrained(tmp_path)
    assert memory_fields(type(config).from_pretrained(tmp_path)) == memory_fields(config)


def test_other_weights_are_refused_where_both_models_are_named(file):
    model, other = build("melodi"), build("melodi", seed=1)
    cache = read(model, draw(1, DOCUMENT))
    cache.save(file, model=model)
    with pytest.raises(ValueError, match=r"by other weights than this model's: \d+ of \d+ matri"):
        MelodiCache.load(file, model=other)
    MelodiCache.load(file, model=model.bfloat16())  # rounding is allowed
    cache.save(file)
    MelodiCache.load(file, model=other)  # the file has no sample of weights


# Files that are not a memory


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no memory file .*book.memory: name one"):
        MelodiCache.load(tmp_path / "book.memory")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"link is a link to .*gone, which does not exist"):
        MelodiCache.load(link)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(FileNotFoundError, match=r"circle is a link to .*circle, which does not"):
        MelodiCache.load(str(circle))
    with pytest.raises(ValueError, match="is a folder: name the file that save"):
        MelodiCache.load(tmp_path)


def test_a_file_cut_short_anywhere_is_refused(written, file):
    data = written.read_bytes()
    for end in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises(ValueError, match="is no safetensors file, or a part of one"):
            MelodiCache.load(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="is no safetensors file, or a part of one"):
        MelodiCache.load(file)


def test_a_flipped_bit_anywhere_is_refused(written, file):
    data = written.read_bytes()
    for place in [*range(0, 200, 3), *range(200, len(data), len(data) // 200), len(data) - 1]:
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"book.memory (is|was) "):
            MelodiCache.load(file)


def rewritten(written, file, **changes):
    """Write the file again with other metadata (None removes an entry) and the same tensors."""
    header = json.loads(written.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    metadata = {**header["__metadata__"], **changes}
    save_file(load_file(written), file, {n: v for n, v in metadata.items() if v is not None})
    return file


def test_other_files_are_refused(written, file, tmp_path):
    build("melodi").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    with pytest.raises(ValueError, match=r"without a memory .*'pt'.* loaded by from_pretrained"):
        MelodiCache.load(weights)
    with pytest.raises(ValueError, match=r"without a memory .*its format is None"):
        MelodiCache.load(rewritten(written, file, format=None))
    with pytest.raises(ValueError, match=r"is no safetensors file"):
        MelodiCache.load(__file__)


def test_other_versions_are_refused(written, file):
    for version in ("2", None):
        message = rf"is of version {version} of the format and this library reads version 1"
        with pytest.raises(ValueError, match=message):
            MelodiCache.load(rewritten(written, file, version=version))


def test_metadata_that_were_changed_are_refused(written, file):
    with pytest.raises(ValueError, match="its checksum does not hold"):
        MelodiCache.load(rewritten(written, file, sha256=None))
    with pytest.raises(ValueError, match="its checksum does not hold"):
        MelodiCache.load(rewritten(written, file, content="{}"))
    assert_equal(held(MelodiCache.load(rewritten(written, file))), held(MelodiCache.load(written)))


# Writing


def test_nothing_read_is_nothing_to_save(file):
    with pytest.raises(ValueError, match=r"nothing to write into .*: the cache has read no token"):
        MelodiCache(build_config("melodi")).save(file)
    assert not file.exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(step, file, monkeypatch):
    model = build("melodi")
    first, second = (read(model, draw(1, DOCUMENT)) for _ in range(2))
    assert_differ(first.layers[0].memory[0], second.layers[0].memory[0])
    first.save(file)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(memory_file.os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            second.save(file)
    assert_equal(held(MelodiCache.load(file)), held(first))
    assert os.listdir(file.parent) == [file.name]
    second.save(file)
    assert_equal(held(MelodiCache.load(file)), held(second))


def test_folders_are_made_and_links_are_followed(tmp_path):
    cache = read(build("melodi"), draw(1, DOCUMENT))
    file, link = tmp_path / "a" / "b" / "book.memory", tmp_path / "link"
    cache.save(str(file))
    link.symlink_to(file)
    cache.batch_repeat_interleave(3)
    cache.save(link)
    assert link.is_symlink()
    assert_equal(held(MelodiCache.load(file)), held(cache))
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        cache.save(tmp_path)


# Copies


@pytest.mark.parametrize("name", EACH)
def test_a_clone_and_what_it_was_cloned_from_read_on_alone(name):
    model, ids, more = build(name), draw(2, DOCUMENT), draw(2, 20)
    cache = read(model, ids)
    clone = cache.clone()
    shared = {t.data_ptr() for t in held(cache) if t.numel()}
    assert not shared & {t.data_ptr() for t in held(clone)}
    before = [tensor.clone() for tensor in held(cache)]
    found = next_logits(model, clone, more)
    assert_equal(held(cache), before)
    assert (cache.get_seq_length(), clone.get_seq_length()) == (DOCUMENT, DOCUMENT + 20)
    assert_differ(found, next_logits(model, clone, more))
    assert_equal(next_logits(model, cache, more), found)
    clone.reset()
    assert cache.get_seq_length() == DOCUMENT + 20
