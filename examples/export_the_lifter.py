"""torch.export and ONNX of the lifter, for other runtimes: through its plain PyTorch twin with the same weights.

The fused ops are this library's; another runtime has its own. Prints how far ONNX Runtime's poses are from the fused
lifter's, for batches of two sizes from one file. Needs `pip install onnx onnxscript onnxruntime`.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch

from liftbyimage.models import LiftByImage, LiftByImageConfig
from liftbyimage.reference import ReferenceLiftByImage

CONFIG = LiftByImageConfig(image_channels=8, grid=(8, 6), dim=32, heads=4)


def main() -> None:
    torch.manual_seed(0)
    lifter = LiftByImage(CONFIG).eval()
    plain = ReferenceLiftByImage(lifter.config, lifter.positions).eval()
    plain.load_state_dict(lifter.state_dict())
    example = torch.randn(2, 8, 8, 6), torch.rand(2, 17, 2) * 2 - 1  # features, pose_2d
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(plain, example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.testing.assert_close(program.module()(*example)[0], plain(*example)[0])
    print("torch.export: the program's poses equal the module's.")

    names = ["pose_3d", "coarse_pose_3d", "importance", "index"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lifter.onnx"
        torch.onnx.export(program, (), path, input_names=["features", "pose_2d"], output_names=names, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [node.name for node in session.get_inputs()]
    for size in (2, 5):
        given = torch.randn(size, 8, 8, 6), torch.rand(size, 17, 2) * 2 - 1
        with torch.no_grad():
            ours = lifter(*given).pose_3d
        theirs = session.run(None, {name: value.numpy() for name, value in zip(inputs, given, strict=True)})
        difference = (ours - torch.from_numpy(theirs[0])).abs().max().item()
        assert difference < 1e-4, difference
        print(f"ONNX Runtime, batch {size}: poses within {1000 * difference:.4f} mm of the fused lifter's.")


if __name__ == "__main__":
    main()
