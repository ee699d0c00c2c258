"""ASF/AMC files: forward kinematics against another implementation, anatomy of real clips, people, bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from acclaim_files import amc_text, asf_text, bones, write_mocap
from scipy.spatial.transform import Rotation

from liftbyimage.data import body
from liftbyimage.data.mocap import MocapPeople, Skeleton, forward_kinematics, read_amc, read_asf
from liftbyimage.data.skeleton import BONES, FLIP_PAIRS, JOINT_NAMES

CMU = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "cmu_mocap"
needs_cmu = pytest.mark.skipif(not CMU.is_dir(), reason="shared/data/cmu_mocap is missing")
CLIPS = ("02_01", "02_03", "02_04", "03_01")  # walk, run, jump, walk over uneven ground
LENGTH = 0.0254 / 0.45  # metres per length of the files
JOINT = {name: i for i, name in enumerate(JOINT_NAMES)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_mocap(tmp_path, {"07_01": 30, "07_02": 25})


def read(root: Path, clip: str) -> tuple[Skeleton, np.ndarray]:
    folder = root / clip[:2]
    skeleton = read_asf(folder / f"{clip[:2]}.asf")
    return skeleton, read_amc(folder / f"{clip}.amc", skeleton)


def bone_ends(root: Path, clip: str) -> dict[str, np.ndarray]:
    skeleton, angles = read(root, clip)
    ends, _ = forward_kinematics(skeleton, angles)
    return dict(zip(skeleton.names, ends.swapaxes(0, 1), strict=True))


# --- files and forward kinematics


def test_skeleton_of_a_file(written: Path) -> None:
    skeleton, angles = read(written, "07_02")
    names = [name for name, *_ in bones()]
    assert skeleton.names[0] == "root" and sorted(skeleton.names[1:]) == sorted(names)
    assert all(parent < child for child, parent in enumerate(skeleton.parents))
    for name, direction, length, _, dof, parent in bones():
        i = skeleton.names.index(name)
        assert skeleton.names[skeleton.parents[i]] == parent and skeleton.channels[i] == tuple(dof.split())
        expected = LENGTH * length * np.array([float(part) for part in direction.split()])
        np.testing.assert_allclose(skeleton.offsets[i], expected, rtol=1e-12)
    assert skeleton.channels[0] == ("tx", "ty", "tz", "rx", "ry", "rz")
    assert angles.shape == (25, 6 + sum(len(dof.split()) for *_, dof, _ in bones()))
    np.testing.assert_allclose(angles[:, 1], 17 * LENGTH, rtol=1e-12)
    assert (angles[:, skeleton.columns()[skeleton.names.index("lradius")]] == 15).all()


def test_angles_bend_the_body_the_right_way(written: Path) -> None:
    """x left, y up, z forward: hips and knees by the axes of a leg that is 20 degrees aside in the base pose."""
    skeleton, _ = read(written, "07_02")

    def moved(start: str, end: str, **angles: float) -> np.ndarray:
        row = np.zeros((1, skeleton.columns()[-1].stop))
        for key, value in angles.items():
            bone, channel = key.split("_")
            i = skeleton.names.index(bone)
            row[0, skeleton.columns()[i].start + skeleton.channels[i].index(channel)] = value
        ends, _ = forward_kinematics(skeleton, row)
        step = ends[0, skeleton.names.index(end)] - ends[0, skeleton.names.index(start)]
        return step / np.linalg.norm(step)

    aside = [0.34202, -0.939693, 0]
    close = dict(rtol=0, atol=1e-5)
    np.testing.assert_allclose(moved("lfemur", "ltibia"), aside, **close)
    np.testing.assert_allclose(moved("lfemur", "ltibia", lfemur_rz=-20), [0, -1, 0], **close)
    np.testing.assert_allclose(moved("lfemur", "ltibia", ltibia_rx=90), [0, 0, -1], **close)
    np.testing.assert_allclose(moved("lhipjoint", "lfemur", lfemur_rx=-90), [0, 0, 1], **close)
    np.testing.assert_allclose(moved("lfemur", "ltibia", root_ry=90), [0, -0.939693, -0.34202], **close)
    np.testing.assert_allclose(moved("rclavicle", "rhumerus", thorax_rz=90), [0, -1, 0], **close)


def ends_by_scipy(skeleton: Skeleton, row: np.ndarray) -> np.ndarray:
    """One frame bone by bone, rotations from scipy, walking up to the root anew for each."""

    def turn(bone: int) -> np.ndarray:
        values = dict(zip(skeleton.channels[bone], row[skeleton.columns()[bone]], strict=True))
        turning = [channel for channel in skeleton.channels[bone] if channel[0] == "r"]
        order = "".join(channel[1] for channel in turning)
        angles = [values[channel] for channel in turning]
        own = Rotation.from_euler(order, angles, degrees=True).as_matrix() if order else np.eye(3)
        own = skeleton.axes[bone] @ own @ np.linalg.inv(skeleton.axes[bone])
        return own if skeleton.parents[bone] < 0 else turn(skeleton.parents[bone]) @ own

    def end(bone: int) -> np.ndarray:
        if skeleton.parents[bone] < 0:
            return row[:3]
        return end(skeleton.parents[bone]) + turn(bone) @ skeleton.offsets[bone]

    return np.array([end(bone) for bone in range(len(skeleton.names))])


@needs_cmu
@pytest.mark.parametrize("clip", CLIPS)
def test_forward_kinematics_agrees_with_scipys_rotations(clip: str) -> None:
    skeleton, angles = read(CMU, clip)
    for bone, text in (("lfemur", (0, 0, 20)), ("lhumerus", (180 if clip[1] == "2" else -180, -30, -90))):
        expected = Rotation.from_euler("xyz", text, degrees=True).as_matrix()
        np.testing.assert_allclose(skeleton.axes[skeleton.names.index(bone)], expected, rtol=0, atol=1e-12)
    some = angles[[0, len(angles) // 2, -1]]
    ends, _ = forward_kinematics(skeleton, some)
    for frame in range(3):
        np.testing.assert_allclose(ends[frame], ends_by_scipy(skeleton, some[frame]), rtol=0, atol=1e-12)


def test_units_and_orders_of_a_file(written: Path) -> None:
    """Radians, another length, and another order of turning, by hand on one bone."""
    path = written / "one.asf"
    path.write_text(
        ":units\n length 1.0 # inches\n angle rad\n:root\n order RZ RX TX TY TZ RY\n axis XYZ\n position 1 2 3\n"
        " orientation 0 0 0\n:bonedata\nbegin\n name arm\n direction 1, 0, 0\n length 10\n axis 0 0 0 ZYX\n"
        " dof rz rx\nend\n:hierarchy\nbegin\n root arm\nend\n"
    )
    skeleton = read_asf(path)
    np.testing.assert_allclose(skeleton.offsets, [[0.0254, 0.0508, 0.0762], [0.254, 0, 0]], rtol=1e-12)
    assert skeleton.channels == (("rz", "rx", "tx", "ty", "tz", "ry"), ("rz", "rx"))
    motion = written / "one.amc"
    motion.write_text(f":RADIANS\n7\nroot 0 0 1 0 0 0\narm {np.pi / 2} {np.pi / 2}\n8\nroot 0 0 0 0 0 0\narm 0 0\n")
    angles = read_amc(motion, skeleton)
    np.testing.assert_allclose(angles, [[0, 0, 0.0254, 0, 0, 0, 90, 90], [0] * 8], rtol=1e-12)
    ends, rotations = forward_kinematics(skeleton, angles)
    # along x, about z to y, about x to z
    np.testing.assert_allclose(ends[0, 1] - ends[0, 0], [0, 0, 0.254], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ends[0, 0], [0.0508, 0.0508, 0.0762], rtol=1e-12)
    np.testing.assert_allclose(rotations[1], np.broadcast_to(np.eye(3), (2, 3, 3)), rtol=0, atol=1e-12)


# --- real clips


@needs_cmu
@pytest.mark.parametrize("clip", CLIPS)
def test_real_people_keep_their_bones_and_sides(clip: str) -> None:
    skeleton, angles = read(CMU, clip)
    ends, rotations = forward_kinematics(skeleton, angles)
    at = dict(zip(skeleton.names, ends.swapaxes(0, 1), strict=True))
    for bone, parent in enumerate(skeleton.parents[1:], start=1):
        lengths = np.linalg.norm(ends[:, bone] - ends[:, parent], axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(skeleton.offsets[bone]), rtol=1e-9)
    assert 0.35 < np.linalg.norm(skeleton.offsets[skeleton.names.index("lfemur")]) < 0.5
    left, forward = rotations[:, 0, :, 0], rotations[:, 0, :, 2]
    for bone, least in (("hipjoint", 0.15), ("femur", 0.05), ("clavicle", 0.3), ("humerus", 0.2)):
        assert (((at[f"l{bone}"] - at[f"r{bone}"]) * left).sum(1) > least).all(), bone
    for side in "lr":
        toes = at[f"{side}toes"] - at[f"{side}tibia"]
        assert np.median((toes * forward).sum(1)) > 0.1
        thigh, shin = at[f"{side}femur"] - at[f"{side}hipjoint"], at[f"{side}tibia"] - at[f"{side}femur"]
        bend = np.cross(thigh, shin)  # about the left axis when the shin goes back
        assert ((bend * left).sum(1) > -0.01).all()


@needs_cmu
@pytest.mark.parametrize("clip", CLIPS[:3])
def test_real_feet_come_down_to_the_floor_and_not_through_it(clip: str) -> None:
    """The database's floor is y = 0; bones lie inside the feet."""
    at = bone_ends(CMU, clip)
    lowest = np.min([at[f"{side}{bone}"][:, 1] for side in "lr" for bone in ("foot", "toes")], axis=0)
    assert -0.03 < lowest.min() < 0.05
    assert at["head"][:, 1].max() < 2.2 and 1.4 < np.median(at["head"][:, 1]) < 1.8


