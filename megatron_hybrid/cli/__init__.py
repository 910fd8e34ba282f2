"""Command line: one module per command of `megatron-hybrid`, a table of them (table.py) and the dispatch (main.py)."""
