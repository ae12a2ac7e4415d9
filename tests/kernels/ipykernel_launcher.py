"""A notebook's kernel, where this folder is in PYTHONPATH: a fork of the process that
tests/preloaded.py starts"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    sys.path.append(str(Path(__file__).parents[1]))
    from stand_in import stand_in

    sys.path.pop()
    stand_in("kernel", sys.argv)
