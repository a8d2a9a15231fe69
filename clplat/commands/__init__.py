"""One module a command: `configure` gives it its arguments, `main` does it and returns the exit code.

A module with `TAKES_KEYS = True` is also given `args.keys`: the flags that are keys of a configuration. May import
everything but `cli`.
"""

COMMANDS = {
    "run": "run a configuration, or several of them under several seeds",
    "list": "strategies, streams, backbones, heads, metrics and experiments",
    "check": "the conformance suite on a strategy or a stream, a third party's too",
    "new": "write a strategy or a stream that runs and passes, to change it",
    "cp": "copy a shipped experiment, to change it",
    "validate": "report all faults of a configuration at once",
    "sweep": "search hyper-parameters; any number of workers may join",
    "record": "train SAC in an environment, and make data sets of what it does there",
    "forget": "ask the learner of a finished run to erase something",
    "export": "the network of a run in the formats of others",
    "report": "compare runs: tables and plots in one HTML file",
    "dashboard": "strategies over streams on one page: served on this machine, or one file",
    "ui": "the MLflow server on the local store",
    "completion": "print a completion script for bash or zsh",
}
