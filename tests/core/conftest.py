"""Makes `synthetic`, the helpers of these tests, importable: importlib mode leaves their folder off sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
