"""The ledger of a run: its chain, its records, and what is read from them."""
