"""The two exceptions that a user of Chronotope meets."""


class ChronotopeError(ValueError):
    """Bad input: what was given, what was expected, what to do."""


class UnsupportedError(ChronotopeError):
    """A backend asked for by name cannot run this call; the message lists every reason."""
