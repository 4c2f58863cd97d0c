"""The one kind of error that the user can mend."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(Exception):
    """Input that cannot work; the message is one line that says what to do about it."""
