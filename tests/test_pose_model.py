from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from marked_person import MarkerModel, expected_pose, picture

from liftbyimage import models
from liftbyimage.data.pose_file import joints_box
from liftbyimage.pose_model import (
    find_pose,
    find_poses,
    largest_box,
    load_detector,
    load_pose_model,
    where_to_look,
)

AT = (100, 40)
EVERYWHERE = [-0.5, -0.5, 239.5, 199.5]


def _refused(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("box", [EVERYWHERE, [90, 30, 190, 170]])
def test_finds_the_joints_through_any_box(box: list[float]) -> None:
    pose = find_pose(MarkerModel(), picture(AT), box)
    assert pose is not None
    np.testing.assert_allclose(pose.keypoints, expected_pose(AT), atol=3)
    assert pose.confidence is not None
    assert (pose.confidence > 0.2).all()
    np.testing.assert_array_equal(pose.box, joints_box(pose.keypoints))


def test_the_box_is_that_of_the_confident_joints() -> None:
    def one_far_away(images: torch.Tensor) -> torch.Tensor:
        heatmaps = MarkerModel()(images)
        heatmaps[:, 9] = 0  # the left wrist: a peak too low to be believed, in the crop's corner
        heatmaps[:, 9, 0, 0] = 0.1
        return heatmaps

    pose = find_pose(one_far_away, picture(AT), EVERYWHERE)
    assert pose is not None
    wrist = 13  # Human3.6M
    assert pose.confidence[wrist] == pytest.approx(0.1)
    assert (pose.keypoints[wrist] < 0).all()
    np.testing.assert_array_equal(pose.box, joints_box(np.delete(pose.keypoints, wrist, axis=0)))


def test_sees_nobody() -> None:
    assert find_pose(MarkerModel(), picture(None), EVERYWHERE) is None

    def broken(images: torch.Tensor) -> torch.Tensor:
        heatmaps = MarkerModel()(images)
        heatmaps[:, 3] = torch.nan
        return heatmaps

    def in_one_place(images: torch.Tensor) -> torch.Tensor:
        heatmaps = torch.zeros(1, 17, 64, 48)
        heatmaps[:, :, 30, 20] = 1
        return heatmaps

    def few_joints(images: torch.Tensor) -> torch.Tensor:
        heatmaps = MarkerModel()(images)
        heatmaps[:, 7:] = 0
        return heatmaps

    for model in (broken, in_one_place, few_joints):
        assert find_pose(model, picture(AT), EVERYWHERE) is None


def test_poses_of_pictures(tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, at in zip(paths, (AT, (20, 60)), strict=True):
        assert cv2.imwrite(str(path), picture(at)[..., ::-1])
    poses = find_poses(MarkerModel(), paths)
    assert list(poses) == [str(path) for path in paths]
    np.testing.assert_allclose(poses[str(paths[1])].keypoints, expected_pose((20, 60)), atol=3)
    looked: list[np.ndarray] = []

    def detect(image: np.ndarray) -> list[list[float]]:
        looked.append(image)
        return [[0, 0, 5, 5], [90, 30, 190, 170]]

    by_detector = find_poses(MarkerModel(), paths[:1], detect=detect)
    np.testing.assert_array_equal(looked[0], picture(AT))  # RGB, the whole picture
    by_box = find_poses(MarkerModel(), paths[:1], box=[90, 30, 190, 170])
    np.testing.assert_array_equal(by_detector[str(paths[0])].keypoints, by_box[str(paths[0])].keypoints)
    with pytest.raises(TypeError, match=r"^find_poses: images must be several files, got one: a\.jpg$"):
        find_poses(MarkerModel(), "a.jpg")
    with _refused(f"image {paths[0]}: the detector found nobody in it"):
        find_poses(MarkerModel(), paths, detect=lambda image: [])
    with _refused(f"image {paths[0]}: the pose model saw nobody in it"):
        find_poses(MarkerModel(), paths, box=[0, 0, 20, 20])


def test_where_to_look() -> None:
    image = picture(None)
    np.testing.assert_array_equal(where_to_look(image), EVERYWHERE)
    np.testing.assert_array_equal(where_to_look(image, [1, 2, 3, 4]), [1, 2, 3, 4])
    assert where_to_look(image, detect=lambda image: np.empty((0, 4))) is None


def test_largest_box() -> None:
    boxes = [[0, 0, 10, 10], [5, 5, 25, 15], [50, 0, 70, 10]]
    assert largest_box(boxes).tolist() == boxes[1]
    assert largest_box([]) is None
    with _refused("detector: boxes must be [N, 4] (x0, y0, x1, y1), got [4]"):
        largest_box([0, 0, 1, 1])
    with _refused("detector: boxes must be finite with x0 < x1 and y0 < y1, got [[0.0, 0.0, 1.0, 0.0]]"):
        largest_box([[0, 0, 1, 0]])
    with _refused("detector: boxes must be finite with x0 < x1 and y0 < y1, got [[0.0, 0.0, nan, 1.0]]"):
        largest_box([[0, 0, float("nan"), 1]])


@pytest.mark.parametrize(
    ("boxes", "got"),
    [
        (None, "None"),
        ({"boxes": []}, "{'boxes': []}"),
        ([[0, 0, 1, 1], [2, 3]], "[[0, 0, 1, 1], [2, 3]]"),
        ("none", "'none'"),
        ([["0", "0", "1", "1"]], "[['0', '0', '1', '1']]"),
    ],
)
def test_boxes_that_are_no_numbers(boxes: Any, got: str) -> None:
    with _refused(f"detector: boxes must be [N, 4] numbers, got {got}"):
        largest_box(boxes)


def test_heatmaps_of_another_kind() -> None:
    message = (
        "pose model: heatmaps must be [1, 17, 64, 48], got [1, 16, 64, 48]; "
        "a model of another input size, skeleton or kind of output cannot serve"
    )
    with _refused(message):
        find_pose(lambda images: torch.zeros(1, 16, 64, 48), picture(AT), EVERYWHERE)
    with pytest.raises(TypeError, match=r"^pose model: heatmaps must be a torch\.Tensor, got ndarray$"):
        find_pose(lambda images: np.zeros((1, 17, 64, 48)), picture(AT), EVERYWHERE)  # type: ignore[arg-type,return-value]
    with _refused("find_pose: box must be [4] (x0, y0, x1, y1), got [1, 4]"):
        find_pose(MarkerModel(), picture(AT), [EVERYWHERE])


def test_detector_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_detector_of_people.py").write_text("number = 3\ndef detect(image):\n    return [[0, 0, 1, 1]]\n")
    assert load_detector("my_detector_of_people:detect")(picture(None)) == [[0, 0, 1, 1]]
    with _refused("detector my_detector_of_people: expected package.module:function"):
        load_detector("my_detector_of_people")
    with _refused("detector my_detector_of_people:number: my_detector_of_people has no function number"):
        load_detector("my_detector_of_people:number")
    with _refused("detector nowhere_at_all:detect: no module named nowhere_at_all"):
        load_detector("nowhere_at_all:detect")
    with _refused("detector my_detector_of_people.part:detect: no module named my_detector_of_people.part"):
        load_detector("my_detector_of_people.part:detect")
    for name in (".my_detector_of_people:detect", "my_detector_of_people.:detect", ":detect"):
        with _refused(f"detector {name}: expected package.module:function"):
            load_detector(name)


def test_a_detector_that_lacks_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "finder_without_library.py").write_text("import nowhere_at_all\n")
    with _refused(
        "detector finder_without_library:detect: finder_without_library cannot be imported: "
        "No module named 'nowhere_at_all'"
    ):
        load_detector("finder_without_library:detect")
    (tmp_path / "finder_with_old_library.py").write_text("from this_finder_library import nothing\n")
    (tmp_path / "this_finder_library.py").write_text("")
    with _refused(
        "detector finder_with_old_library:detect: finder_with_old_library cannot be imported: "
        f"cannot import name 'nothing' from 'this_finder_library' ({tmp_path / 'this_finder_library.py'})"
    ):
        load_detector("finder_with_old_library:detect")


def test_official_hrnet_weights(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = models.hrnet_w32().eval()
    path = tmp_path / "pose_hrnet_w32_256x192.pth"
    torch.save(network.state_dict(), path)
    model = load_pose_model(path)
    images = torch.randn(1, 3, 256, 192)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), network(images, ("heatmaps",))["heatmaps"], rtol=0, atol=0)


