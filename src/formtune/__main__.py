"""`python -m formtune` does what `formtune` does, and finds custom classes in the working directory."""

import sys

from formtune.cli import main

sys.exit(main())
