"""The one exception for anything a user can put right: bad flags, files, config values, data."""


class UserError(Exception):
    """Says in one line what was wrong and what would be right; the command prints it and exits 2."""
