"""What every test can rely on: no network, one seed, one thread, and the systems."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from transformers.utils.logging import warning_once

from .models import SYSTEMS, build

torch.set_num_threads(1)  # the tensors are tiny, and sums keep their order


@pytest.fixture(autouse=True, scope="session")
def prepared_documents(tmp_path_factory):
    """Documents are prepared in a folder of these tests, also by the programs that they start."""
    os.environ["MELODI_HF_CACHE"] = str(tmp_path_factory.mktemp("prepared"))


# What transformers does itself, in assisted decoding.
DEPRECATED_WITHIN = "Passing `generation_config` together with generation-related arguments"


class RaiseWhatIsDeprecated(logging.Handler):
    """transformers tells of some deprecated names in its log, where pytest does not look."""

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" in message and not message.startswith(DEPRECATED_WITHIN):
            raise AssertionError(message)


@pytest.fixture(autouse=True)
def no_deprecated_names(request):
    handler, logger = RaiseWhatIsDeprecated(), logging.getLogger("transformers")
    warning_once.cache_clear()
    level = logger.level
    if "old_names" not in request.keywords:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)  # scripts that ran in this process may have raised it
    yield
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=SYSTEMS, scope="module")
def model(request):
    """Every system in turn, in evaluation mode; tests that change a model build their own."""
    return build(request.param)
