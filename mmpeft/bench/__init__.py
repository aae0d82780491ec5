"""A benchmark of methods, from a plan; nothing in mmpeft needs this."""
