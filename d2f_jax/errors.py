"""The one exception that means: the user's input is wrong."""


class InputError(ValueError):
    """Bad input, told in one line: what is wrong, where, and how to mend it.

    Programs print the line and exit with code 2; nothing half written is left behind.
    """
