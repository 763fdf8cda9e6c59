"""The one exception that reaches a user as a single message instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can mend: a field, a file or a command.

    The message names the field or file, what was found, what was expected and what to do. Commands
    print it without a traceback and leave with exit code 2.
    """


class RankError(UserError):
    """A UserError of one rank alone, which has to say it: the others know nothing of it."""


class SaveError(UserError):
    """A checkpoint could not be written, which every rank knows; training itself can go on."""


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Puts the configuration's field in front of what is wrong with the data that it names."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
