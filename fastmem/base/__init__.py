"""Checks of arguments, files written whole, intervals, the terminal, the lock of a folder."""
