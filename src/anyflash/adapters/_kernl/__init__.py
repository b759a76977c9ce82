"""What the adapter for Kernl puts in place. Imports torch."""
