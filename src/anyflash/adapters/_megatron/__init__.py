"""The part of the Megatron adapter that imports Megatron; loaded by `install()`."""
