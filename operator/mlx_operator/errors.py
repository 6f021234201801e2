"""Errors that end the process."""


class StartError(Exception):
    """The operator cannot work at all as it is installed; the text is one sentence for a person."""
