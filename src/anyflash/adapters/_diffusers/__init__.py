"""The part of the diffusers adapter that imports torch; loaded by `install()`."""
