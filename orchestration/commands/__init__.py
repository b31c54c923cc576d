"""Every command of `carrara`, and its arguments; what they do is elsewhere.

One parser (typer) for all of them, so that an option is spelled the same everywhere: --config, --local, --redo,
--seed, --guidance-scale, --steps, --precision, --out. Settings of the run's YAML are changed by `section.key=value`.
stages.py, runs.py, models.py and machines.py have a group of them each, options.py what they share; parser.py reads
the command line.
"""
