"""``python -m dnpo.export``: see :mod:`dnpo.commands.export`."""

from dnpo.commands.export import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
