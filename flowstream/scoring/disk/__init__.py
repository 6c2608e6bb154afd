"""The loss cache's file: an LMDB environment, what stands in it, and its upkeep."""
