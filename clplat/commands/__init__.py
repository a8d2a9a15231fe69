"""One module per command: `configure(parser)` adds its arguments, `main(args)` runs it and returns the exit code.

A module with `TAKES_KEYS = True` is also given `args.keys`: the flags that are keys of a configuration.
"""
