"""``python -m miles_agents.worker [--zygote FD [MODULE...]]``: started by the agent only."""

import sys

if sys.argv[1:2] == ["--zygote"]:
    from miles_agents.worker.zygote import serve

    # Returns in the children, whose stack is then as shallow as if they had been executed.
    birth = serve(int(sys.argv[2]), sys.argv[3:])
    from miles_agents.worker.main import run

    run(birth)
else:
    from miles_agents.worker.main import main

    main()
