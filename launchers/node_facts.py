"""`python -m launchers.node_facts ATTEMPT`: the name under which older conductors call `launchers.job.node_facts`."""

import sys

from launchers.job.node_facts import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
