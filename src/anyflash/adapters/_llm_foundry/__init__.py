"""The part of the llm-foundry adapter that imports torch; loaded by `install()`."""
