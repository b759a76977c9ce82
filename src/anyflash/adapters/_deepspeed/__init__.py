"""The parts of the DeepSpeed adapter that import DeepSpeed; loaded by `install()`."""
