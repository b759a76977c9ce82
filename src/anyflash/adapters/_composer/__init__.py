"""The parts of the Composer adapter that import torch and Composer; loaded when they are asked for."""
