"""The commands of the console script `fastmem`."""
