"""The two kinds of errors that a user can fix."""


class InputError(ValueError):
    """The user's input (an option, a config, a data set) is wrong. One line names it and the fix."""


class RunError(RuntimeError):
    """A run failed while running. One line names the reason and the fix."""
