"""The grid of a text sweep: models × sizes × seeds on samples of a prepared corpus."""

CORPUS, REFERENCE, UNIFORM = "corpus", "reference", "uniform"
"""Folders of a text sweep beside its rows."""
STUDY = "text-study.json"
"""Where the codes of a text sweep are; a folder with it is a text sweep."""
