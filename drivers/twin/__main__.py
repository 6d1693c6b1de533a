"""`python -m onbeat.drivers.twin`: see serve.py. A missing simulator is told in a line of JSON, as any other fault."""

import json
import sys

try:
    from onbeat.drivers.twin.serve import main
except ModuleNotFoundError as missing:
    if missing.name != "mujoco":
        raise
    print(json.dumps({"error": "the simulator is not installed: run `pip install 'onbeat[sim]'`"}), flush=True)
    sys.exit(1)

if __name__ == "__main__":
    sys.exit(main())
