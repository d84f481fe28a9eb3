"""Rules of decoding by name: `name` or `name:value,value`, as a config or a command line says."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


def rule(what: str, spec: str, table: Mapping[str, Any]) -> Any:
    """The rule of `table` that `spec` names, a frozen dataclass, its fields filled in order.

    `threshold:0.95` is `table['threshold'](0.95)`; fields left out keep their defaults.

    Raises:
      ValueError: an unknown name, too many values, one of another type, or one that the rule
        refuses; says which there are.
    """
    name, _, text = spec.partition(":")
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ":"
        raise ValueError(f"{what}={spec!r}{hint} choose one of {', '.join(table)}")
    fields, values = dataclasses.fields(table[name]), text.split(",") if text else []
    if len(values) > len(fields):
        names = ", ".join(f.name for f in fields) or "none"
        raise ValueError(f"{what}={spec!r}: {name} has these options: {names}")
    bound = []
    for field, value in zip(fields, values, strict=False):
        kind: Any = type(field.default)
        try:
            bound.append(kind(value))
        except ValueError:
            raise ValueError(
                f"{what}={spec!r}: {field.name}={value!r} is no {kind.__name__}; "
                f"the default is {field.default!r}"
            ) from None
    try:
        return table[name](*bound)
    except ValueError as error:
        raise ValueError(f"{what}={spec!r}: {error}") from None
