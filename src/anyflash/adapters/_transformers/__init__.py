"""The parts of the transformers adapter that import torch and transformers; loaded by `install()`."""
