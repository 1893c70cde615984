"""``python -m dnpo.evaluate``: see :mod:`dnpo.commands.evaluate`."""

from dnpo.commands.evaluate import main

if __name__ == "__main__":
    main()
