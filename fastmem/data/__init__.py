"""Data sets: sequences as pure functions of a seed and an index, and their order in training."""

# Imported with the package, so that from_description knows every kind of set.
from fastmem.data import (
    array as array,
    joined as joined,
    repetition as repetition,
    structure as structure,
    text as text,
    uniform as uniform,
)
from fastmem.data.files import tokenfile as tokenfile
