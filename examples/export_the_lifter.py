"""torch.export and ONNX of the lifter, for other runtimes: through its plain PyTorch twin with the same weights.

The fused ops are this library's; another runtime has its own. Prints how far ONNX Runtime's poses are from the fused
lifter's, from feature maps and from images, for batches of two sizes from one file each. Needs
`pip install onnx onnxscript onnxruntime`.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from liftbyimage.models import LiftByImage, LiftByImageConfig, TinyEncoder
from liftbyimage.reference import ReferenceLiftByImage


class ImageToPose(nn.Module):
    """An encoder and a lifter, fused or plain, as one module."""

    def __init__(self, encoder: TinyEncoder, lifter: nn.Module) -> None:
        super().__init__()
        self.encoder, self.lifter = encoder, lifter

    def forward(self, image: Tensor, pose_2d: Tensor) -> tuple[Tensor]:
        """image [B, 3, 256, 192], pose_2d [B, J, 2] → (pose [B, J, 3],)"""
        return (self.lifter(self.encoder.features(image), pose_2d)[0],)


def plain_twin(lifter: LiftByImage) -> ReferenceLiftByImage:
    plain = ReferenceLiftByImage(lifter.config, lifter.positions).eval()
    plain.load_state_dict(lifter.state_dict())
    return plain


def export_and_compare(source: str, fused: nn.Module, plain: nn.Module, shape: tuple[int, ...]) -> None:
    """One file from `plain`; its poses beside those of `fused`. shape: of one feature map or image."""

    def draw(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, *shape), torch.rand(size, 17, 2) * 2 - 1

    example, batch = draw(2), torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(plain, example, dynamic_shapes=({0: batch}, {0: batch}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lifter.onnx"
        torch.onnx.export(program, (), path, input_names=[source, "pose_2d"], verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = [node.name for node in session.get_inputs()]
    for size in (2, 5):
        given = draw(size)
        with torch.no_grad():
            ours, exported = fused(*given)[0], program.module()(*given)[0]
            torch.testing.assert_close(exported, plain(*given)[0])
        theirs = session.run(None, {name: value.numpy() for name, value in zip(inputs, given, strict=True)})[0]
        difference = (ours - torch.from_numpy(theirs)).abs().max().item()
        assert difference < 1e-4, difference
        print(f"From {source}, batch {size}: ONNX Runtime within {1000 * difference:.4f} mm of the fused lifter.")


def main() -> None:
    torch.manual_seed(0)
    lifter = LiftByImage(LiftByImageConfig(image_channels=8, grid=(8, 6), dim=32, heads=4)).eval()
    export_and_compare("features", lifter, plain_twin(lifter), (8, 8, 6))

    encoder = TinyEncoder().eval()
    lifter = LiftByImage(LiftByImageConfig(image_channels=encoder.channels, dim=32, heads=4)).eval()
    fused, plain = ImageToPose(encoder, lifter).eval(), ImageToPose(encoder, plain_twin(lifter)).eval()
    export_and_compare("image", fused, plain, (3, 256, 192))
    print("torch.export: the programs' poses equal their modules'.")


if __name__ == "__main__":
    main()
