"""liftbyimage: fused, exact kernels and models for image-guided 3D human pose lifting.

`import liftbyimage.ops` gives the operations, `liftbyimage.nn` the layers, `liftbyimage.models` whole lifters.
"""

__version__ = "0.1.0"