@needs_cmu
def test_real_clips_do_what_they_are_called() -> None:
    walk, run, jump = (bone_ends(CMU, clip) for clip in CLIPS[:3])

    def feet(at: dict[str, np.ndarray]) -> np.ndarray:
        return np.stack([at["ltoes"][:, 1], at["rtoes"][:, 1]])

    speed = [np.linalg.norm(at["root"][-1] - at["root"][0]) / (len(at["root"]) / 120) for at in (walk, run)]
    assert 0.8 < speed[0] < 1.6 and 2 < speed[1] < 4
    assert (feet(walk).min(0) > 0.08).mean() < 0.01
    assert (feet(run).min(0) > 0.08).mean() > 0.2  # both feet in the air
    assert feet(jump).min(0).max() > 0.3 and np.ptp(jump["root"][:, 1]) > 0.5
    ahead = walk["root"][-1] - walk["root"][0]
    legs, arms = ((walk[f"l{bone}"] - walk[f"r{bone}"]) @ ahead for bone in ("tibia", "wrist"))
    assert np.corrcoef(legs, arms)[0, 1] < -0.8


# --- people


def test_joints_are_the_captured_ones(written: Path) -> None:
    """The world's joints, turned back, are the bones' ends about the pelvis; the floor carries the lowest flesh."""
    people = MocapPeople(written, clips=["07_01"], fps=120, size=(8, 8))
    at = bone_ends(written, "07_01")
    pelvis = (at["lhipjoint"] + at["rhipjoint"]) / 2
    world = people._world
    assert world.shape == (30, len(body.POINT_NAMES), 3)
    pairs = {"left_knee": "lfemur", "right_wrist": "rwrist", "left_shoulder": "lclavicle", "spine": "lowerback"}
    for joint, bone in pairs.items():
        captured, shown = at[bone] - pelvis, world[:, JOINT[joint]] - world[:, 0]
        np.testing.assert_allclose(shown[:, 2], captured[:, 1], rtol=0, atol=1e-12)
        # one turn of the whole clip about the vertical
        plane = captured[:, 2] + 1j * captured[:, 0]
        turn = (shown[:, 0] + 1j * shown[:, 1]) / plane
        np.testing.assert_allclose(turn, np.full(30, turn[0]), rtol=0, atol=1e-9)
    np.testing.assert_allclose(world[:, 0, :2], 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(world[:, 0, 2]), np.diff(pelvis[:, 1]), rtol=0, atol=1e-12)
    assert abs((world[:, body.CAPSULE_ENDS, 2] - people._people.radii).min()) < 1e-12


