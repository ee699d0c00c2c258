"""The page of lifted people: what it embeds is what the lifter computes, and it does in a browser what it says."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from browser import Page, opened, until
from few_people import small_pipeline
from marked_person import write_video
from typer.testing import CliRunner

from liftbyimage import checkpoint, cli, demo, models, viewer
from liftbyimage._files import DEMO_CHECKPOINT
from liftbyimage.data.crop import denormalise_keypoints, normalise_image
from liftbyimage.data.pose_file import read_pose_file
from liftbyimage.data.skeleton import JOINT_NAMES
from liftbyimage.data.synthetic import generate
from liftbyimage.lift import lift_images
from liftbyimage.metrics import mpjpe
from liftbyimage.ops import keep_count, prune_patches
from liftbyimage.train_demo import TrainingScenes, render_scenes

HOSTILE = '</script><img src=x onerror="window.broken = true">'
WRIST, KNEE = JOINT_NAMES.index("left_wrist"), JOINT_NAMES.index("right_knee")
TYPES = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4"}


@pytest.fixture(scope="module")
def pipeline() -> models.Pipeline:
    return checkpoint.load_pipeline(DEMO_CHECKPOINT)


@pytest.fixture(scope="module")
def scenes() -> TrainingScenes:
    return render_scenes(2, seed=demo.FIRST_UNSEEN_SEED)


@pytest.fixture(scope="module")
def people(scenes: TrainingScenes) -> list[viewer.Person]:
    """The first with a name that must stay text and with a known truth, the second without one."""
    size = tuple(scenes.image.shape[1:3])
    shown = [
        viewer.Person(HOSTILE, image.numpy(), denormalise_keypoints(pose_2d, size).numpy(), (pose_2d,), pose_3d.numpy())
        for image, pose_2d, pose_3d in zip(scenes.image, scenes.pose_2d, scenes.pose_3d, strict=True)
    ]
    return [shown[0], replace(shown[1], title="second", truth_3d=None)]


@pytest.fixture(scope="module")
def data(pipeline: models.Pipeline, people: list[viewer.Person]) -> dict[str, Any]:
    return viewer.viewer_data(pipeline, people)


@pytest.fixture(scope="module")
def page_file(pipeline: models.Pipeline, people: list[viewer.Person], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "viewer.html"
    viewer.write_viewer(path, pipeline, people, HOSTILE, HOSTILE)
    return path


@pytest.fixture
def shown(page_file: Path) -> Iterator[Page]:
    """The page, open; nothing may fail in it or be loaded."""
    with opened(page_file) as page:
        yield page
        page.assert_alone()


def _unpack(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["base64"]), dtype=TYPES[packed["type"]])


def _stored(quantised: dict[str, Any], joints: int = 17) -> np.ndarray:
    """Attention [J, P] as the page reads it."""
    codes = _unpack(quantised["codes"]).reshape(joints, -1)
    return quantised["low"] * quantised["step"] ** codes.astype(np.float64) / codes.shape[1]


# --- what is embedded ------------------------------------------------------------------------------------------------


def test_attention_is_the_lifters_within_the_stated_step(pipeline, scenes, data) -> None:
    with torch.inference_mode():
        features = pipeline.read(normalise_image(scenes.image))
        maps = pipeline.lifter.attention_maps(features, scenes.pose_2d)
        expected = [*(one.mean(1) for one in maps), *maps[-1].unbind(1)]
    assert data["maps"] == [
        "1, all heads",
        "2, pose-guided, all heads",
        "3, all heads",
        *(f"3, head {head}" for head in (1, 2, 3, 4)),
    ]
    floor = viewer.FAINTEST / (64 * 48)
    for number, person in enumerate(data["people"]):
        assert len(person["attention"]) == len(expected) == len(data["maps"])
        for quantised, attention in zip(person["attention"], expected, strict=True):
            actual, exact = _stored(quantised), attention[number].double().numpy()
            within = quantised["step"] ** 0.5
            assert within < 1.025
            np.testing.assert_array_less(np.abs(np.log(actual / np.maximum(exact, floor))), np.log(within) + 1e-4)
            np.testing.assert_allclose(actual.sum(axis=1), 1, atol=within - 1 + viewer.FAINTEST)


def test_the_chosen_map_averages_to_the_importance(pipeline, scenes, data) -> None:
    with torch.inference_mode():
        lifted = pipeline(normalise_image(scenes.image), scenes.pose_2d)
    for number, person in enumerate(data["people"]):
        quantised = person["attention"][data["importance"]]
        mean = _stored(quantised).mean(axis=0)
        np.testing.assert_allclose(mean, lifted.importance[number], rtol=quantised["step"] ** 0.5 - 1 + 1e-3)


@pytest.mark.parametrize("attention", [np.full((2, 7), 1 / 7), np.eye(2, 7), np.zeros((2, 7))], ids=str)
def test_uniform_and_concentrated_attention_are_stored(attention: np.ndarray) -> None:
    quantised = viewer.quantised(attention)
    expected = np.maximum(attention, viewer.FAINTEST / 7)
    np.testing.assert_allclose(_stored(quantised, joints=2), expected, rtol=quantised["step"] ** 0.5 - 1 + 1e-9)


def test_kept_patches_are_those_of_prune_patches(pipeline, scenes, data) -> None:
    config = pipeline.lifter.config
    assert data["retentions"] == [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    assert data["retentions"][data["trained"]] == config.retention
    with torch.inference_mode():
        lifted = pipeline(normalise_image(scenes.image), scenes.pose_2d)
    for number, person in enumerate(data["people"]):
        order = _unpack(person["order"])
        for retention, keep in zip(data["retentions"], data["keep"], strict=True):
            assert keep == keep_count(64 * 48, retention)
            expected = prune_patches(lifted.importance[number, None, :, None], lifted.importance[number, None], keep)
            np.testing.assert_array_equal(np.sort(order[:keep]), expected.index[0])


@pytest.mark.parametrize(
    "importance",
    [[3, 1, 2, 1, 3, 3, 1], [0.0, -0.0, 0.0, -0.0, 1], [float("nan"), 1, float("-inf"), float("nan"), 1, 2], [5.0]],
    ids=str,
)
def test_ties_and_nan_are_ordered_as_prune_patches_does(importance: list[float]) -> None:
    values = torch.tensor([importance], dtype=torch.float32)
    order = viewer.importance_order(values[0].numpy())
    for keep in range(1, len(importance) + 1):
        expected = prune_patches(torch.zeros(1, len(importance), 1), values, keep).index[0]
        np.testing.assert_array_equal(np.sort(order[:keep]), expected)


def test_poses_are_those_of_a_lifter_of_that_retention(pipeline, scenes, data) -> None:
    images, state = normalise_image(scenes.image), pipeline.lifter.state_dict()
    for stop, retention in enumerate(data["retentions"]):
        lifter = models.LiftByImage(replace(pipeline.lifter.config, retention=retention)).eval()
        lifter.load_state_dict(state)
        with torch.inference_mode():
            lifted = models.Pipeline(pipeline.encoder, lifter)(images, scenes.pose_2d)
        for number, person in enumerate(data["people"]):
            np.testing.assert_allclose(person["refined"][stop], lifted.pose_3d[number], atol=2e-5)
            np.testing.assert_allclose(person["coarse"], lifted.coarse_pose_3d[number], atol=2e-5)


def test_many_people_have_no_heads(pipeline, people, data) -> None:
    many = viewer.viewer_data(pipeline, [people[0]] * (viewer.PEOPLE_WITH_HEADS + 1))
    assert many["maps"] == data["maps"][:3]
    assert many["people"][-1]["attention"] == data["people"][0]["attention"][:3]


def test_a_retention_of_its_own_is_a_stop(people) -> None:
    lifter = models.LiftByImage(models.LiftByImageConfig(dim=16, heads=2, retention=0.27))
    own = viewer.viewer_data(models.Pipeline(models.TinyEncoder(), lifter).eval(), people[:1])
    assert (len(own["retentions"]), own["retentions"][own["trained"]]) == (11, 0.27)
    assert own["keep"][own["trained"]] == 829


def test_mistakes_get_one_sentence(pipeline, people, tmp_path: Path) -> None:
    path = tmp_path / "viewer.html"
    with pytest.raises(ValueError, match=r"^write_viewer: people must be at least one, got none$"):
        viewer.write_viewer(path, pipeline, [], "title")
    with pytest.raises(ValueError, match=r"^write_viewer: expected at most 100 people on a page, got 101$"):
        viewer.write_viewer(path, pipeline, people[:1] * 101, "title")
    training = small_pipeline("pose-only")
    with pytest.raises(
        ValueError, match=r"^write_viewer: pipeline must be in evaluation mode, got training mode; call eval\(\)$"
    ):
        viewer.write_viewer(path, training, people, "title")
    assert not path.exists()


# --- in a browser ----------------------------------------------------------------------------------------------------


def _heat(shown: Page) -> str:
    return shown.page.evaluate("document.querySelector('#look canvas').toDataURL()")


# The share of the crop that is shown as kept.
_KEPT_AREA = """(() => {
  const canvas = document.querySelector("#kept canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((_, index) => index % 4 === 3 && data[index] > 0).length / (canvas.width * canvas.height);
})()"""


def _skeleton(shown: Page) -> list[str]:
    """Where the refined pose's bones start in the view."""
    return shown.page.evaluate(
        "[...document.querySelectorAll('#space .refined .bone')]"
        ".map((bone) => `${bone.getAttribute('x1')} ${bone.getAttribute('y1')}`).sort()"
    )


def _hover(shown: Page, joint: int, view: str = "#look") -> None:
    box = shown.page.locator(f"{view} .joint").nth(joint).locator(".dot").bounding_box()
    shown.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def _leave(shown: Page) -> None:
    shown.page.mouse.move(2, 2)


def _errors(shown: Page) -> dict[str, list[str]]:
    rows = shown.page.locator("#errors tr[data-pose]").all()
    return {row.get_attribute("data-pose"): row.locator("td").all_inner_texts()[1:] for row in rows}


def test_the_script_reads_what_was_embedded(shown, data) -> None:
    for joint in (None, WRIST):
        actual = shown.page.evaluate(f"[...attentionOf(1, 4, {json.dumps(joint)})]")
        stored = 64 * 48 * _stored(data["people"][1]["attention"][4])
        np.testing.assert_allclose(actual, stored.mean(axis=0) if joint is None else stored[joint], rtol=1e-9)
    for stop, keep in enumerate(data["keep"]):
        kept = shown.page.evaluate(f"[...keptOf(1, {stop})]")
        assert np.flatnonzero(kept).tolist() == sorted(_unpack(data["people"][1]["order"])[:keep].tolist())


def test_hovering_over_a_joint_shows_where_it_looks(shown) -> None:
    mean = _heat(shown)
    text = (
        "Mean over all joints: the importance, which decides what is kept. "
        "Hover over a joint, or tap it, to see where it looks."
    )
    assert shown.page.inner_text("#looking") == text
    seen = {mean}
    for joint, name in ((WRIST, "Left wrist"), (KNEE, "Right knee")):
        for view in ("#look", "#space"):
            _hover(shown, joint, view)
            assert shown.page.inner_text("#looking") == f"{name}: layer 3, all heads."
            assert shown.page.locator("#space .name").text_content() == name.lower()
            assert len(_errors(shown)["refined"]) == 2
            seen.add(_heat(shown))
    assert len(seen) == 3
    _leave(shown)
    assert _heat(shown) == mean


def test_a_click_holds_a_joint_until_escape(shown) -> None:
    mean = _heat(shown)
    _hover(shown, WRIST)
    shown.page.mouse.down()
    shown.page.mouse.up()
    _leave(shown)
    held = _heat(shown)
    assert held != mean
    assert shown.page.locator("#look .joint").nth(WRIST).get_attribute("aria-pressed") == "true"
    _hover(shown, KNEE)
    assert _heat(shown) not in (held, mean)
    _leave(shown)
    assert _heat(shown) == held
    shown.page.keyboard.press("Escape")
    assert _heat(shown) == mean


def test_layers_and_heads_are_chosen(shown, data) -> None:
    _hover(shown, WRIST)
    seen = set()
    for number, name in enumerate(data["maps"]):
        shown.page.select_option("#map", str(number))
        _hover(shown, WRIST)
        assert shown.page.inner_text("#looking") == f"Left wrist: layer {name}."
        seen.add(_heat(shown))
    assert len(seen) == len(data["maps"])


def test_the_slider_keeps_what_keep_count_says_and_moves_the_pose(shown, data, scenes) -> None:
    trained = _skeleton(shown)
    truth = scenes.pose_3d[0]
    for stop, retention in enumerate(data["retentions"]):
        shown.page.locator("#retention").fill(str(stop))
        keep = keep_count(64 * 48, retention)
        note = " (as trained)" if retention == 0.3 else ""
        assert shown.page.inner_text("#keeping") == f"{retention * 100:g} %{note}: {keep} of 3072 patches kept"
        area = f"Math.abs({_KEPT_AREA} - {keep / 3072}) < 1e-9"
        until(lambda area=area: shown.page.evaluate(area))
        assert (_skeleton(shown) == trained) == (retention == 0.3)
        error = 1000 * mpjpe(torch.tensor(data["people"][0]["refined"][stop]), truth).item()
        assert _errors(shown)["refined"] == [f"{error:.0f} mm"]
        assert f"{error:.0f} mm" in shown.page.locator("#trend").text_content()
    shown.page.locator("#retention").fill(str(data["trained"]))
    assert _skeleton(shown) == trained


def test_the_skeleton_turns_and_zooms(shown) -> None:
    page, home = shown.page, _skeleton(shown)
    box = page.locator("#space").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 80, middle[1] + 30, steps=3)
    page.mouse.up()
    turned = _skeleton(shown)
    assert turned != home
    assert page.evaluate("[state.view.yaw, state.view.pitch]") == pytest.approx([28 - 40, 12 + 15])
    page.mouse.wheel(0, -200)
    until(lambda: page.evaluate("state.view.zoom > 1.2"))
    page.click("#reset")
    assert _skeleton(shown) == home
    page.click("#camera")
    in_camera = np.array(page.evaluate("person().refined[state.stop].map(skeleton.projection())"))[:, :2]
    pose = np.array(page.evaluate("person().refined[state.stop]"))
    # Seen from the camera's side, right is x and down is y.
    for axis in (0, 1):
        assert np.corrcoef(in_camera[:, axis], pose[:, axis])[0, 1] > 0.98
    page.click("#closer")
    assert page.evaluate("state.view.zoom") == 1.2


