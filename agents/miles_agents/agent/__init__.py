"""The node agent: inventory, workers, services, ports, logs, and their death."""
