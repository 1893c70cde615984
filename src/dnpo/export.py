"""``python -m dnpo.export``: see :mod:`dnpo.running.export`."""

from dnpo.running.export import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
