"""Parts of the PyTorch adapter, one door a file."""
