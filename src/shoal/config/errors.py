"""The one exception a person is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: bad setting, bad file, plan that cannot work.

    The message is one line that says what is wrong and what to do about it. The command line prints it
    without a traceback and exits with code 2.
    """


def require_at_least_one(options: object, *names: str) -> None:
    """Raise `UserError` on the first of these options of a command that is less than 1; None is not."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
