"""The two errors that a user can do something about."""


class InputError(ValueError):
    """Something a user gave (an option, a config, a data set) is wrong. One line: the thing and the fix."""


class RunError(RuntimeError):
    """A run failed while it was running, for a reason that one line can say."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)
