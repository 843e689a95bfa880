"""The one error type for a user's mistake.

Everything below may raise it; `cli.py` alone turns it into a line on stderr and exit code 2.
Any other exception is a fault of ours or of the machine and rises with its traceback.
"""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: value, rule, way out."""
