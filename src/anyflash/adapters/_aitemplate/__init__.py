"""What the adapter for AITemplate puts in place. Imports torch."""
