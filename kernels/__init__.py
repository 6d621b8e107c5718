"""Triton kernels, and plain PyTorch to judge them by. Imports torch and triton only."""

if __name__ == "kernels":
    # In the root of a clone Python finds this folder before the published package `kernels`, which
    # transformers and diffusers look for: load the published package, or be an empty package.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _elsewhere = [path for path in sys.path if Path(path).resolve() != _root]
    if (_spec := PathFinder.find_spec("kernels", _elsewhere)) and _spec.loader:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        __path__ = []
        __file__ = None  # type: ignore[assignment]  # transformers: this is not installed
