"""The one exception a person is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: bad setting, bad file, plan that cannot work.

    The message is one line that says what is wrong and what to do about it. The command line prints it
    without a traceback and exits with code 2.
    """