def test_a_click_in_the_view_holds_a_joint_but_a_drag_does_not(shown) -> None:
    page = shown.page
    dot = page.locator("#space .joint").nth(WRIST).locator(".dot").bounding_box()
    x, y = dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y)
    page.mouse.move(x, y)
    page.mouse.up()
    assert page.evaluate("[state.held, state.view.yaw]") == [None, pytest.approx(28)]
    page.mouse.click(x, y)
    assert page.evaluate("state.held") == WRIST


def test_the_view_answers_the_keyboard(shown) -> None:
    home = _skeleton(shown)
    shown.page.focus("#space")
    for key, view in (
        ("ArrowLeft", [38, 12, 1]),
        ("ArrowRight", [28, 12, 1]),
        ("ArrowDown", [28, 22, 1]),
        ("ArrowUp", [28, 12, 1]),
        ("+", [28, 12, 1.2]),
        ("-", [28, 12, 1]),
        ("ArrowDown", [28, 22, 1]),
    ):
        shown.page.keyboard.press(key)
        assert shown.page.evaluate("[state.view.yaw, state.view.pitch, state.view.zoom]") == pytest.approx(view)
        assert shown.page.evaluate("state.person") == 0
    assert _skeleton(shown) != home
    shown.page.keyboard.press("0")
    assert _skeleton(shown) == home


