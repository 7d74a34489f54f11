"""The two errors that a user can do something about."""


class InputError(ValueError):
    """Something a user gave (an option, a config, a data set) is wrong. One line: the thing and the fix."""


class RunError(RuntimeError):
    """A run failed while it was running, for a reason that one line can say."""
