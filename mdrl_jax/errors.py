"""The one exception for errors that a user can put right: wrong flags, files, config values or data."""


class UserError(Exception):
    """Says in one line what is wrong and what would be right; the command prints the line and exits with status 2."""
