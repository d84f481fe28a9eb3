"""Reading `--config=FILE:PRESET --config.KEY=VALUE`, with every mistake said in one line."""

import difflib
import sys
from collections.abc import Mapping

from absl import flags


def parse(argv: list[str]) -> list[str]:
    """`flags.FLAGS(argv)`, for `app.run(main, flags_parser=parse)`; needs a flag `config`.

    Exits with one line for an unknown key (and the nearest one), a value of another type, an
    unknown preset, or a recipe that cannot be read.
    """
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS.config is not None:
            flags.FLAGS.config.lock()  # a file that cannot be read fails at the first access
        return rest
    except (AttributeError, KeyError):
        sys.exit(f"error: {_unknown_key(argv)}")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        # Errors inside a recipe arrive as the text of a traceback: the last line says what.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(f"error: {lines[-1].removeprefix('ValueError: ')}")


def _unknown_key(argv: list[str]) -> str:
    overrides = [a.lstrip("-").partition("=")[0] for a in argv if a.startswith("-")]
    # The recipe as it is without them; its flag reads them from sys.argv, and we exit anyway.
    sys.argv = [a for a in argv if not a.lstrip("-").startswith("config.")]
    flags.FLAGS(sys.argv)
    known = _keys(flags.FLAGS.config.to_dict())
    for name in overrides:
        key = name.removeprefix("config.")
        if name != key and key not in known:
            return f"no option --config.{key}{_nearest(key, known)}"
    return f"cannot read the options {', '.join(overrides)}"


def _nearest(key: str, known: list[str]) -> str:
    section, _, last = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    close = [siblings[k] for k in difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)]
    elsewhere = sorted((k for k in known if k.rpartition(".")[2] == last), key=_depth)
    misspelt = [] if siblings else difflib.get_close_matches(key, known, n=1)
    if found := elsewhere or close or misspelt:
        return f"; did you mean --config.{found[0]}?"
    return f"; there are {', '.join(siblings.values() or known)}"


def _depth(key: str) -> int:
    return key.count(".")


def _keys(tree: Mapping, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys.append(prefix + name)
        if isinstance(value, Mapping):
            keys += _keys(value, f"{prefix}{name}.")
    return keys
