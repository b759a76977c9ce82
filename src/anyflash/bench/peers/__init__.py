"""One file a package whose attention ours is compared with; `PEERS` in it lists its ways to compute one."""
