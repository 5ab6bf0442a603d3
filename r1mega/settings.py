"""Settings from the command line: ``--config FILE`` (YAML) with dotted flags over it, made into a :class:`Config`.

jsonargparse does the parsing. This file adds what it lacks: errors of one line that say what fits, the nearest known
name for an unknown one, and a help text without the parser's own vocabulary. torch is not imported here.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path

import jsonargparse
import yaml

from r1mega.config import Config, ConfigError


def parse_config(argv: Sequence[str]) -> Config:
    """The settings that ``argv`` asks for.

    Args:
        argv: ``--config FILE`` and dotted flags (``--parallel.tp 2``); what comes later wins.

    Raises:
        ConfigError: one line, for anything that cannot be understood or cannot work.
    """
    return parse(SettingsParser(prog="r1mega pretrain"), argv)[0]


def dump_config(config: Config) -> str:
    """``config`` as YAML that ``--config`` reads back to an equal :class:`Config`."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def parse(parser: SettingsParser, argv: Sequence[str]) -> tuple[Config, jsonargparse.Namespace]:
    """Parse ``argv`` with ``parser``; returns the settings, and the namespace with the command's own options.

    Raises:
        ConfigError: as :func:`parse_config`.
    """
    check_flags(argv, known_options=parser.option_names())
    namespace = parser.parse_args(list(argv))
    try:
        built = parser.instantiate(namespace)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(with_whole_name(str(error))) from error
    return Config(**{field.name: built[field.name] for field in dataclasses.fields(Config)}), namespace


def with_whole_name(message: str) -> str:
    """The error ``name=value: ...`` of options that other stacks use, too, with the dotted name of the setting."""
    name, equals, rest = message.partition("=")
    whole = [setting for setting in setting_types() if setting.split(".")[-1] == name]
    return f"{whole[0]}{equals}{rest}" if len(whole) == 1 else message


def is_first_rank() -> bool:
    """Whether this process is rank 0, or was not started by torchrun: the one that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def world_size_from_environment() -> int:
    """Number of processes, as torchrun tells it; 1 without torchrun. Raises :class:`ConfigError`."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"WORLD_SIZE={value}: must be a positive integer")
    return int(value)


class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's notes on type and default, with the line breaks of the description kept."""


