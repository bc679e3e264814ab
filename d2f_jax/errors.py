"""The exceptions that a program ends with in one line, each with its exit code."""


class InputError(ValueError):
    """Bad input, told in one line: what is wrong, where, and how to mend it.

    Programs print the line and exit with code 2; nothing half written is left behind.
    """


class SaveError(RuntimeError):
    """Something could not be written; what was written before is whole. Exit code 1."""


class Preempted(Exception):
    """The run was told to make room and has saved: the same command goes on. Exit code 75, as for `sysexits.h`."""
