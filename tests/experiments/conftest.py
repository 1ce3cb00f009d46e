"""What all tests of experiments run in."""

from one_thread import one_thread  # noqa: F401  (a fixture)
