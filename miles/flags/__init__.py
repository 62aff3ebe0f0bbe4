"""The flags: one table as data, the parser made from it, and the resolution of a command line into a plain config."""
