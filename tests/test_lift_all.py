"""Bulk lifting: shards, resuming by what is there, several machines, and the lifter in Ray Data."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from few_people import FewPeople, small_pipeline
from torch.utils.data import default_collate
from typer.testing import CliRunner, Result

from liftbyimage import checkpoint, cli, lift_all
from liftbyimage.batches import make_batch
from liftbyimage.checkpoint import load_pipeline
from liftbyimage.data.crop import apply_affine
from liftbyimage.data.pictures import PicturePeople
from liftbyimage.data.source import SOURCES, CorruptRecord, open_source
from liftbyimage.lift import lift_images
from liftbyimage.lift_all import BatchLifter, Lifted, load_shards
from liftbyimage.predict import predict

COUNT, SHARD = 11, 4  # shards of 4, 4 and 3 records
NAMES = [f"shard-0000{number}-of-00003.npz" for number in range(3)]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def _save(path: Path, name: str = "lift-by-image", shift: float = 0.0) -> Path:
    pipeline = small_pipeline(name)
    if shift:
        pipeline.lifter.pose_embed.bias.data += shift
    encoder = {"encoder": "tiny", "encoder_config": {"channels": 8}} if pipeline.encoder else {"encoder": None}
    checkpoint.save_pipeline(pipeline, path, **encoder)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("checkpoint") / "small.pt")


def _lift(source: FewPeople, out: Path, saved: Path, **options: Any) -> Lifted:
    return lift_all.lift_all(source, out, BatchLifter(saved), **{"shard_size": SHARD, "batch_size": 3, **options})


def _files(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def _assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, theirs[name], err_msg=name, **CLOSE)
        else:
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)


def test_shards_hold_what_the_pipeline_makes_of_the_records(saved: Path, tmp_path: Path) -> None:
    source, out = FewPeople(COUNT), tmp_path / "out"
    counts: list[tuple[int, int]] = []
    lifted = _lift(source, out, saved, on_batch=lambda *count: counts.append(count))
    assert lifted == Lifted(done=3, present=0, others=0, problems=0)
    assert counts == [(3, 11), (1, 11), (3, 11), (1, 11), (3, 11)]
    assert sorted(_files(out)) == [*NAMES, "source.json"]
    shards = load_shards(out)
    assert all(values.shape[0] == COUNT for values in shards.values())
    pipeline = load_pipeline(saved)
    records = default_collate([source[index] for index in range(COUNT)])
    expected = predict(pipeline, make_batch(pipeline.lifter, records))
    np.testing.assert_allclose(shards["pose_3d_lifted"], expected.pose_3d, **CLOSE)
    np.testing.assert_allclose(shards["coarse_pose_3d_lifted"], expected.coarse_pose_3d, **CLOSE)
    assert shards["pose_3d_lifted"].dtype == np.float32 and expected.pose_3d.std() > 0.01
    for name in ("keypoints", "crop_matrix", "image_size", "pose_3d"):
        np.testing.assert_array_equal(shards[name], source.columns[name])
        assert shards[name].dtype == source.columns[name].dtype
    assert shards["index"].tolist() == list(range(COUNT)) and shards["group"].tolist() == [i % 3 for i in range(COUNT)]
    assert set(shards["problem"]) == {""} and "image" not in shards and "mask" not in shards
    with np.load(out / NAMES[2], allow_pickle=False) as arrays:
        assert arrays["index"].tolist() == [8, 9, 10]
    said = json.loads((out / "source.json").read_text(encoding="utf-8"))
    assert said["source"] == {"source": "few", "count": COUNT, "seed": 0, "size": [64, 48]}
    assert (said["records"], said["shard_size"], said["groups"]) == (11, 4, ["walking", "sitting", "eating"])


def test_only_a_missing_shard_is_made_again(saved: Path, tmp_path: Path) -> None:
    source = FewPeople(COUNT)
    _lift(source, tmp_path, saved)
    before, shards = _files(tmp_path), load_shards(tmp_path)
    assert _lift(source, tmp_path, saved) == Lifted(0, 3, 0, 0)
    assert _files(tmp_path) == before
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(ValueError) as error:
        load_shards(tmp_path)
    assert str(error.value) == (
        f"folder {tmp_path}: 1 of 3 shards are missing, the first {NAMES[1]}; lift-all again makes them"
    )
    assert _lift(source, tmp_path, saved) == Lifted(1, 2, 0, 0)
    changed = {name for name, written in _files(tmp_path).items() if written != before[name]}
    assert changed == {NAMES[1]}
    _assert_same(load_shards(tmp_path), shards)


def test_two_parts_make_the_whole(saved: Path, tmp_path: Path) -> None:
    source = FewPeople(COUNT)
    _lift(source, tmp_path / "whole", saved)
    assert _lift(source, tmp_path / "parts", saved, part=(1, 2)) == Lifted(1, 0, 2, 0)
    assert sorted(_files(tmp_path / "parts")) == [NAMES[1], "source.json"]
    assert _lift(source, tmp_path / "parts", saved, part=(0, 2), batch_size=2, workers=1) == Lifted(2, 0, 1, 0)
    _assert_same(load_shards(tmp_path / "parts"), load_shards(tmp_path / "whole"))
    assert _lift(source, tmp_path / "whole", saved, part=(4, 5)) == Lifted(0, 0, 3, 0)


def test_records_that_cannot_be_read_keep_their_place(saved: Path, tmp_path: Path) -> None:
    corrupt = (0, 4, 5, 6, 7)  # all of the second shard
    assert _lift(FewPeople(COUNT), tmp_path / "whole", saved).problems == 0
    whole = load_shards(tmp_path / "whole")
    assert _lift(FewPeople(COUNT, corrupt=corrupt), tmp_path / "out", saved) == Lifted(3, 0, 0, problems=5)
    shards = load_shards(tmp_path / "out")
    readable = [index for index in range(COUNT) if index not in corrupt]
    problems = [f"image {i}.jpg: not an image that OpenCV can read" if i in corrupt else "" for i in range(COUNT)]
    assert shards["problem"].tolist() == problems
    assert shards["index"].tolist() == list(range(COUNT))
    for name, values in shards.items():
        if values.dtype.kind == "f":
            assert np.isnan(values[list(corrupt)]).all(), name
            np.testing.assert_allclose(values[readable], whole[name][readable], **CLOSE)
    assert (shards["group"][list(corrupt)] == -1).all()


def test_strict_stops_at_the_first_record_that_cannot_be_read(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptRecord, match=r"^image 5\.jpg: not an image that OpenCV can read$"):
        _lift(FewPeople(COUNT, corrupt=(5, 6)), tmp_path, saved, strict=True)
    assert sorted(_files(tmp_path)) == ["shard-00000-of-00003.npz", "source.json"]


def test_nothing_is_half_written_when_a_run_breaks_off(saved: Path, tmp_path: Path) -> None:
    class Torn(FewPeople):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 6:
                raise RuntimeError("the power is out")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="the power is out"):
        _lift(Torn(COUNT), tmp_path, saved)
    assert sorted(_files(tmp_path)) == [NAMES[0], "source.json"]
    assert _lift(FewPeople(COUNT), tmp_path, saved) == Lifted(2, 1, 0, 0)
    assert load_shards(tmp_path)["index"].tolist() == list(range(COUNT))


def test_a_full_disk_leaves_no_shard(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        _lift(FewPeople(COUNT), tmp_path, saved)
    assert sorted(_files(tmp_path)) == ["source.json"]


def test_a_folder_of_another_run_is_refused(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _lift(FewPeople(COUNT), out, saved)
    before = _files(out)
    digest = json.loads((out / "source.json").read_text(encoding="utf-8"))["checkpoint_sha256"]
    other = _save(tmp_path / "other.pt", shift=1.0)
    for difference, source, lifter, options in (
        ("shard_size: 4 there, 5 here", FewPeople(COUNT), BatchLifter(saved), {"shard_size": 5}),
        ("flip_test: false there, true here", FewPeople(COUNT), BatchLifter(saved, flip_test=True), {}),
        ("source.seed: 0 there, 1 here", FewPeople(COUNT, seed=1), BatchLifter(saved), {}),
        (
            'precision: "float32" there, "bfloat16" here',
            FewPeople(COUNT),
            BatchLifter(saved, precision="bfloat16"),
            {},
        ),
    ):
        with pytest.raises(ValueError) as error:
            lift_all.lift_all(source, out, lifter, **{"shard_size": SHARD, **options})
        expected = f"out {out}: holds shards of another run ({difference}); choose another folder or delete that one"
        assert str(error.value) == expected
    with pytest.raises(
        ValueError, match=rf"another run \(checkpoint_sha256: \"{digest[:39]}… there, \"[0-9a-f]{{39}}… "
    ):
        _lift(FewPeople(COUNT), out, other)
    assert _files(out) == before


def test_refusals_write_nothing(saved: Path, tmp_path: Path) -> None:
    out, file, garbage = tmp_path / "out", tmp_path / "file", tmp_path / "garbage.pt"
    file.write_text("a file")
    garbage.write_bytes(b"no weights")
    source = FewPeople(COUNT)
    cases: dict[str, tuple[FewPeople, Path, Any, dict[str, Any]]] = {
        "lift_all: part must be (k, n) with 0 ≤ k < n, got (2, 2)": (source, out, BatchLifter(saved), {"part": (2, 2)}),
        "lift_all: shard_size must be at least 1, got 0": (source, out, BatchLifter(saved), {"shard_size": 0}),
        "lift_all: batch_size must be at least 1, got 0": (source, out, BatchLifter(saved), {"batch_size": 0}),
        "lift_all: source must have records, got none": (FewPeople(0), out, BatchLifter(saved), {}),
        f"out {file}: expected a folder, got a file": (source, file, BatchLifter(saved), {}),
        f"checkpoint {out}/none.pt: no such file": (source, out, BatchLifter(out / "none.pt"), {}),
        f"checkpoint {garbage}: not a readable PyTorch file of plain tensors": (source, out, BatchLifter(garbage), {}),
        "BatchLifter: precision must be one of float32, bfloat16, float16, got 'half'": (
            source,
            out,
            BatchLifter(saved, precision="half"),
            {},
        ),
    }
    for message, (records, folder, lifter, options) in cases.items():
        with pytest.raises(ValueError) as error:
            lift_all.lift_all(records, folder, lifter, **options)
        assert str(error.value) == message
    with pytest.raises(TypeError) as type_error:
        lift_all.lift_all(source, out, print)  # type: ignore[arg-type]
    assert str(type_error.value) == "lift_all: lifter must be a BatchLifter, got builtin_function_or_method"
    assert not out.exists()


def test_folders_and_shards_that_are_something_else_are_refused(saved: Path, tmp_path: Path) -> None:
    def refusal(action: Any) -> str:
        with pytest.raises(ValueError) as error:
            action()
        return str(error.value)

    assert refusal(lambda: load_shards(tmp_path)) == (
        f"folder {tmp_path}: expected what lift-all writes, source.json and shard-00000-of-….npz, missing source.json"
    )
    (tmp_path / NAMES[0]).write_bytes(b"torn")
    assert refusal(lambda: _lift(FewPeople(COUNT), tmp_path, saved)) == (
        f"out {tmp_path}: holds shards but no source.json that says of what; choose another folder"
    )
    for other in ("{}", "[1]", '{"format": "liftbyimage-shards-1"}'):
        (tmp_path / "source.json").write_text(other)
        assert refusal(lambda: load_shards(tmp_path)) == (
            f"{tmp_path / 'source.json'}: expected what lift-all writes ('liftbyimage-shards-1'), got another file"
        )
    (tmp_path / "source.json").write_text("{")
    assert refusal(lambda: load_shards(tmp_path)).startswith(f"{tmp_path / 'source.json'}: not valid JSON (")
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / "source.json").unlink()
    _lift(FewPeople(COUNT), tmp_path, saved)
    shard, array = tmp_path / NAMES[0], io.BytesIO()
    np.save(array, np.arange(3))
    for content in (b"torn", pickle.dumps({"index": 1}), b"", array.getvalue(), shard.read_bytes()[:-100]):
        shard.write_bytes(content)
        assert refusal(lambda: load_shards(tmp_path)).startswith(
            f"shard {shard}: not a file of arrays that lift-all wrote ("
        )
    with shard.open("wb") as file:
        np.savez(file, index=np.arange(4), group=np.arange(4), keypoints=np.zeros(4), problem=np.array([""] * 4))
    assert refusal(lambda: load_shards(tmp_path)) == (
        f"shard {shard}: expected the arrays that lift-all writes, missing pose_3d_lifted, crop_matrix, image_size"
    )


def _batch(count: int) -> dict[str, np.ndarray]:
    return {name: values for name, values in FewPeople(count).columns.items() if name != "mask"}


def _lift_in_this_process(lifter: BatchLifter) -> np.ndarray:
    torch.set_num_threads(1)
    return lifter(_batch(3))["pose_3d_lifted"]


def test_the_lifter_travels_between_processes_with_or_without_its_model(saved: Path) -> None:
    lifter = BatchLifter(saved)
    unused = pickle.dumps(lifter)
    expected = lifter({**_batch(3), "name": np.array(["a", "b", "c"])})
    assert sorted(expected) == [
        *("coarse_pose_3d_lifted", "crop_matrix", "image_size", "keypoints", "name", "pose_3d", "pose_3d_lifted"),
    ]
    used = pickle.dumps(lifter)
    assert used == unused and len(used) < 1000
    np.testing.assert_array_equal(pickle.loads(used)(_batch(3))["pose_3d_lifted"], expected["pose_3d_lifted"])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(_lift_in_this_process, (lifter,))
    np.testing.assert_allclose(there, expected["pose_3d_lifted"], **CLOSE)


@pytest.mark.parametrize("name", ["lift-by-image", "pose-only"])
def test_the_lifter_takes_batches_of_any_size(name: str, tmp_path: Path) -> None:
    lifter = BatchLifter(_save(tmp_path / "a.pt", name), flip_test=True)
    lifted = lifter(_batch(5))
    assert lifted["pose_3d_lifted"].shape == (5, 17, 3) and lifted["pose_3d_lifted"].dtype == np.float32
    assert ("coarse_pose_3d_lifted" in lifted) == (name == "lift-by-image")
    assert lifter({key: values[:0] for key, values in _batch(5).items()})["pose_3d_lifted"].shape == (0, 17, 3)
    plain = BatchLifter(tmp_path / "a.pt")(_batch(5))["pose_3d_lifted"]
    assert np.abs(plain - lifted["pose_3d_lifted"]).max() > 1e-3
    with pytest.raises(ValueError) as error:
        lifter({"image": _batch(1)["image"], "keypoints": _batch(1)["keypoints"]})
    assert str(error.value) == (
        "BatchLifter: batch must hold image, keypoints, crop_matrix, image_size, missing crop_matrix, image_size"
    )


def test_broken_weights_are_said_to_be(tmp_path: Path) -> None:
    broken = _save(tmp_path / "broken.pt", shift=float("nan"))
    with pytest.raises(ValueError) as error:
        _lift(FewPeople(COUNT), tmp_path / "out", broken)
    assert str(error.value) == f"BatchLifter: a pose is not finite: the weights of {broken} are broken"


def test_the_lifter_unchanged_in_ray_data(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pytest.importorskip("ray.data", reason='Ray Data is not installed: pip install "liftbyimage[ray]"')
    import ray

    batch = _batch(6)
    expected = BatchLifter(saved)(batch)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        rows = [{name: values[row] for name, values in batch.items()} | {"row": row} for row in range(6)]
        lifted = ray.data.from_items(rows).map_batches(
            BatchLifter, fn_constructor_kwargs={"checkpoint": str(saved)}, batch_size=4, concurrency=1
        )
        found = sorted(lifted.take_all(), key=lambda row: row["row"])
    finally:
        ray.shutdown()
    np.testing.assert_allclose(np.stack([row["pose_3d_lifted"] for row in found]), expected["pose_3d_lifted"], **CLOSE)
    assert "image" not in found[0]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    random = np.random.default_rng(4)
    root = tmp_path / "pictures"
    (root / "inside").mkdir(parents=True)
    poses = {}
    for name in ("b.png", "inside/a.png", "broken.png", "far.png"):
        assert cv2.imwrite(str(root / name), random.integers(0, 256, (120, 90, 3), dtype=np.uint8))
        keypoints = random.uniform([20, 10], [70, 110], (17, 2)) + (500 if name == "far.png" else 0)
        poses[name] = {"keypoints": keypoints.tolist()}
    (root / "broken.png").write_bytes(b"no picture")
    (root / "poses.json").write_text(json.dumps(poses), encoding="utf-8")
    return root


def test_pictures_are_cut_as_lift_does(pictures: Path, saved: Path) -> None:
    source = open_source(f"pictures:{pictures}")
    assert isinstance(source, PicturePeople) and len(source) == 4 and source.groups == (".", "inside")
    record = source[1]
    assert record["image"].shape == (256, 192, 3) and record["group"] == 1 and "pose_3d" not in record
    assert record["image_size"].tolist() == [90, 120] and record["keypoints"].dtype == np.float32
    crop_px = apply_affine(record["crop_matrix"], record["keypoints"])
    assert (crop_px > 0).all() and (crop_px < (192, 256)).all()
    path = pictures / "inside" / "a.png"
    poses = {str(path): source._poses[1][1]}
    [lifted] = lift_images(_full_size_pipeline(), [path], poses)
    np.testing.assert_array_equal(lifted.crop, record["image"])
    np.testing.assert_array_equal(lifted.crop_matrix, record["crop_matrix"])
    for index, problem in (
        (2, f"image {pictures / 'broken.png'}: not an image that OpenCV can read"),
        (
            3,
            f"image {pictures / 'far.png'}: none of its keypoints lies inside its 90×120 px; "
            "are they pixels of this picture?",
        ),
    ):
        with pytest.raises(CorruptRecord) as error:
            source[index]
        assert str(error.value) == problem
    assert PicturePeople(pictures, size="64x48")[0]["image"].shape == (64, 48, 3)
    assert PicturePeople(pictures, size="64x48").description != source.description
    json.dumps(source.description)


def _full_size_pipeline() -> Any:
    from liftbyimage import models

    return models.Pipeline(models.TinyEncoder(8), models.build("lift-by-image", image_channels=8, dim=16, heads=2))


def test_folders_without_poses_are_refused(pictures: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    single = pictures / "single.json"
    single.write_text(json.dumps({"keypoints": [[1, 2]] * 16 + [[50, 60]]}), encoding="utf-8")
    layout = 'pictures and poses.json, {"NAME.jpg": {"keypoints": [[x, y], …]}, …}'
    for message, arguments in {
        f"root {none}: expected a folder with {layout}, missing {none / 'poses.json'}": {"root": none},
        f"pose file {single}: expected the pose of each picture by its name, got no names": {
            "root": pictures,
            "poses": "single.json",
        },
    }.items():
        with pytest.raises(ValueError) as error:
            PicturePeople(**arguments)
        assert str(error.value) == message


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in ("lift-all", *arguments)])


def test_command(saved: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "few", "few_people:FewPeople")
    out = tmp_path / "out"
    arguments = ("few,count=11", "--out", out, "--checkpoint", saved, "--shard-size", 4)
    first = _run(*arguments, "--part", "1/2")
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.stdout == f"{out}: 1 shards lifted, 0 already there, 2 left to others.\n"
    assert _run(*arguments).stdout == f"{out}: 2 shards lifted, 1 already there, 0 left to others.\n"
    assert load_shards(out)["pose_3d_lifted"].shape == (11, 17, 3)
    of_pictures = _run(f"pictures:{pictures},size=64x48", "--out", tmp_path / "p", "--checkpoint", saved)
    assert of_pictures.stdout == (
        f"{tmp_path / 'p'}: 1 shards lifted, 0 already there, 0 left to others. "
        "2 records could not be read: their poses are NaN, and `problem` says why.\n"
    )
    for message, refused in {
        "--part: expected K/N with 0 ≤ K < N, got 2/2": (*arguments, "--part", "2/2"),
        f"--out {saved}: expected a folder, got a file": ("few", "--out", saved),
        "BatchLifter: device must be auto, cpu or cuda, got 'tpu'": (*arguments, "--device", "tpu"),
    }.items():
        result = _run(*refused)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