def test_joints_are_chosen_by_keyboard(shown) -> None:
    mean = _heat(shown)
    shown.page.focus("#map")
    shown.page.keyboard.press("Tab")  # all joints are one stop
    assert shown.page.inner_text("#looking").startswith("Pelvis:")
    shown.page.keyboard.press("ArrowDown")
    assert shown.page.inner_text("#looking").startswith("Right hip:")
    assert shown.page.evaluate("document.activeElement.getAttribute('aria-label')") == "right hip"
    shown.page.keyboard.press("End")
    shown.page.keyboard.press("Enter")
    assert shown.page.inner_text("#looking").startswith("Right wrist:")
    shown.page.keyboard.press("Tab")
    assert shown.page.evaluate("document.activeElement.id") == "retention"
    assert shown.page.inner_text("#looking").startswith("Right wrist:")  # held
    shown.page.keyboard.press("Escape")
    assert _heat(shown) == mean


def test_switches_hide_and_show_poses(shown) -> None:
    for pose in ("refined", "coarse", "truth"):
        group, box = shown.page.locator(f"#space .{pose}"), shown.page.locator(f"#switches [data-pose={pose}] input")
        assert group.is_visible()
        box.uncheck()
        assert not group.is_visible()
        box.check()
        assert group.is_visible()


