"""``python -m dnpo.train``: see :mod:`dnpo.commands.train`."""

from dnpo.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
