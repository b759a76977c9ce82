"""The parts of the xformers adapter that import xformers; loaded by `install()`."""