def test_persons_are_switched_and_one_without_truth_says_so(page_file: Path, people) -> None:
    with opened(page_file) as shown:
        page, first = shown.page, (_heat(shown), _skeleton(shown))
        assert _errors(shown).keys() == {"refined", "coarse"}
        page.keyboard.press("ArrowRight")
        assert page.locator("#person option:checked").inner_text() == "second"
        second = _heat(shown), _skeleton(shown)
        assert second[0] != first[0] and second[1] != first[1]
        assert not page.locator("#switches [data-pose=truth]").is_visible()
        assert not page.locator("#space .truth").is_visible()
        assert page.inner_text("#errors").startswith("The refined pose lies ")
        page.click("#next")  # round to the first
        assert (_heat(shown), _skeleton(shown)) == first
        page.click("#previous")
        page.select_option("#person", "0")
        assert (_heat(shown), _skeleton(shown)) == first
        page.focus("#retention")
        page.keyboard.press("ArrowRight")  # the slider's own key
        assert page.evaluate("[state.person, state.stop]") == [0, 5]
        shown.assert_alone()


def test_hostile_text_stays_text(shown) -> None:
    assert shown.page.inner_text("h1") == HOSTILE
    assert shown.page.locator("#person option").first.inner_text() == HOSTILE
    assert shown.page.evaluate("window.broken") is None


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_narrow_screens_and_touch(page_file: Path, dark: bool) -> None:
    with opened(page_file, width=400, height=800, dark=dark) as shown:
        page = shown.page
        page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        background = page.evaluate("getComputedStyle(document.querySelector('.panel')).backgroundColor")
        assert background == ("rgb(30, 34, 40)" if dark else "rgb(244, 245, 247)")
        touch = page.context.new_cdp_session(page)
        touch.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
        mean = _heat(shown)
        page.locator("#look").scroll_into_view_if_needed()
        box = page.locator("#look .joint").nth(WRIST).locator(".dot").bounding_box()
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        until(lambda: page.evaluate("state.held !== null"))
        assert page.inner_text("#looking") == "Left wrist: layer 3, all heads."
        assert _heat(shown) != mean
        page.locator("#space").scroll_into_view_if_needed()
        box = page.locator("#space").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def fingers(kind: str, apart: float) -> None:
            points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        fingers("touchStart", 30)
        fingers("touchMove", 45)
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        until(lambda: page.evaluate("Math.abs(state.view.zoom - 1.5) < .01"))
        assert page.evaluate("[state.view.yaw, state.view.pitch]") == [28, 12]
        shown.assert_alone()


