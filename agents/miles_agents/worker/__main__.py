"""``python -m miles_agents.worker``: started by the agent only."""

from miles_agents.worker.main import main

main()
