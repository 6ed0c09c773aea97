"""`python -m launchers.node_facts ATTEMPT`, as a conductor of an earlier version calls `launchers.job.node_facts`."""

import sys

from launchers.job.node_facts import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
