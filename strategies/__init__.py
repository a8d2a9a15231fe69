"""Importable as `clplat.strategies` only: under the bare name a second copy of every class would exist."""

if __name__ == "strategies":
    raise ImportError("the folder strategies/ is not a package of its own: write `import clplat.strategies`")