@needs_cmu
def test_real_people_are_anatomical() -> None:
    people = MocapPeople(CMU, fps=120, size=(8, 8))
    assert len(people) == 343 + 173 + 483 + 432 and people.groups == CLIPS
    assert (people._people.stature > 1.6).all() and (people._people.stature < 1.85).all()
    trunk = {"spine": (0.18, 0.28), "thorax": (0.22, 0.32), "nose": (0.08, 0.22), "head": (0.15, 0.25)}
    for clip in range(4):
        joints = people._world[people._clip == clip, :17]
        lengths = {child: np.linalg.norm(joints[:, child] - joints[:, parent], axis=1) for parent, child in BONES}
        for left, right in FLIP_PAIRS:
            assert abs(lengths[left].mean() / lengths[right].mean() - 1) < 0.13
            if JOINT_NAMES[left] != "left_shoulder":  # the thorax is no joint of the shoulders' bones
                np.testing.assert_allclose(lengths[left], lengths[left][0], rtol=1e-9)
        for name, (least, most) in trunk.items():
            assert least < np.median(lengths[JOINT[name]]) < most, name
        assert np.median(joints[:, JOINT["head"], 2] - joints[:, JOINT["left_ankle"], 2]) > 1.4
        across = (joints[:, JOINT["left_hip"]] - joints[:, JOINT["right_hip"]]).mean(axis=0)
        assert across[1] > 0.1 and abs(across[0]) < 1e-9  # faces the floor's x axis
        assert (joints[:, JOINT["nose"], 0] - joints[:, JOINT["thorax"], 0]).mean() > 0.05
    lowest = people._world[people._clip == 2][:, body.CAPSULE_ENDS, 2].min(axis=(1, 2))
    assert lowest.max() > 0.25 and (lowest < 0.06).mean() > 0.5  # the jump leaves the floor and comes back


