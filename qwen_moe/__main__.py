"""`python -m qwen_moe` is the same as `qwen-moe`."""

import sys

from qwen_moe.cli import main

sys.exit(main())
