"""Measure time and memory of preparing documents and of opening them again.

    python benchmarks/prepare_data.py books_train.jsonl.gz --tokenizer FOLDER [--rounds 2]
        [--output benchmarks/results/prepare_data.json]

Every measurement is a separate process, with an empty or a complete cache folder. Times exclude the
import of torch and transformers. The peak is that of the whole process. Rounds are summarized by
the median, peaks by the maximum.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from read_million import peak_bytes

from melodi_hf.data import Segments, load_tokenizer, prepare_documents, read_documents
from melodi_hf.data.prepared import CACHE_VARIABLE
from melodi_hf.evaluation.command_line import output_file, positive_int, print_device

PREPARE, OPEN, READ = "prepare", "open again", "open again and read every segment"
READING = {"segment_length": 4096, "num_rows": 8}


def measure(work, files, tokenizer_path):
    """Run one kind of work in this process; return measurements."""
    tokenizer = load_tokenizer(tokenizer_path)
    start, cpu = time.perf_counter(), time.process_time()
    documents = prepare_documents(read_documents(files), tokenizer)
    if work == READ:
        ends = {"start_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
        segments = Segments(documents, vocab_size=len(tokenizer), **ends, **READING)
        for index in range(len(segments)):
            segments[index]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "documents": len(documents),
        "tokens": documents.num_tokens,
        "seconds": seconds,
        "CPU_seconds": cpu,
        "peak_MB": peak_bytes() / 1e6,
    }


def measure_in_subprocess(work, args, folder):
    """Measure in a new process with the cache in `folder`."""
    command = [sys.executable, __file__, *args.files, "--tokenizer", args.tokenizer, "--do", work]
    environment = {**os.environ, CACHE_VARIABLE: folder}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_row(work, measured):
    """Make a row of the table from the measurements of all rounds."""
    first = measured[0]
    seconds, cpu = (
        statistics.median(m[key] for m in measured) for key in ("seconds", "CPU_seconds")
    )
    return {
        "work": work,
        "documents": first["documents"],
        "tokens": first["tokens"],
        "seconds": round(seconds, 2),
        "CPU_seconds": round(cpu, 2),
        "peak_MB": round(max(m["peak_MB"] for m in measured)),
        "tokens_per_second": round(first["tokens"] / seconds) if work == PREPARE else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="documents: JSONL, parquet or text")
    parser.add_argument("--tokenizer", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--rounds", type=positive_int, default=2)
    parser.add_argument(
        "--output", type=output_file, default="benchmarks/results/prepare_data.json"
    )
    parser.add_argument("--do", choices=[PREPARE, OPEN, READ], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        print(json.dumps(measure(args.do, args.files, args.tokenizer)))
        return
    print_device("cpu", "text and ids")
    measured = {PREPARE: [], OPEN: [], READ: []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for work, measurements in measured.items():
                measurements.append(measure_in_subprocess(work, args, folder))
                print(work, json.dumps(measurements[-1]), file=sys.stderr)
    rows = [make_row(work, measurements) for work, measurements in measured.items()]
    files = [Path(name).name for name in args.files]
    result = {"rows": rows, "files": files, "tokenizer": Path(args.tokenizer).name}
    result |= {"rounds": args.rounds, "cores": os.cpu_count(), "segments": READING}
    result["load_average_at_the_end"] = os.getloadavg()[0]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