class CommandParser(jsonargparse.ArgumentParser):
    """A parser whose errors are :class:`ConfigError` and whose help is printed by the first rank only."""

    def __init__(self, *args: typing.Any, **kwargs: typing.Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, print_config=None, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        own_options = {action.dest: getattr(action, "_typehint", action.type) for action in self._actions}
        raise ConfigError(explain(message, own_options | setting_types(), see=f"{self.prog} --help")) from ex

    def print_help(self, *args: typing.Any, **kwargs: typing.Any) -> None:
        if is_first_rank():
            super().print_help(*args, **kwargs)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The help text; docstrings mark code with double backticks, which mean nothing on a terminal."""
        return super().format_help(formatter).replace("``", "")

    def option_names(self) -> set[str]:
        """Names of this command's own options (``config``, ``help``), without dashes; settings are not among them."""
        options = (option for action in self._actions for option in action.option_strings)
        return {option.lstrip("-") for option in options} - set(setting_types()) - set(group_names())


class SettingsParser(CommandParser):
    """A parser of ``--config`` and of every setting in :class:`Config`.

    Args:
        shown: the groups of settings that the help lists; the others can still be set.
    """

    def __init__(self, *args: typing.Any, shown: Sequence[str] | None = None, **kwargs: typing.Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--config", action="config", metavar="FILE", help="YAML file with settings; flags after it win over it."
        )
        self.add_class_arguments(Config, as_group=True)
        shown = group_names() if shown is None else shown
        for action in self._actions:
            name = action.dest
            # A group's own flag (--model FILE) is jsonargparse's; here --config alone reads files.
            if name in group_names() or (name in setting_types() and name.split(".")[0] not in shown):
                action.help = argparse.SUPPRESS


@functools.cache
def setting_types(cls: type = Config, prefix: str = "") -> dict[str, typing.Any]:
    """Every setting by its dotted name, with its type: ``{"model.vocab_size": int, ...}``."""
    found: dict[str, typing.Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            found |= setting_types(typing.cast(type, annotation), f"{prefix}{name}.")
        else:
            found[prefix + name] = annotation
    return found


@functools.cache
def group_names() -> list[str]:
    """The dotted names that hold settings: ``model``, ``model.attention``, ..."""
    parents = (name.split(".")[:depth] for name in setting_types() for depth in range(1, name.count(".") + 1))
    return list(dict.fromkeys(".".join(parent) for parent in parents))


def check_flags(argv: Sequence[str], known_options: set[str]) -> None:
    """Check the names of all flags in ``argv``, and the files that ``--config`` names. Raises :class:`ConfigError`."""
    for position, argument in enumerate(argv):
        if not argument.startswith("--") or argument == "--":
            continue
        name, equals, value = argument[2:].partition("=")
        if name == "config" and "config" in known_options:
            following = argv[position + 1] if position + 1 < len(argv) else None
            path = value if equals else following
            if not path or (path == following and path.startswith("--")):
                raise ConfigError("config: needs the path of a YAML file, as in --config examples/configs/r1_tiny.yaml")
            check_file(path)
        elif name.removesuffix("+") not in known_options:
            check_name(name.removesuffix("+"), known_options)


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key given twice instead of forgetting the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_file(path: str) -> None:
    """Check that ``path`` is a YAML file of known settings. Raises :class:`ConfigError`."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=StrictLoader)
    except OSError as error:
        raise ConfigError(f"config={path}: {error.strerror or error}; must be a YAML file of settings") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config={path}: is not UTF-8 text; must be a YAML file of settings") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or one_line(str(error))
        raise ConfigError(f"config={path}: is not valid YAML{where}: {what}") from error
    except RecursionError as error:
        raise ConfigError(f"config={path}: is nested too deeply; must be a YAML file of settings") from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"config={path}: must hold settings by group, such as 'train: {{num_steps: 100}}'")
    check_tree(tree, "", path)


def check_tree(tree: dict, prefix: str, path: str) -> None:
    """Check the names in a mapping read from the YAML file ``path``. Raises :class:`ConfigError`."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name not in group_names():
            check_name(name)
            if value is None and types.NoneType not in typing.get_args(setting_types()[name]):
                raise ConfigError(f"{name}=null: {what_fits(setting_types()[name])}")
        elif isinstance(value, dict):
            check_tree(value, f"{name}.", path)
        else:
            raise ConfigError(f"{name}={show(value)}: is a group of settings, not a setting; see {path}")


def check_name(name: str, options: Collection[str] = ()) -> None:
    """Raise a :class:`ConfigError` that suggests the nearest setting, or one of ``options``, unless it is a setting."""
    known = list(setting_types())
    if name in known:
        return
    if name in group_names():
        example = next(setting for setting in known if setting.startswith(f"{name}."))
        raise ConfigError(f"{name}: is a group of settings; give them one by one (--{example}) or in a --config FILE")
    raise ConfigError(f"unknown setting {name}; {hint(name, options)}")


def hint(name: str, options: Collection[str]) -> str:
    """What may have been meant by the unknown setting ``name``."""
    guess = name.replace("-", "_").lower()
    option = difflib.get_close_matches(guess, [option for option in options if len(option) > 1], n=1, cutoff=0.8)
    if option:
        return f"did you mean --{option[0]}?"
    known = list(setting_types())
    group, _, last = guess.rpartition(".")
    same_last_part = [setting for setting in known if setting.split(".")[-1] == last]
    begun = [setting for setting in known if setting.startswith(guess)]
    # Not of the many settings inside the model's parts, whose initials are nearly all there are.
    abbreviated = [name for name in known if name.count(".") == 1 and initials(name) == last and len(last) > 1]
    likely = same_last_part or begun or abbreviated
    if likely:
        return f"did you mean {difflib.get_close_matches(guess, likely, n=1, cutoff=0.0)[0]}?"
    members = [setting for setting in known if setting.rpartition(".")[0] == group]
    # A known group is shared with all its settings, so the rest of the name decides.
    if nearest := nearest_last_part(last, members, 0.6) or nearest_last_part(last, known, 0.8):
        return f"did you mean {nearest}?"
    whole = known if group else known + group_names()
    if not members and (close := difflib.get_close_matches(guess, whole, n=1)):
        return f"did you mean {close[0]}?"
    if members:
        return f"{group} has {', '.join(setting.removeprefix(f'{group}.') for setting in members)}"
    if group:
        groups = [group for group in group_names() if "." not in group]
        return f"settings begin with {', '.join(groups[:-1])} or {groups[-1]}; see r1mega pretrain --help"
    return "see r1mega pretrain --help"


def nearest_last_part(last: str, settings: Sequence[str], cutoff: float) -> str | None:
    """The one of ``settings`` whose last part is most like ``last``."""
    parts = {setting.split(".")[-1]: setting for setting in reversed(settings)}
    found = difflib.get_close_matches(last, parts, n=1, cutoff=cutoff)
    return parts[found[0]] if found else None


def initials(setting: str) -> str:
    """``optimizer.learning_rate`` as ``lr``."""
    return "".join(word[:1] for word in setting.split(".")[-1].split("_"))


def explain(message: str, kinds: dict[str, typing.Any], see: str) -> str:
    """A parser's error as one line: ``name=value: what fits``.

    Args:
        message: the error, of several lines perhaps.
        kinds: the type of every setting and option, by name.
        see: where the user finds more.
    """
    if wrong := re.search(r'Parser key "([\w.]+)":.*?(?:Got|Given) value: (.*)', message, re.DOTALL):
        value = {"None": "null"}.get(wrong[2], one_line(wrong[2]))
        return f"{wrong[1]}={value}: {what_fits(kinds.get(wrong[1]))}"
    message = one_line(message)
    if stray := re.fullmatch(r"unrecognized arguments: (.*)", message):
        return f"unexpected argument {stray[1]}; see {see}"
    if empty := re.fullmatch(r"argument --([\w.]+): expected one argument", message):
        return f"{empty[1]}: needs a value; {what_fits(kinds.get(empty[1]))}"
    return message


def what_fits(kind: typing.Any) -> str:
    """What a setting of type ``kind`` takes, for an error: ``must be an integer, or null``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not types.NoneType]
        return f"{what_fits(members[0])}, or null"
    if typing.get_origin(kind) is typing.Literal:
        *others, last = typing.get_args(kind)
        return f"must be {', '.join(others)} or {last}"
    if typing.get_origin(kind) is list:
        return 'must be a list, such as ["first","second"]'
    plain = {int: "must be an integer", float: "must be a number", bool: "must be true or false"}
    return plain.get(kind, "must be text")


def show(value: object) -> str:
    """A YAML value as it may stand in an error."""
    return json.dumps(value, ensure_ascii=False, default=str)


def one_line(text: str) -> str:
    """``text`` with all white space, line breaks too, made single spaces."""
    return " ".join(text.split())
