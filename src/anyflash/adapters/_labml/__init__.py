"""The part of the labml.ai adapter that imports torch; loaded by `install()`."""
