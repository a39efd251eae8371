"""`python -m formtune` does what `formtune` does, and finds your own classes in the working directory."""

import sys

from formtune.cli import main

sys.exit(main())
