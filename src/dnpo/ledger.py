"""``python -m dnpo.ledger``: see :mod:`dnpo.commands.ledger`."""

from dnpo.commands.ledger import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
