"""The part of the OpenFold adapter that imports torch; loaded by `install()`."""
