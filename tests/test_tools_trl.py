"""TRL's SFTTrainer runs as it comes, in bfloat16; packing of documents into one row is refused."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from .models import EACH, build
from .text import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings(  # a default of TRL's
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)

TEXTS = ["The first document is short.", "The second is a little longer, by a few letters."] * 4


def train(folder, name, **given):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **given,
    }
    trainer = SFTTrainer(
        build(name),
        SFTConfig(**arguments),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", EACH)
def test_sft_runs_with_its_defaults(tmp_path, name):
    trainer = train(tmp_path, name)
    assert trainer.args.bf16
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    before = dict(build(name).named_parameters())
    assert all(weight.dtype == torch.float32 for weight in before.values())
    same = {k for k, new in trainer.model.named_parameters() if torch.equal(new, before[k])}
    nobody_follows_it = {key for key in same if key.startswith("model.layers.2.summary_mixer")}
    # TRL makes a loss of its own from the hidden states, and leaves out what is trained besides.
    left_out = {key for key in before if ".compression." in key}
    assert same == nobody_follows_it | left_out


REFUSED = {
    "packing": {"packing": True},
    "packing, split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("how", REFUSED.values(), ids=REFUSED)
def test_documents_in_one_row_are_refused(tmp_path, how):
    with pytest.raises(ValueError, match="packing=False"):
        train(tmp_path, "melodi", **how)
