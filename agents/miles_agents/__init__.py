"""What runs on a node: wire protocol, actor host, node agent, process hygiene.

Nothing in this package imports torch; nothing in it imports the packages above it.
"""
