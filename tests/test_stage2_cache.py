"""The stage-2 cache: the same numbers as without it, resumed by presence, refused for anything else than it holds."""

import io
import json
import shutil
from collections import namedtuple
from threading import Event

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import default_collate

from liftbyimage.batches import make_batch, mirror
from liftbyimage.data.source import CorruptRecord, Source
from liftbyimage.data.synthetic import SyntheticPeople
from liftbyimage.models import LiftByImage, LiftByImageConfig, Pipeline, PoseOnlyLifter, TinyEncoder
from liftbyimage.training import TrainingConfig, stage2_cache, train
from liftbyimage.training.prefetch import prefetch
from liftbyimage.training.signals import StopRequest
from liftbyimage.training.stage2_cache import Stage2Cache
from liftbyimage.training.stages import FocusedExploration

COUNT = 10
PER_SHARD = 4
CONFIG = {"image_channels": 8, "grid": (16, 12), "dim": 16, "heads": 2, "dropout": 0.1}
SHARDS = [f"shard-0000{shard}.npy" for shard in range(3)]
STAGE = FocusedExploration()


class Records(Source):
    """Records of another source, as it came when this was made; those in `corrupt` cannot be read."""

    corrupt = ()

    def __init__(self, source, corrupt=(), drop=(), **description):
        self.source = source
        self.records = [{k: v for k, v in source[i].items() if k not in drop} for i in range(len(source))]
        self.groups, self.size, self.corrupt, self.reads = source.groups, source.size, corrupt, []
        self.description = {**source.description, **description}

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.corrupt:
            raise CorruptRecord(f"record {index} is torn")
        return self.records[index]


@pytest.fixture(scope="module")
def people():
    return Records(SyntheticPeople(count=COUNT, size=(64, 48), seed=3))


