"""``afd`` and ``python -m afd``: takes Ctrl-C first, then imports what the command needs."""

from __future__ import annotations

from afd import process

TYPE_CHECKING = False  # as typing's, which would be imported before Ctrl-C is taken
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """The process's own command."""
    process.run(_asked, "afd")


def _asked() -> process.Work:
    import sys

    from afd.installation import apart

    apart()
    from afd import cli, process

    words = sys.argv[1:]
    if words[:1] in (["train"], ["evaluate"]) and "--help" not in words:
        process.sleep_if_busy()
    return cli.asked(words)


if __name__ == "__main__":
    main()
