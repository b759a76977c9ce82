"""The part of the adapter for Hazy Research's diffusers that imports torch; loaded by `install()`."""
