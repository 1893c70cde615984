"""``python -m dnpo.judges.agreement``; see ``command.py``."""

from dnpo.judges.agreement.command import main

if __name__ == "__main__":
    main()
