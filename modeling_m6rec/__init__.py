"""m6rec: the open M6-Rec."""

from .version import __version__

__all__ = ["__version__"]
