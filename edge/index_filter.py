"""Metadata of an index and filters over it: plain values beside each row, conditions as a dict, both in sqlite.

A filter maps a name to what its value must be, and all of its entries must hold::

    {"folder": "cats"}                          equal
    {"suffix": [".jpg", ".png"]}                one of these
    {"year": {">=": 2020, "<": 2024}}           ranges, of numbers or of strings
    {"folder": {"!=": "cats"}, "seen": None}    unequal; absent

Values compare as in Python (`True == 1 == 1.0`, no number equals a string); a range holds only for values of the
bound's own kind, numbers or strings. An absent value is None.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pocketvlm.edge.errors import UsageError, unknown_name

Value: TypeAlias = "str | int | float | bool | None"
Metadata: TypeAlias = "Mapping[str, Value]"
Where: TypeAlias = "Mapping[str, Value | Sequence[Value] | Mapping[str, Value | Sequence[Value]]]"

TABLES = """
CREATE TABLE facts (name TEXT NOT NULL, value NOT NULL, row INTEGER NOT NULL, PRIMARY KEY (name, value, row))
WITHOUT ROWID;
"""
_INT64 = 1 << 63


def checked_metadata(metadata: Metadata) -> dict[str, Value]:
    """A copy whose names are strings and whose values can be stored and compared.

    Raises:
        UsageError: a name that is no string, a value that is none of str, int (64 bits), float, bool and None, NaN,
            infinity, or text with half of a surrogate pair.
    """
    for name, value in metadata.items():
        if not isinstance(name, str) or not _storable(name):
            raise UsageError(
                f"metadata has the name {name!r} and a string is expected; no filter could name it, so use plain text"
            )
        _check_value(name, value)
    return dict(metadata)


def insert_facts(db: sqlite3.Connection, rows: Sequence[tuple[int, dict[str, Value]]]) -> None:
    """Make these rows' metadata findable."""
    db.executemany(
        "INSERT INTO facts VALUES (?, ?, ?)",
        ((name, value, row) for row, metadata in rows for name, value in metadata.items() if value is not None),
    )


def delete_facts(db: sqlite3.Connection, rows: Sequence[tuple[int, str]]) -> None:
    """Undo `insert_facts` for rows given with their metadata as the JSON that is stored."""
    db.executemany(
        "DELETE FROM facts WHERE name = ? AND value = ? AND row = ?",
        (
            (name, value, row)
            for row, metadata in rows
            for name, value in json.loads(metadata).items()
            if value is not None
        ),
    )


def where_sql(where: Where) -> tuple[str, list[Any]]:
    """A condition on `rows.row` and its parameters.

    Raises:
        UsageError: a value of another kind than metadata has. UnknownNameError: an operator that does not exist.
    """
    parts: list[str] = []
    values: list[Any] = []
    for name, wanted in where.items():
        if not isinstance(name, str):
            raise UsageError(f"a filter has the name {name!r} and a string is expected; no row could match it")
        operators: Mapping[str, Any]
        if isinstance(wanted, Mapping):
            operators = wanted
        else:
            operators = {"in" if isinstance(wanted, list | tuple | set | frozenset) else "==": wanted}
        for operator, value in operators.items():
            if operator not in _OPERATORS:
                raise unknown_name("filter operator", operator, _OPERATORS)
            sql, parameters = _OPERATORS[operator](name, value)
            parts.append(sql)
            values += parameters
    return " AND ".join(parts) or "1", values


def parse_where(conditions: Sequence[str]) -> dict[str, Any]:
    """Filters as typed on a command line: NAME=VALUE, !=, <, <=, > and >=; VALUE is JSON, else text as it is.

    Raises:
        UsageError: no operator, or nothing before it.
    """
    where: dict[str, dict[str, Any]] = {}
    for condition in conditions:
        found = [(condition.find(sign), -len(sign), sign) for sign in ("!=", "<=", ">=", "=", "<", ">")]
        found = [place for place in found if place[0] > 0]
        if not found:
            raise UsageError(
                f"the filter {condition!r} has no operator and one like 'year>=2020' or 'folder=cats' is expected; "
                "it would match nothing, so write NAME, then =, !=, <, <=, > or >=, then the value"
            )
        at, _, sign = min(found)
        name, typed = condition[:at].strip(), condition[at + len(sign) :].strip()
        try:
            value = json.loads(typed)
        except ValueError:
            value = typed
        operator = {"=": "in" if isinstance(value, list) else "=="}.get(sign, sign)
        where.setdefault(name, {})[operator] = value
    return where


def _equal(name: str, value: Any) -> tuple[str, list[Any]]:
    _check_value(name, value)
    if value is None:
        return "row NOT IN (SELECT row FROM facts WHERE name = ?)", [name]
    return "row IN (SELECT row FROM facts WHERE name = ? AND value = ?)", [name, value]


def _unequal(name: str, value: Any) -> tuple[str, list[Any]]:
    sql, parameters = _equal(name, value)
    return f"NOT ({sql})", parameters


def _one_of(name: str, value: Any) -> tuple[str, list[Any]]:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise UsageError(f"the filter {name!r} is to be one of {value!r} and a list is expected; write [{value!r}]")
    parts = [_equal(name, one) for one in value]
    return f"({' OR '.join(sql for sql, _ in parts) or '0'})", [one for _, some in parts for one in some]


def _range(sign: str) -> Callable[[str, Any], tuple[str, list[Any]]]:
    def condition(name: str, value: Any) -> tuple[str, list[Any]]:
        _check_value(name, value)
        if value is None:
            raise UsageError(f"the filter {name!r} {sign} None has no meaning; compare with a number or a string")
        # sqlite puts every string above every number
        kind = "=" if isinstance(value, str) else "!="
        return (
            f"row IN (SELECT row FROM facts WHERE name = ? AND value {sign} ? AND typeof(value) {kind} 'text')",
            [name, value],
        )

    return condition


_OPERATORS: dict[str, Callable[[str, Any], tuple[str, list[Any]]]] = {
    "==": _equal,
    "!=": _unequal,
    "in": _one_of,
    **{sign: _range(sign) for sign in ("<", "<=", ">", ">=")},
}


def _check_value(name: str, value: object) -> None:
    fine = value is None or isinstance(value, bool)
    fine = fine or (isinstance(value, int) and -_INT64 <= value < _INT64)
    fine = fine or (isinstance(value, float) and math.isfinite(value))
    fine = fine or (isinstance(value, str) and _storable(value))
    if not fine:
        raise UsageError(
            f"{name!r} has the value {str(value)[:40]!r} ({type(value).__name__}) and metadata holds text, whole "
            "numbers of 64 bits, finite numbers, booleans and None; no filter could compare it, so store one of these"
        )


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
