"""`python -m onbeat` is the `onbeat` command."""

import sys

from onbeat.cli import main

sys.exit(main())
