"""``python -m dnpo``: see :mod:`dnpo.cli`."""

from dnpo.cli import main

if __name__ == "__main__":
    main()