def make_pipeline(formulation="auto", seed=0, **config):
    """With batch-norm statistics that differ from a new one's, in training mode."""
    torch.manual_seed(seed)
    pipeline = Pipeline(TinyEncoder(8), LiftByImage(LiftByImageConfig(**{**CONFIG, **config}), formulation))
    pipeline(torch.randn(4, 3, 64, 48), torch.rand(4, 17, 2))
    return pipeline


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Four records a shard, at two copies of rows of 32-bit patches."""
    row = stage2_cache._row_type(LiftByImage(LiftByImageConfig(**CONFIG)), torch.float32)
    monkeypatch.setattr(stage2_cache, "SHARD_BYTES", 2 * PER_SHARD * row.itemsize)


def open_cache(folder, pipeline, people, **options):
    return Stage2Cache.open(folder, pipeline, people, **{"flip": True, "batch_size": 3, **options})


def kept_directly(pipeline, people, index, mirrored):
    batch = make_batch(pipeline.lifter, default_collate([people.records[i] for i in index]))
    batch = mirror(pipeline.lifter, batch, mirrored)
    return STAGE.keep(pipeline, batch), batch.pose_3d


def dense(kept):
    patches = kept.patches if isinstance(kept.patches, torch.Tensor) else kept.patches.dense()
    return kept._replace(patches=patches)


@pytest.mark.parametrize("formulation, retention", [("auto", 0.3), ("auto", 1.0), ("projected", 0.3)])
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_what_the_frozen_stage_makes_of_records(tmp_path, people, formulation, retention, workers):
    pipeline = make_pipeline(formulation, retention=retention)
    cache = open_cache(tmp_path, pipeline, people, workers=workers)
    assert len(cache) == COUNT and cache.problems == {}
    index = torch.tensor([9, 0, 5, 5, 4, 3, 8, 0])
    mirrored = torch.tensor([True, False, True, False, True, False, False, True])
    kept, pose_3d = cache.batch(index, mirrored)
    expected, truth = kept_directly(pipeline.eval(), people, index.tolist(), mirrored)
    for actual, correct in zip((*kept, pose_3d), (*dense(expected), truth), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, correct, atol=2e-6, rtol=2e-6)
    assert torch.equal(pose_3d, truth)


def test_a_batch_may_be_empty(tmp_path, people, pipeline):
    cache = open_cache(tmp_path, pipeline, people)
    kept, pose_3d = cache.batch(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool))
    assert [list(part.shape) for part in (*kept, pose_3d)] == [[0, 17, 16], [0, 57, 16], [0, 17, 3], [0, 17, 3]]


def test_mirrored_rows_differ_from_straight_ones(tmp_path, people, pipeline):
    """Or the test above would not see that they were swapped."""
    cache = open_cache(tmp_path, pipeline, people)
    index = torch.arange(COUNT)
    straight, _ = cache.batch(index, torch.zeros(COUNT, dtype=torch.bool))
    other, _ = cache.batch(index, torch.ones(COUNT, dtype=torch.bool))
    for a, b in zip(straight, other, strict=True):
        assert ((a - b).flatten(1).abs().amax(1) > 1e-3).all()


def test_modes_and_random_numbers_are_left_as_they_were(tmp_path, people, pipeline):
    pipeline.encoder.eval()
    modes = [module.training for module in pipeline.modules()]
    state = {name: tensor.clone() for name, tensor in pipeline.state_dict().items()}
    generator = torch.get_rng_state()
    open_cache(tmp_path, pipeline, people)
    assert [module.training for module in pipeline.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipeline.state_dict().items())


def train_stage_2(pipeline, read, steps=12):
    """Losses of some steps with dropout, each reading (index, mirrored) of the same order."""
    STAGE.train(pipeline)
    optimiser = torch.optim.Adam(STAGE.parameters(pipeline), lr=1e-3)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        index = torch.randperm(COUNT, generator=generator)[:6]
        kept, pose_3d = read(index, torch.rand(6, generator=generator) < 0.5)
        torch.manual_seed(step)
        loss = (STAGE.explore(pipeline, kept) - pose_3d).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_losses_of_stage_2_are_those_without_the_cache(tmp_path, people):
    cached, direct = make_pipeline(), make_pipeline()
    cache = open_cache(tmp_path, cached, people)
    with_cache = train_stage_2(cached, cache.batch)
    without = train_stage_2(direct, lambda index, mirrored: kept_directly(direct, people, index.tolist(), mirrored))
    torch.testing.assert_close(with_cache, without, atol=0, rtol=1e-6)
    assert with_cache[-4:].mean() < with_cache[:4].mean()


def test_training_is_the_same_with_and_without_the_cache(tmp_path, people):
    """Both stages; the second run with the cache finds it whole."""
    settings = {"encoder": "tiny", "encoder_config": {"channels": 8}, "lifter": {"dim": 16, "heads": 2}}
    settings |= {"epochs": 1, "stage2_epochs": 3, "batch_size": 4, "device": "cpu"}
    cache = str(tmp_path / "cache")

    def curves(out, **more):
        console = Console(file=io.StringIO())
        return train(TrainingConfig(**settings, **more), tmp_path / out, source=people, console=console).curves["loss"]

    without, first = curves("without"), curves("first", cache=cache)
    people.reads.clear()
    second = curves("second", cache=cache)
    assert len(people.reads) < 2 * COUNT  # of stage 1's epoch and a look at the first record; none of stage 2
    assert first == second and first["stage 1"] == without["stage 1"]
    assert len(first["stage 2"]) == 9
    assert first["stage 2"] == pytest.approx(without["stage 2"], rel=1e-6, abs=0)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_only_a_missing_shard_is_computed_again(tmp_path, people, pipeline):
    open_cache(tmp_path, pipeline, people)
    before = files(tmp_path)
    assert list(before) == ["key.json", *sorted(name for s in SHARDS for name in (s, s.replace("npy", "json")))]
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in SHARDS}
    (tmp_path / SHARDS[1]).unlink()
    people.reads.clear()
    open_cache(tmp_path, pipeline, people)
    assert people.reads == [4, 5, 6, 7]
    assert files(tmp_path) == before
    for name in (SHARDS[0], SHARDS[2]):
        assert (tmp_path / name).stat().st_mtime_ns == times[name]


def test_broken_problems_of_a_shard_are_refused(tmp_path, people, pipeline):
    open_cache(tmp_path, pipeline, people)
    problems = tmp_path / SHARDS[1].replace("npy", "json")
    problems.write_text("{")
    with pytest.raises(ValueError) as error:
        open_cache(tmp_path, pipeline, people)
    assert str(error.value) == f"cache: {problems} is not valid JSON; delete it, and its shard is made anew"
    problems.unlink()
    people.reads.clear()
    open_cache(tmp_path, pipeline, people)
    assert people.reads == [4, 5, 6, 7]


def test_a_cut_shard_is_computed_again(tmp_path, people, pipeline):
    open_cache(tmp_path, pipeline, people)
    before = files(tmp_path)
    (tmp_path / SHARDS[2]).write_bytes(before[SHARDS[2]][:-1])
    open_cache(tmp_path, pipeline, people)
    assert files(tmp_path) == before


def test_interrupted_writing_leaves_no_half_shard(tmp_path, people, pipeline, monkeypatch):
    def keep(stage, *arguments):
        calls.append(1)
        if len(calls) == 8:  # in the second shard, of two batches of two copies
            raise KeyboardInterrupt
        return whole(stage, *arguments)

    calls, whole = [], FocusedExploration.keep
    monkeypatch.setattr(FocusedExploration, "keep", keep)
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path / "cut", pipeline, people)
    assert sorted(files(tmp_path / "cut")) == ["key.json", "shard-00000.json", "shard-00000.npy"]
    monkeypatch.undo()
    small = stage2_cache._row_type(pipeline.lifter, torch.float32).itemsize * 2 * PER_SHARD
    monkeypatch.setattr(stage2_cache, "SHARD_BYTES", small)
    open_cache(tmp_path / "cut", pipeline, people)
    open_cache(tmp_path / "whole", pipeline, people)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_two_ranks_share_the_shards(tmp_path, people, pipeline):
    open_cache(tmp_path / "one", pipeline, people)
    for rank, reads in ((1, [4, 5, 6, 7]), (0, [0, 1, 2, 3, 8, 9])):
        people.reads.clear()
        open_cache(tmp_path / "two", pipeline, people, rank=rank, world=2)
        assert people.reads == reads
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_shards_are_plain_files_of_numpy(tmp_path, people, pipeline):
    cache = open_cache(tmp_path, pipeline, people)
    rows = np.load(tmp_path / SHARDS[2], mmap_mode="r", allow_pickle=False)
    assert rows.shape == (4,)  # two records, straight and mirrored
    kept, pose_3d = cache.batch(torch.tensor([9]), torch.tensor([True]))
    for name, tensor in {**kept._asdict(), "pose_3d": pose_3d}.items():
        assert np.array_equal(rows[name][3], tensor[0].numpy())


def test_few_shards_are_open_at_a_time(tmp_path, people, pipeline, monkeypatch):
    monkeypatch.setattr(stage2_cache, "OPEN_SHARDS", 1)
    cache = open_cache(tmp_path, pipeline, people)
    index, straight = torch.tensor([9, 0, 4, 1]), torch.zeros(4, dtype=torch.bool)
    together, _ = cache.batch(index, straight)
    for position, one in enumerate(index):
        alone, _ = cache.batch(one[None], straight[:1])
        assert torch.equal(alone.patches[0], together.patches[position])
        assert len(cache._maps) == 1


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_patches_in_half_the_room(tmp_path, people, pipeline, monkeypatch, dtype, bound):
    monkeypatch.setattr(stage2_cache._Layout, "records_per_shard", PER_SHARD)  # the same batches in both
    index, straight = torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    (whole, truth) = open_cache(tmp_path / "whole", pipeline, people).batch(index, straight)
    half, truth_again = open_cache(tmp_path / "half", pipeline, people, dtype=dtype).batch(index, straight)
    assert half.patches.dtype == torch.float32 and torch.equal(truth, truth_again)
    assert torch.equal(half.joints, whole.joints) and torch.equal(half.coarse_pose_3d, whole.coarse_pose_3d)
    assert torch.equal(half.patches, whole.patches.to(dtype).float())
    normal = whole.patches.abs() > 1e-4  # float16 holds smaller ones with fewer digits
    assert 0 < ((half.patches - whole.patches).abs() / whole.patches.abs())[normal].max() <= bound
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.npy")) for name in ("half", "whole")]
    assert sizes[0] < 0.7 * sizes[1]


def test_patches_beyond_float16_are_refused(tmp_path, people, pipeline):
    with torch.no_grad():
        pipeline.lifter.embed.bias.fill_(1e5)
    with pytest.raises(ValueError, match=r"^Stage2Cache: patches reach 1e\+05, beyond dtype float16$"):
        open_cache(tmp_path, pipeline, people, dtype=torch.float16)


def test_asked_to_stop_it_ends_between_shards_and_goes_on_later(tmp_path, people, pipeline, monkeypatch):
    monkeypatch.setattr(stage2_cache._Layout, "records_per_shard", PER_SHARD)
    stop = StopRequest()
    torn = Records(people.source, corrupt=())
    read = torn.__class__.__getitem__

    def ask_after_some(self, index):
        stop.requested = stop.requested or index >= PER_SHARD
        return read(self, index)

    monkeypatch.setattr(Records, "__getitem__", ask_after_some)
    assert open_cache(tmp_path, pipeline, torn, stop=stop) is None
    there = sorted(path.name for path in tmp_path.glob("*.npy"))
    assert there == ["shard-00000.npy"] and not list(tmp_path.glob(".*"))
    stop.requested = False
    monkeypatch.setattr(Records, "__getitem__", read)
    assert len(open_cache(tmp_path, pipeline, torn, stop=stop)) == COUNT


def test_stage_1_computes_in_the_runs_precision(tmp_path, people, pipeline):
    index, straight = torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    whole, _ = open_cache(tmp_path / "whole", pipeline, people).batch(index, straight)
    mixed, _ = open_cache(tmp_path / "mixed", pipeline, people, precision="bfloat16").batch(index, straight)
    with torch.autocast("cpu", torch.bfloat16):
        expected = STAGE.keep(pipeline.eval(), make_batch(pipeline.lifter, default_collate(people.records)))
    off = (whole.joints - mixed.joints).abs().max()
    assert off > 1e-4 and (expected.joints.float() - mixed.joints).abs().max() < off / 3


CHANGES = {
    "retention": (
        lambda pipeline, people: (make_pipeline(retention=0.5), people, {}),
        "lifter.retention: 0.3 there, 0.5 here",
    ),
    "flip": (lambda pipeline, people: (pipeline, people, {"flip": False}), "flip: true there, false here"),
    "dtype": (
        lambda pipeline, people: (pipeline, people, {"dtype": torch.bfloat16}),
        'dtype: "float32" there, "bfloat16" here',
    ),
    "precision": (
        lambda pipeline, people: (pipeline, people, {"precision": "bfloat16"}),
        'precision: "float32" there, "bfloat16" here',
    ),
    "source": (
        lambda pipeline, people: (pipeline, Records(people, seed=4, extra=1), {}),
        "source.seed: 3 there, 4 here; source.extra: absent there, 1 here",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_origin_is_refused(tmp_path, people, pipeline, change, monkeypatch):
    monkeypatch.setattr(stage2_cache._Layout, "records_per_shard", PER_SHARD)
    open_cache(tmp_path, pipeline, people)
    before = files(tmp_path)
    make, difference = CHANGES[change]
    other, source, options = make(pipeline, people)
    if change == "retention":
        other.load_state_dict(pipeline.state_dict())
    with pytest.raises(ValueError) as caught:
        open_cache(tmp_path, other, source, **options)
    assert str(caught.value) == (
        f"cache: {tmp_path} was made of something else ({difference}); name another folder or delete that one"
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["encoder.stem.1.running_mean", "lifter.stage1.2.norm3.bias"])
def test_other_weights_are_refused(tmp_path, people, pipeline, name):
    state = pipeline.state_dict()
    open_cache(tmp_path, pipeline, people)
    there = json.loads((tmp_path / "key.json").read_text())["weights"]
    with torch.no_grad():
        state[name].view(-1)[0].add_(1e-3)
    here = stage2_cache._digest(pipeline)
    assert here[:39] != there[:39]
    with pytest.raises(ValueError) as caught:
        open_cache(tmp_path, pipeline, people)
    difference = f'weights: "{there[:39]}… there, "{here[:39]}… here'
    assert str(caught.value) == (
        f"cache: {tmp_path} was made of something else ({difference}); name another folder or delete that one"
    )


def test_weights_of_stage_2_do_not_matter(tmp_path, people, pipeline):
    open_cache(tmp_path, pipeline, people)
    with torch.no_grad():
        for parameter in pipeline.lifter.stage2_parameters():
            parameter.add_(1)
    people.reads.clear()
    open_cache(tmp_path, pipeline, people)
    assert people.reads == []


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, people, pipeline, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9 * 10**9, 0, 1.2 * 10**9))
    monkeypatch.setattr(stage2_cache._Layout, "file_size", lambda layout, shard: 2 * 10**9)
    with pytest.raises(ValueError) as caught:
        open_cache(tmp_path / "new", pipeline, people)
    assert str(caught.value) == f"cache: {tmp_path}/new needs 6.0 GB, 1.2 GB free"
    assert not (tmp_path / "new").exists()


def test_corrupt_records_are_counted_and_stood_in_for(tmp_path, people, pipeline):
    torn = Records(SyntheticPeople(count=COUNT, size=(64, 48), seed=3), corrupt=(5, 9))
    cache = open_cache(tmp_path, pipeline, torn)
    assert cache.problems == {5: "record 5 is torn", 9: "record 9 is torn"}
    straight = torch.zeros(2, dtype=torch.bool)
    stand_ins, truth = cache.batch(torch.tensor([5, 9]), straight)
    read, same_truth = cache.batch(torch.tensor([6, 0]), straight)
    assert torch.equal(truth, same_truth)
    torch.testing.assert_close(stand_ins.patches, read.patches, atol=1e-6, rtol=1e-6)
    assert open_cache(tmp_path, pipeline, torn).problems == cache.problems
    with pytest.raises(CorruptRecord, match="^record 5 is torn$"):
        open_cache(tmp_path, pipeline, torn, strict=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_a_corrupt_record(tmp_path, pipeline, workers):
    torn = Records(SyntheticPeople(count=COUNT, size=(64, 48), seed=3), corrupt=(5,))
    with pytest.raises(CorruptRecord, match="^record 5 is torn$"):
        open_cache(tmp_path, pipeline, torn, strict=True, workers=workers)
    assert sorted(files(tmp_path)) == ["key.json", "shard-00000.json", "shard-00000.npy"]


def test_bad_arguments_are_refused(tmp_path, people, pipeline):
    def refused(kind, text, *arguments, **options):
        with pytest.raises(kind) as caught:
            open_cache(*arguments, **options)
        assert str(caught.value) == text

    folder = tmp_path / "cache"
    pose_only = Pipeline(None, PoseOnlyLifter())
    refused(TypeError, "Stage2Cache: pipeline must hold a LiftByImage, got a PoseOnlyLifter", folder, pose_only, people)
    refused(
        ValueError,
        "Stage2Cache: the lifter's formulation must not be 'factored', for stored patches are formed",
        folder,
        make_pipeline("factored"),
        people,
    )
    refused(
        ValueError,
        "Stage2Cache: dtype must be float32, float16 or bfloat16, got torch.float64",
        folder,
        pipeline,
        people,
        dtype=torch.float64,
    )
    assert not folder.exists()
    unknown = Records(SyntheticPeople(count=2, size=(64, 48)), drop=("pose_3d",))
    text = "Stage2Cache: source must know the true poses, got records without pose_3d"
    refused(ValueError, text, folder, pipeline, unknown)
    file = tmp_path / "file"
    file.write_text("")
    refused(ValueError, f"cache: {file} must be a folder, got a file", file, pipeline, people)
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / SHARDS[0]).write_text("")
    text = f"cache: {stray} holds shards without the key.json that says what they were made of"
    refused(ValueError, text, stray, pipeline, people)
    (stray / "key.json").write_text("{")
    refused(ValueError, f"cache: {stray}/key.json is not the key.json of a cache", stray, pipeline, people)


def test_bad_batches_are_refused(tmp_path, people, pipeline):
    cache = open_cache(tmp_path, pipeline, people, flip=False)
    index, straight = torch.tensor([0, 1]), torch.tensor([False, False])

    def refused(kind, text, *arguments):
        with pytest.raises(kind) as caught:
            cache.batch(*arguments)
        assert str(caught.value) == f"Stage2Cache.batch: {text}"

    refused(TypeError, "index must be a tensor of torch.int64, got list", [0, 1], straight)
    refused(TypeError, "mirrored must be a tensor of torch.bool, got torch.int64", index, index)
    refused(ValueError, "index and mirrored must both have shape [B], got [2] and [1]", index, straight[:1])
    refused(ValueError, "index must be in 0 … 9, got 0 … 10", torch.tensor([0, 10]), straight)
    refused(
        ValueError,
        "mirrored must be all False, for the cache was made with flip=False",
        index,
        torch.tensor([0, 1]) > 0,
    )


def test_prefetch_keeps_order_and_reads_one_ahead():
    read = []

    def square(key):
        read.append(key)
        return key**2

    values = prefetch(square, range(5))
    assert next(values) == 0
    values.close()
    assert read == [0, 1]
    assert list(prefetch(square, range(5))) == [0, 1, 4, 9, 16]
    assert list(prefetch(square, [])) == []


def test_prefetch_raises_where_the_value_is_asked_for():
    values = prefetch(lambda key: 1 // key, [1, 1, 0, 1])
    assert next(values) == next(values) == 1
    with pytest.raises(ZeroDivisionError):
        next(values)
    assert list(values) == []


def test_prefetch_reads_while_the_caller_works():
    started = Event()
    values = prefetch(lambda key: started.set() if key == 1 else key, [0, 1])
    assert next(values) == 0
    assert started.wait(10)
    values.close()
