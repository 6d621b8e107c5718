"""python -m fastmem: the console script."""

from fastmem.cli.main import command

if __name__ == "__main__":
    command()