@needs_cmu
def test_real_people_lie_under_their_joints() -> None:
    """Not only the joints' pixels: the flesh between two joints of a limb is the person's, too."""
    people = MocapPeople(CMU, fps=2, noise=0, size=(128, 96))
    for index in range(len(people)):
        record = people[index]
        keypoints = record["keypoints"] @ record["crop_matrix"][:, :2].T + record["crop_matrix"][:, 2]
        middles = [(keypoints[parent] + keypoints[child]) / 2 for parent, child in BONES]
        column, row = np.rint(np.stack([*keypoints, *middles])).astype(int).T
        assert record["mask"][row, column].mean() > 0.9
        assert 0.03 < record["mask"].mean() < 0.6


def test_records_do_not_depend_on_other_clips_frames_or_views(written: Path) -> None:
    everything = MocapPeople(written, fps=40, views=2, seed=5, size=(32, 24))
    assert len(everything) == 2 * (10 + 9)

    def equal(other: MocapPeople, pairs: dict[int, int]) -> None:
        for index, place in pairs.items():
            for name in ("image", "keypoints", "pose_3d", "mask"):
                np.testing.assert_array_equal(other[index][name], everything[place][name])

    equal(MocapPeople(written, clips="07_02", fps=40, views=2, seed=5, size=(32, 24)), {0: 20, 5: 25})
    equal(MocapPeople(written, clips="07_02+07_01", fps=40, views=2, seed=5, size=(32, 24)), {0: 20, 18: 0, 21: 3})
    equal(MocapPeople(written, fps=40, seed=5, size=(32, 24)), {0: 0, 1: 2, 12: 24})
    equal(MocapPeople(written, fps=20, views=2, seed=5, size=(32, 24)), {0: 0, 3: 5, 10: 20})


