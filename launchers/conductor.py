"""`python -m launchers.conductor`, as batch scripts of earlier versions call `launchers.job.conductor`.

A job runs the code that lies there when it starts, with the script and the launch.json that it was submitted with: one that
waits in the queue over an upgrade, or is requeued after it, comes here. Such a launch.json does not say what to start.
"""

import sys

from launchers.job.conductor import main

BEFORE = {
    "agent": "qwen_moe.launch.agent",
    "packages": ["qwen_moe", "parallel", "launchers", "scaling_laws"],
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], BEFORE))
