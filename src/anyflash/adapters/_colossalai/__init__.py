"""What the adapter for Colossal-AI puts in place. Imports torch."""
