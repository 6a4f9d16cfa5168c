"""Write a calibrated model as an ONNX file for a runtime, and verify it on images."""

import sys

from vitq_ray.commands.main import export as main

if __name__ == "__main__":
    sys.exit(main())
