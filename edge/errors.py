"""Errors a user can act on. Each message is one sentence: given, expected, consequence, remedy."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType


class PocketvlmError(Exception):
    """Base of every error that is the caller's to fix; the command line prints it without a traceback.

    exit_code: of the command line.
    """

    exit_code = 2


class UsageError(PocketvlmError, ValueError):
    """A value, name or combination that cannot work."""


class UnknownNameError(UsageError):
    """A name that is not registered; the message suggests the nearest ones."""


class BadSampleError(PocketvlmError, ValueError):
    """One image or caption that cannot be read; `reason` is a short stable key used for counting."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class IntegrityError(PocketvlmError, ValueError):
    """A file whose hash, width or identity does not match what its manifest says."""


class VersionError(PocketvlmError, ValueError):
    """A file written under a schema that this release cannot read."""


class MissingExtraError(PocketvlmError, ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for an unregistered `name` of `kind` ('student', 'recipe key', ...)."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(options)}."
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")


def counted(number: int, noun: str) -> str:
    """ "1 thread", "1,024 threads": of a noun whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of pocketvlm installs it.

    Raises:
        MissingExtraError: `module` (or its parent package) is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != top:
            raise
        raise _missing(top, extra) from error


def require_installed(packages: Iterable[str], extra: str) -> None:
    """Refuse before any work if one of the top-level `packages` is absent; imports none, as some take seconds.

    Raises:
        MissingExtraError: names the first that is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise _missing(package, extra)


def _missing(package: str, extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"this needs the package {package!r}, which the base install leaves out; "
        f"install it with: pip install 'pocketvlm[{extra}]'"
    )
