"""``python -m dnpo.judges.agreement``: see :mod:`dnpo.commands.agreement`."""

from dnpo.commands.agreement import main

if __name__ == "__main__":
    main()
