"""``python -m dnpo.leaderboard``: see :mod:`dnpo.commands.leaderboard`."""

from dnpo.commands.leaderboard import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
