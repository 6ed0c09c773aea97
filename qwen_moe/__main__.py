"""`python -m qwen_moe`: the same as `qwen-moe`."""

import sys

from qwen_moe.cli import main

sys.exit(main())
