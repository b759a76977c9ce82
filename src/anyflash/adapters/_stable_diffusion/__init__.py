"""The part of the Stable Diffusion adapter that imports torch; loaded by `install()`."""
