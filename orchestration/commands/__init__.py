"""Every command of `carrara`, and its arguments; what they do is elsewhere.

One parser (typer) for all of them, so that an option is spelled the same everywhere: --config, --local, --redo,
--seed, --guidance-scale, --steps, --precision, --out. Settings of the run's YAML are changed by `section.key=value`.
A file for each group that `carrara --help` shows; options.py has what they share, parser.py reads the command line.
"""
