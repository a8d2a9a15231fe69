"""Importable as `clplat.streams` only: under the bare name a second copy of every class would exist."""

if __name__ == "streams":
    raise ImportError("the folder streams/ is not a package of its own: write `import clplat.streams`")
