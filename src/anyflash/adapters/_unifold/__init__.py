"""The parts of the Uni-Fold adapter that import torch; loaded by `install()`."""
