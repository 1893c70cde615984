"""``python -m dnpo.leaderboard``; see ``command.py``."""

from dnpo.leaderboard.command import main

if __name__ == "__main__":
    main()
