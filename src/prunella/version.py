"""The version of Prunella."""

__version__ = "0.1.0.dev0"
