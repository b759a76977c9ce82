"""One file a system. Importing one imports no framework; `build` does."""
