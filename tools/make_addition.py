#!/usr/bin/env python
"""Make the data of the addition example: prompts, demonstrations, a tokenizer. ``--help`` says how."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from r1mega.config import ConfigError
from r1mega.rl.tasks.addition import AdditionTask, write_addition

DESCRIPTION = """\
Make the smallest task on which GRPO can be seen to work: adding two numbers, with the carries written out.

  47+85=   <think>7+5=12,4+8+1=13</think> <answer>132</answer>

The output folder holds
  demonstrations.jsonl   {"prompt", "completion"} for r1mega sft; many of them with a wrong answer or a missing tag
  prompts.jsonl          {"prompt", "reference"} for r1mega grpo
  evaluation.jsonl       the same, for evaluation: prompts that are in neither of the other files
  tokenizer.json         one token a digit, a sign or a tag; the folder itself is a value for data.tokenizer
  task.json              the settings it was made with
It appears when it is complete, and is the same on every machine. The same command again does nothing.

examples:
  python tools/make_addition.py --output data/addition
  python tools/make_addition.py --output data/addition3 --num_digits 3 --num_prompts 20000 --num_demonstrations 60000
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "make_addition.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to make")
    for field in dataclasses.fields(AdditionTask):
        kind = type(field.default)
        metavar = "SHARE" if kind is float else "N"
        text = f"{field.metadata['help']} ({field.default})"
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, metavar=metavar, help=text)
    arguments = vars(parser.parse_args(argv))
    try:
        written = write_addition(arguments.pop("output"), AdditionTask(**arguments))
    except ConfigError as error:
        print(f"make_addition: {error}", file=sys.stderr)
        return 2
    done = "" if written.is_new else " is there already, made with the same settings: nothing to do"
    print(f"make_addition: {written.folder}{done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
