"""L0: what every layer stands on. Standard library only."""
