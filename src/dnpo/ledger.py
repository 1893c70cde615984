"""``python -m dnpo.ledger``: see :mod:`dnpo.judges.asked.ledger`."""

from dnpo.judges.asked.ledger import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
