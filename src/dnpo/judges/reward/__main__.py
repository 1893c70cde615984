"""``python -m dnpo.judges.reward``: see :mod:`dnpo.commands.reward`."""

from dnpo.commands.reward import main

if __name__ == "__main__":
    main()
