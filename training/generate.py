"""Continue a document of any length.

    python training/generate.py runs/quickstart --prompt-file book.txt --max-new-tokens 100

The prompt is read in pieces through the memory. The continuation is streamed to standard output;
speeds are written to standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import parts.threads  # noqa: F401  # before torch

# isort: split

import torch
from transformers import TextStreamer

from melodi_hf.evaluation.command_line import (
    FAILURES,
    one_line,
    positive_float,
    positive_int,
    print_device,
    probability,
    read_text,
    seed_number,
)
from melodi_hf.evaluation.continuation import continue_text
from melodi_hf.evaluation.loading import load_matching_tokenizer, load_model


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue a document of any length.")
    parser.add_argument("model", help="output folder of training/train.py, or a name on the Hub")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the text to continue (default: standard input)")
    prompt.add_argument("--prompt-file", type=Path, help="file with the text to continue")
    parser.add_argument("--max-new-tokens", type=positive_int, default=100)
    parser.add_argument("--sample", action="store_true", help="sample (default: greedy)")
    parser.add_argument("--temperature", type=positive_float, help="with --sample")
    parser.add_argument("--top-p", type=probability, help="with --sample")
    parser.add_argument("--seed", type=seed_number, default=0)
    options = parser.parse_args(arguments)
    if not options.sample and (options.temperature is not None or options.top_p is not None):
        parser.error("--temperature and --top-p apply to sampling only: add --sample")
    return options


def read_prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is not None:
        return read_text(options.prompt_file)
    if options.prompt is not None:
        return options.prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 ({error}): convert it to UTF-8") from error


def sampling(options: argparse.Namespace) -> dict[str, float | bool]:
    """Return the sampling arguments of generate()."""
    given = {"temperature": options.temperature, "top_p": options.top_p}
    return {"do_sample": options.sample} | {k: v for k, v in given.items() if v is not None}


def generate(options: argparse.Namespace) -> None:
    text = read_prompt(options)
    model = load_model(options.model)
    print_device(model.device, model.dtype)
    tokenizer = load_matching_tokenizer(model, options.model)
    torch.manual_seed(options.seed)
    _, info = continue_text(
        model,
        tokenizer,
        text,
        options.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling(options),
    )
    print(
        f"read {info['tokens_read']:,} tokens ({info['read_tokens_per_second']:,.0f} per second), "
        f"memory of {info['memory_bytes']:,} bytes, "
        f"generated {info['tokens_generated']} tokens "
        f"({info['generated_tokens_per_second']:,.0f} per second)",
        file=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        generate(options)
    except FAILURES as error:
        sys.exit(f"generate.py: {one_line(error)}")


if __name__ == "__main__":
    main()
