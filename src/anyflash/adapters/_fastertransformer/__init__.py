"""What the adapter for FasterTransformer puts in place. Imports torch."""
