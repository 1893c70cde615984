"""``python -m dnpo.store``: see :mod:`dnpo.commands.store`."""

from dnpo.commands.store import main

if __name__ == "__main__":
    main()
