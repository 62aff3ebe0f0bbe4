"""``python -m miles_agents.agent``: started by the reaper."""

import sys

from miles_agents.agent.main import main

sys.exit(main())
