"""Language models as judges, and the ledger of their answers."""
