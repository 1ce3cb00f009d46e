"""The version, in one place: read by setuptools when building and by `afd.__version__` when running."""

__version__ = "0.1.0"