def test_files_that_are_no_pose_model(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with _refused(f"pose model {path}: no such file"):
        load_pose_model(path)
    path.write_bytes(b"text")
    with _refused(f"pose model {path}: not a readable PyTorch file of plain tensors"):
        load_pose_model(path)
    torch.save({"a": torch.zeros(1)}, path)
    message = (
        f"pose model {path}: expected official HRNet pose weights with final_layer.weight "
        "[joints, width, 1, 1], got no such tensor"
    )
    with _refused(message):
        load_pose_model(path)


class _Session:
    """Stands in for onnxruntime.InferenceSession."""

    inputs = [types.SimpleNamespace(name="pixels", type="tensor(float)", shape=["batch", 3, 256, 192])]

    def __init__(self, path: str, providers: list[str]) -> None:
        assert providers == ["CPUExecutionProvider"]
        if Path(path).read_bytes() == b"torn":
            raise RuntimeError("Protobuf parsing failed.")

    def get_inputs(self) -> list[Any]:
        return self.inputs

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        [(name, images)] = feed.items()
        assert name == "pixels"
        return [MarkerModel()(torch.from_numpy(images)).numpy(), np.zeros(3)]


@pytest.fixture
def onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runtime = types.ModuleType("onnxruntime")
    runtime.InferenceSession = _Session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    path = tmp_path / "pose.ONNX"
    path.write_bytes(b"whole")
    return path


def test_onnx_model_on_a_stand_in_runtime(onnx_file: Path) -> None:
    pose = find_pose(load_pose_model(onnx_file), picture(AT), EVERYWHERE)
    expected = find_pose(MarkerModel(), picture(AT), EVERYWHERE)
    np.testing.assert_array_equal(pose.keypoints, expected.keypoints)
    np.testing.assert_array_equal(pose.confidence, expected.confidence)


def test_onnx_models_that_do_not_serve(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*inputs: tuple[str, list[Any]]) -> None:
        wrapped = [types.SimpleNamespace(name="x", type=kind, shape=shape) for kind, shape in inputs]
        monkeypatch.setattr(_Session, "inputs", wrapped)

    wanted = f"pose model {onnx_file}: must take one input tensor(float) [1, 3, 256, 192], got "
    of(("tensor(float)", [1, 3, 384, 288]))
    with _refused(wanted + "tensor(float) [1, 3, 384, 288]"):
        load_pose_model(onnx_file)
    of(("tensor(float16)", [1, 3, 256, 192]))
    with _refused(wanted + "tensor(float16) [1, 3, 256, 192]"):
        load_pose_model(onnx_file)
    of(("tensor(float)", [1, 3, 256, 192]), ("tensor(int64)", [1]))
    with _refused(wanted + "tensor(float) [1, 3, 256, 192], tensor(int64) [1]"):
        load_pose_model(onnx_file)
    onnx_file.write_bytes(b"torn")
    with _refused(f"pose model {onnx_file}: not an ONNX model that onnxruntime can load"):
        load_pose_model(onnx_file)


def test_without_onnxruntime(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with _refused(f"pose model {onnx_file}: needs onnxruntime: pip install onnxruntime"):
        load_pose_model(onnx_file)


def test_a_real_onnx_model(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    pytest.importorskip("onnxruntime", reason="the optional extra [onnx] is not installed")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(17, 3, 1, 1)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["pixels"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
            helper.make_node("Conv", ["pooled", "weight"], ["heatmaps"]),
        ],
        "pose",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 256, 192])],
        [helper.make_tensor_value_info("heatmaps", TensorProto.FLOAT, ["batch", 17, 64, 48])],
        [numpy_helper.from_array(weight, "weight")],
    )
    path = tmp_path / "pose.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    torch.manual_seed(0)
    images = torch.randn(1, 3, 256, 192)
    pooled = torch.nn.functional.avg_pool2d(images, 4)
    expected = torch.nn.functional.conv2d(pooled, torch.from_numpy(weight))
    torch.testing.assert_close(load_pose_model(path)(images), expected)
    pose = find_pose(load_pose_model(path), picture(AT), EVERYWHERE)
    assert pose is None or np.isfinite(pose.keypoints).all()
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(path.read_bytes()[:40])
    with _refused(f"pose model {torn}: not an ONNX model that onnxruntime can load"):
        load_pose_model(torn)