# --- other lifters, and the commands ---------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, Path]:
    """A picture with a synthetic person, and its pose file."""
    scene = generate(1, seed=21).scene(0)
    image, pose = tmp_path / "<img src=x onerror=broken()>.png", tmp_path / "pose.json"
    assert cv2.imwrite(str(image), scene["image"].numpy()[..., ::-1])
    pose.write_text(json.dumps({"keypoints": scene["pose_2d"].tolist()}), encoding="utf-8")
    return image, pose


def test_context_aware_poseformer_shows_the_places_it_reads(photo, tmp_path: Path) -> None:
    pipeline = small_pipeline("context-aware-poseformer").eval()
    image, pose = photo
    results = lift_images(pipeline, [image], read_pose_file(pose, [image]))
    shown_people = viewer.people_of(results, pipeline)
    [person] = viewer.viewer_data(pipeline, shown_people)["people"]
    np.testing.assert_allclose(person["refined"][0], results[0].pose_3d, atol=2e-5)
    with torch.inference_mode():
        maps = pipeline.read(normalise_image(results[0].crop)[None])
        [(places, weights)] = pipeline.lifter.context_places(maps, *(one[None] for one in shown_people[0].inputs))
    levels, heads, samples = len(maps), 2, 2
    expected = [
        [level, 96 * (x + 1), 128 * (y + 1), weight]
        for level in range(levels)
        for (x, y), weight in zip(
            places[0, level, WRIST].flatten(0, 1).tolist(), weights[0, level, WRIST].flatten().tolist(), strict=True
        )
    ]
    np.testing.assert_allclose(person["places"][0][WRIST], expected, atol=0.006)
    viewer.write_viewer(tmp_path / "viewer.html", pipeline, shown_people, "Lifted people")
    with opened(tmp_path / "viewer.html") as shown:
        dots = shown.page.locator("#look .place")
        assert dots.count() == 0
        _hover(shown, WRIST)
        assert dots.count() == levels * heads * samples
        shown.page.select_option("#level", "1")
        _hover(shown, WRIST)
        assert dots.count() == heads * samples
        assert shown.page.inner_text("#looking") == "Left wrist: 4 places read by block 1. Area is weight."
        assert shown.page.locator("#switches label:visible").all_inner_texts() == ["lifted"]
        shown.assert_alone()


