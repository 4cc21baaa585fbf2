"""What can go wrong in the store. The only question a class answers: would trying again help?

StorageError
├── InvalidName     a key, file name, url or record that we refuse to use  no
├── NotFound        the object is not there                                no
├── AccessDenied    the store refused our credentials or this operation    no, not before a person acts
├── Unavailable     timeout, 5xx, reset, disk full: outcome unknown        yes
├── Corrupt         bytes differ from the digest that their record states  no; use an earlier checkpoint
└── Fenced          the log has moved on: this writer may not append       no; stop
"""


class StorageError(Exception):
    """Anything this package raises on purpose."""


class InvalidName(StorageError):
    """A key, file name, url or record that is refused before anything is read or written."""


class NotFound(StorageError):
    """The object does not exist."""


class AccessDenied(StorageError):
    """The store understood the request and refused it."""


class Unavailable(StorageError):
    """The store did not answer, or answered that it cannot now. A write may or may not have happened."""


class Corrupt(StorageError):
    """Stored bytes differ from what their record promises."""


class Fenced(StorageError):
    """The log does not admit this record any more: a newer attempt, or the end of the run, came first."""
