"""``python -m dnpo.report``: see :mod:`dnpo.commands.report`."""

from dnpo.commands.report import main

if __name__ == "__main__":
    main()
