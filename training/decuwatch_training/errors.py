"""The one exception that the command line prints without a traceback."""


class TrainingError(Exception):
    """Something the user can mend: the message names the file or argument and what was expected of it."""
