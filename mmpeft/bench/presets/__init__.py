"""Plans that ``tools/bench.py`` knows by name."""
