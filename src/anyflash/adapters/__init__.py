"""L7: one file a system. Each puts anyflash behind that system's own attention door, and takes it away."""