def test_a_lifter_that_sees_no_image_shows_its_pose(photo, tmp_path: Path) -> None:
    pipeline = small_pipeline("pose-only").eval()
    image, pose = photo
    results = lift_images(pipeline, [image], read_pose_file(pose, [image]))
    viewer.write_viewer(tmp_path / "viewer.html", pipeline, viewer.people_of(results, pipeline), "Lifted people")
    with opened(tmp_path / "viewer.html", width=400) as shown:
        _hover(shown, KNEE)
        assert shown.page.inner_text("#looking") == "Right knee."
        np.testing.assert_allclose(shown.page.evaluate("person().refined[0]"), results[0].pose_3d, atol=2e-5)
        assert shown.page.evaluate("document.documentElement.scrollWidth") == 400
        assert shown.page.locator("#next").is_disabled()
        shown.assert_alone()


def _run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_lift_writes_the_page_where_asked(photo, tmp_path: Path) -> None:
    image, pose = photo
    out = tmp_path / "out"
    command = ("lift", image, "--pose", pose, "--checkpoint", DEMO_CHECKPOINT, "--no-pictures", "--out", out)
    assert _run(*command).stdout == f"Lifted 1 person: {out / 'poses.json'}.\n"
    assert [path.name for path in out.iterdir()] == ["poses.json"]
    result = _run(*command, "--html")
    page = out / "viewer.html"
    assert result.stdout == f"Lifted 1 person: {out / 'poses.json'}. {page} shows them in a browser.\n", result.output
    [entry] = json.loads((out / "poses.json").read_text(encoding="utf-8"))["images"]
    with opened(page) as shown:
        assert shown.page.locator("#person option").inner_text() == str(image)
        refined, coarse = shown.page.evaluate("[person().refined[DATA.trained], person().coarse]")
        np.testing.assert_allclose(refined, entry["pose_3d"], atol=2e-5)
        np.testing.assert_allclose(coarse, entry["coarse_pose_3d"], atol=2e-5)
        shown.assert_alone()


def test_the_page_says_that_the_default_model_is_a_demonstration(photo, tmp_path: Path) -> None:
    image, pose = photo
    assert _run("lift", image, "--pose", pose, "--no-pictures", "--out", tmp_path / "out", "--html").exit_code == 0
    assert f'<p class="faint">{cli.DEMONSTRATION}</p>' in (tmp_path / "out" / "viewer.html").read_text("utf-8")


def test_commands_refuse_what_no_page_shows(photo, tmp_path: Path) -> None:
    image, pose = photo
    video = write_video(tmp_path / "clip.avi", [(40, 30)])
    result = _run("lift", video, "--pose-model", "model.onnx", "--html")
    assert (result.exit_code, result.stderr) == (2, "error: --html shows people of pictures, got a video\n")
    result = _run("lift", *[image] * 101, "--pose", pose, "--html")
    assert (result.exit_code, result.stderr) == (2, "error: --html: expected at most 100 people on a page, got 101\n")
    result = _run("demo", "--people", 101, "--html", "--out", tmp_path / "demo")
    assert (result.exit_code, result.stderr) == (2, "error: --html: expected at most 100 people on a page, got 101\n")
    assert not (tmp_path / "demo").exists()
