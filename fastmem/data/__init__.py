"""Data sets: sequences as pure functions of a seed and an index, and their order in training."""

# from_description finds a kind of set among the classes that are loaded: all are, with the package.
from fastmem.data import repetition as repetition
from fastmem.data import structure as structure
from fastmem.data import uniform as uniform
from fastmem.data.files import tokenfile as tokenfile
