#!/usr/bin/env python
"""Prepare training data: text in, Megatron .bin/.idx files and a tokenizer out. ``--help`` says how."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from r1mega.config import ConfigError
from r1mega.data.corpus import SUFFIXES, DefaultCorpus, FileCorpus
from r1mega.data.prepare import Prepared, prepare

DESCRIPTION = """\
Turn text into what r1mega (and Megatron-LM) trains on: tokens in .bin/.idx files, and a tokenizer.

examples:
  # Maths and code out of installed packages, the same on every machine; no download, half a minute.
  python tools/prepare_data.py --default --output data/default

  # Your own text: every file is one document, every line of a .jsonl file is one.
  python tools/prepare_data.py --input book.txt articles.jsonl notes/ --output data/mine --vocab_size 8192

  # With a tokenizer that exists: a sentencepiece .model, or a folder with a Hugging Face tokenizer.json.
  python tools/prepare_data.py --input articles.jsonl --json_key body --tokenizer DeepSeek-V3/ --output data/articles

The output folder holds train.bin, train.idx, valid.bin, valid.idx, the tokenizer and corpus.json (what it was made
from). It appears when it is complete; if the command is stopped, nothing is left that looks complete. The same command
again does nothing; but a --default folder in which files are missing or cut short is made again. At the end it prints
the lines that go into a configuration file. Files that were prepared for Megatron-LM need no preparation: name their
prefixes under data.train.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        return _run(_parser().parse_args(argv))
    except BrokenPipeError:
        # The reader (head, less) has gone; what Python flushes at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nprepare_data: stopped", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    try:
        if arguments.default:
            corpus = DefaultCorpus(report=_report)
        else:
            corpus = FileCorpus(arguments.input, arguments.json_key, tuple(arguments.suffixes))
        prepared = prepare(
            corpus,
            arguments.output,
            arguments.tokenizer,
            arguments.vocab_size,
            arguments.valid_every,
            report=_report,
            rebuild_damaged=arguments.default,
        )
    except BrokenPipeError:
        raise
    except (ConfigError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    _summarise(prepared, time.monotonic() - start)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "prepare_data.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--default", action="store_true", help="sympy's sources and solved reasoning-gym problems")
    source.add_argument("--input", nargs="+", metavar="PATH", help="text files, .jsonl files, folders of them (UTF-8)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--json_key", default="text", metavar="KEY", help="where a .jsonl line has its text (text)")
    parser.add_argument(
        "--suffixes",
        nargs="+",
        default=SUFFIXES,
        metavar="SUFFIX",
        help=f"which files of a folder to take ({' '.join(SUFFIXES)})",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="an existing tokenizer; without it, one is trained")
    parser.add_argument("--vocab_size", type=int, default=4096, metavar="N", help="size of a tokenizer to train (4096)")
    parser.add_argument(
        "--valid_every",
        type=int,
        default=50,
        metavar="N",
        help="hold out every N-th document for validation, of a few long ones their ends; 0 holds out none (50)",
    )
    return parser


def _report(line: str) -> None:
    print(f"prepare_data: {line}", flush=True)


def _summarise(prepared: Prepared, seconds: float) -> None:
    if prepared.is_new:
        _report(f"done in {seconds:.0f} s")
    else:
        _report(f"{prepared.folder} is there already, made with the same arguments: nothing to do")
    tokens = f"{prepared.train_tokens:,} tokens to train on, {prepared.valid_tokens:,} to validate"
    _report(f"{tokens}; vocabulary {prepared.vocab_size}")
    train, tokenizer = Path(prepared.train).absolute(), Path(prepared.tokenizer).absolute()
    valid = f"[{Path(prepared.valid).absolute()}]" if prepared.valid else "[]"
    print(f"data:\n  train: [{train}]\n  valid: {valid}\n  tokenizer: {tokenizer}")
    print(f"  checksum: {prepared.checksum}")


if __name__ == "__main__":
    sys.exit(main())
