"""The part of the MosaicBERT adapter that imports torch; loaded by `install()`."""
