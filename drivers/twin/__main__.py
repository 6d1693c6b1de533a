"""`python -m onbeat.drivers.twin`: see serve.py."""

import sys

from onbeat.drivers.twin.serve import main

if __name__ == "__main__":
    sys.exit(main())
