"""The command line: flags from a dataclass of settings, bad input as one line with exit status 2, words on stderr."""

import argparse
import json
import os
import sys
from dataclasses import field, fields

from safetensors import SafetensorError
from tqdm import tqdm

from model import UserError


def say(message):
    """A line for the person who watches, on stderr."""
    tqdm.write(message, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and whose help ends each line with the default."""

    def __init__(self, description, usage="[flags]"):
        super().__init__(description=description, usage="%(prog)s " + usage, allow_abbrev=False,
                         formatter_class=lambda prog: Help(prog, max_help_position=26, width=120))

    def error(self, message):
        raise UserError(f"{self.prog}: {message}; see --help")


class Help(argparse.HelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, argparse.SUPPRESS, False, 0, "") and "default" not in action.help
        choices = f": {', '.join(action.choices)}" if action.choices else ""
        return action.help + choices + (" (default: %(default)s)" if shown else "")


def setting(default, group, help, choices=None, low=0, high=2**63):
    """A field of a program's settings, which is a flag with this --help; numbers go from `low` to below `high`."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, "bounds": (low, high)})


def parser_of(settings_class, description):
    """An ArgumentParser with one flag per field of the dataclass, grouped as its fields say."""
    parser, groups = Parser(description), {}
    for f in fields(settings_class):
        m = f.metadata
        if m["group"] not in groups:
            groups[m["group"]] = parser.add_argument_group(m["group"])
        convert = number(f.type, *m["bounds"]) if f.type in (int, float) else path_of
        if f.type is list:
            convert = lambda text: [path_of(part) for part in text.split(",") if part]  # noqa: E731
        options = {"type": convert, "choices": m["choices"], "metavar": "X"}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        groups[m["group"]].add_argument("--" + f.name.replace("_", "-"), default=f.default, help=m["help"], **options)
    return parser


def path_of(text):
    """A flag's text, in which a ~ at the start is the home folder, as the shell leaves it in --data=~/glue."""
    return os.path.expanduser(text)


def number(kind, low=0, high=2**63):
    """What reads a flag's text as a number of this kind, from `low` to below `high`."""
    def read(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text}: {expected(low, high)}")
        return value

    read.__name__ = kind.__name__  # as errors have it
    return read


def expected(low, high):
    """What a number out of its bounds should have been, for a message."""
    return f"must be from {low} to below {high:g}"


def told(s, names):
    """The flags of those settings that are not the defaults, for a message."""
    return ", ".join("--" + name.replace("_", "-") for name in names if getattr(s, name) != getattr(type(s), name))


def check_bounds(settings):
    """Raises UserError for a number out of its bounds: settings made in Python, or of a run.json, had no parser."""
    for f in fields(settings):
        value, (low, high) = getattr(settings, f.name), f.metadata["bounds"]
        if isinstance(value, (int, float)) and not low <= value < high:
            raise UserError(f"--{f.name.replace('_', '-')} {value}: {expected(low, high)}")


def run_program(main):
    """Run a program's main(); bad input becomes one line on stderr and exit status 2."""
    try:
        main()
    except (UserError, OSError, SafetensorError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def to_json(value, indent=None):
    """JSON text, of tensors too; numbers that JSON has no word for become null."""
    plain = json.dumps(value, default=lambda tensor: tensor.tolist())  # a subclass has its own
    return json.dumps(json.loads(plain, parse_constant=lambda word: None), indent=indent)
