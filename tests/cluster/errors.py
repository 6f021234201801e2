"""The one error of the local cluster: a sentence for the person who ran the command."""


class ClusterError(Exception):
    """Something about the local cluster that its user can act on.

    The message names what is wrong, where, and the remedy; the command line prints it without a traceback.
    """
