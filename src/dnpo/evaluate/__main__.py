"""``python -m dnpo.evaluate``; see ``command.py``."""

from dnpo.evaluate.command import main

if __name__ == "__main__":
    main()
