"""`python -m launchers.conductor`: the name under which batch scripts of earlier versions call `launchers.job.conductor`.

A job runs the code that is installed when it starts, but with the script and launch.json of its submission. So a job that
was queued before an upgrade, or is requeued after it, calls this module. Such a launch.json does not name the agent.
"""

import sys

from launchers.job.conductor import main

BEFORE = {
    "agent": "qwen_moe.launch.agent",
    "packages": ["qwen_moe", "parallel", "launchers", "scaling_laws"],
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], BEFORE))
