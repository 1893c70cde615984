"""Judges that are asked in words, and the ledger of their answers."""