def test_clips_views_and_seeds_differ(written: Path) -> None:
    people = MocapPeople(written, fps=40, views=2, noise=0, size=(32, 24))
    first, view, second = people[0], people[1], people[20]
    assert (first["group"], view["group"], second["group"]) == (0, 0, 1)
    lengths = [np.linalg.norm(record["pose_3d"], axis=1) for record in (first, view)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)  # one body, seen twice
    assert np.abs(first["pose_3d"] - view["pose_3d"]).max() > 0.05
    other = MocapPeople(written, fps=40, views=2, noise=0, size=(32, 24), seed=1)[0]
    for record in (view, second, other):
        assert (record["image"] != first["image"]).mean() > 0.5


# --- bad files


_UNPLACED = "expected a bone already placed, then bones of :bonedata that are not, got '{}'"


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        (":hierarchy", "", 261, "the file ends without a section :hierarchy"),
        ("length 0.45", "length -1", 4, "expected a length above 0, got 'length -1'"),
        ("angle deg", "angle turns", 5, "expected angle deg or angle rad, got 'angle turns'"),
        ("  order TX TY TZ RX RY RZ\n", "", 6, "the section :root lacks order"),
        (
            "axis 0 0 0  XYZ",
            "axis 0 0 0 XYX",
            17,
            "expected an axis order such as XYZ at its end, got 'axis 0 0 0 XYX'",
        ),
        ("axis 0 0 0  XYZ", "axis 0 0", 17, "expected an axis as 3 numbers, got 'axis 0 0'"),
        (
            "orientation 0 0 0",
            "orientation 0 9 0",
            10,
            "expected orientation 0 0 0: programs differ in what another one means, got 'orientation 0 9 0'",
        ),
        ("position 0 0 0", "position 0 0", 9, "expected a position as 3 numbers, got 'position 0 0'"),
        ("name lowerback", "name lower back", 14, "expected a name of one word, got 'name lower back'"),
        ("direction 0 1 0", "direction 0 up 0", 15, "expected a direction as 3 numbers, got 'direction 0 up 0'"),
        ("length 2.0", "length nan", 16, "expected a length as 1 number, got 'length nan'"),
        ("     length 2.0\n", "", 20, "a bone ends without length"),
        ("dof rx ry rz", "dof rx ry rx", 18, "expected some of rx, ry, rz, each once, got 'dof rx ry rx'"),
        ("name thorax", "name lowerback", 24, "expected another name for each bone, got 'name lowerback'"),
        ("  end\n  begin\n     id 2", "  begin\n     id 2", 21, "expected the bone's end first, got 'begin'"),
        ("    root lowerback\n", "", 238, _UNPLACED.format("lowerback thorax")),
        ("    root lowerback\n", "    root lowerbacks\n", 238, _UNPLACED.format("root lowerbacks")),
        ("    upperneck head\n", "    upperneck thorax\n", 242, _UNPLACED.format("upperneck thorax")),
    ],
)
def test_malformed_asf(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    path = tmp_path / "07.asf"
    assert old in asf_text()
    path.write_text(asf_text().replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        read_asf(path)
    assert str(error.value) == f"{path}, line {line}: {message}"


def test_hierarchy_without_a_bone(tmp_path: Path) -> None:
    path = tmp_path / "07.asf"
    text = asf_text().replace("    rwrist rhand\n", "")
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_asf(path)
    assert str(error.value) == f"{path}, line {len(text.splitlines())}: the hierarchy ends without rhand"


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        (
            "lfemur -0.0",
            "lfemurs -0.0",
            11,
            "expected another bone of the skeleton in frame 1, got 'lfemurs -0.0 0 -20'",
        ),
        ("lradius 15", "lradius", 16, "expected lradius and 1 number, got 'lradius'"),
        ("lradius 15", "lradius inf", 16, "expected lradius as 1 number, got 'lradius inf'"),
        ("lwrist 0", "lradius 0", 17, "expected another bone of the skeleton in frame 1, got 'lradius 0'"),
        ("lradius 15\n", "", 4, "frame 1 lacks lradius"),
        ("\n2\n", "\n3\n", 27, "expected frame number 2 alone, got '3'"),
        ("\n2\n", "\n2 0\n", 27, "expected frame number 2 alone, got '2 0'"),
        ("\n1\n", "\n", 4, "expected a frame number first, got 'root 0.0 17 0.0 0 10 0'"),
    ],
)
def test_malformed_amc(written: Path, old: str, new: str, line: int, message: str) -> None:
    path = written / "07" / "07_02.amc"
    assert old in amc_text(25)
    path.write_text(amc_text(25).replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        read(written, "07_02")
    assert str(error.value) == f"{path}, line {line}: {message}"


def test_amc_without_frames_or_cut_short(written: Path) -> None:
    path = written / "07" / "07_02.amc"
    path.write_text(":FULLY-SPECIFIED\n")
    with pytest.raises(ValueError) as error:
        MocapPeople(written)
    assert str(error.value) == f"{path}, line 1: the file holds no frames"
    path.write_text(amc_text(2).rsplit("\n", 3)[0] + "\n")
    with pytest.raises(ValueError, match=r"line 27: frame 2 lacks rwrist$"):
        MocapPeople(written)


def test_bad_folders(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError) as error:
        MocapPeople(nowhere)
    assert str(error.value) == (
        f"root {nowhere}: expected a folder with subjects NN/NN.asf and their clips NN/NN_MM.amc, "
        "such as 02/02.asf and 02/02_01.amc, got none"
    )
    root = write_mocap(tmp_path / "mocap", {"07_01": 13})
    skeleton = root / "07" / "07.asf"
    skeleton.write_text(asf_text().replace("upperneck", "throat"))
    with pytest.raises(ValueError) as error:
        MocapPeople(root)
    assert str(error.value) == f"{skeleton}: expected the bones of the CMU database, without upperneck"
    skeleton.unlink()
    with pytest.raises(ValueError) as error:
        MocapPeople(root)
    assert str(error.value) == f"root {root}: expected the skeleton {skeleton} beside its clip 07_01"
    with pytest.raises(ValueError) as error:
        read_asf(skeleton)
    assert str(error.value) == f"{skeleton}: no such file"


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ValueError, "clips: expected some of 07_01, 07_02, each once, got '07_03'", {"clips": "07_03"}),
        (
            ValueError,
            "clips: expected some of 07_01, 07_02, each once, got ['07_01', '07_01']",
            {"clips": 2 * ["07_01"]},
        ),
        (ValueError, "clips: expected some of 07_01, 07_02, each once, got 7", {"clips": 7}),
        (ValueError, "fps: expected a divisor of 120, got 50", {"fps": 50}),
        (ValueError, "fps: expected at least 1, got 0", {"fps": 0}),
        (TypeError, "views: expected an integer, got float", {"views": 1.5}),
        (ValueError, "seed: expected at least 0, got -1", {"seed": -1}),
        (ValueError, "background: expected one of textured, laboratory, got 'beach'", {"background": "beach"}),
    ],
)
def test_bad_options(written: Path, kind: type[Exception], message: str, options: dict[str, object]) -> None:
    with pytest.raises(kind) as error:
        MocapPeople(written, **options)  # type: ignore[arg-type]
    assert str(error.value) == message
