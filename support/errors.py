"""The exceptions that a command reports in one line, see ``command.run``."""


class InputError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


class Stopped(BaseException):
    """SIGTERM arrived. Not an Exception, so that no ``except Exception`` swallows it."""
