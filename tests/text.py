"""A tokenizer of letters that fits the models of `models`, for tools that want text."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .models import VOCABULARY

PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"  # ids 0 to 3
LETTERS = string.ascii_lowercase + string.ascii_uppercase + " .,\n"
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def tiny_tokenizer():
    """One token per letter."""
    known = [PAD, START, END, UNKNOWN, *LETTERS]
    ids = {token: i for i, token in enumerate(known)}
    assert len(ids) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        chat_template=CHAT,
    )
