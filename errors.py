"""The one error type for a user's mistake.

Everything below may raise it; `cli.py` alone turns it into a line on stderr and exit code 2, and
so what the system refuses at a path. Any other exception is a fault of ours or of the machine and
rises with its traceback.
"""

import errno


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: value, rule, way out."""


def at_path(error: OSError) -> UserError:
    """What the system refused at a path, as the user's mistake; raises an error without a path.

    A full disk is refused without one.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{error.strerror}; make room where the output goes, and run again")
    if error.filename is None:
        raise error
    return UserError(f"{error.filename}: {error.strerror}; check this path, or name another")
