"""The command line, and the ways to start agents on hosts."""
