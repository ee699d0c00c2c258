"""The fastest exact way to run an encoder on this machine: built, verified and timed here, then chosen."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liftbyimage.models.folding import fold_batch_norm
from liftbyimage.models.packed_conv import pack_convolutions, why_not_pack

PLAIN = "plain"
# Largest error against the encoder as it was, relative to the RMS of its output, for the dtype computed in.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}

_WARM_UP, _ROUNDS = 1, 5
_SECONDS = 10.0  # no new round begins after that


@dataclass(frozen=True)
class Candidate:
    """One way to run the encoder: how long it took and how far it is off, or why it was not considered."""

    name: str
    milliseconds: float | None = None  # median of a few calls, taken in turn with the others
    error: float | None = None  # largest, relative to the output's RMS
    why_not: str | None = None


@dataclass(frozen=True)
class OptimizationReport:
    """What `Pipeline.optimize` tried on the images it was given, and what it chose."""

    chosen: str
    candidates: tuple[Candidate, ...]

    @property
    def speedup(self) -> float:
        """Time of the encoder as it was over that of the chosen one."""
        milliseconds = {c.name: c.milliseconds for c in self.candidates if c.milliseconds is not None}
        return milliseconds[PLAIN] / milliseconds[self.chosen]

    def __str__(self) -> str:
        width = max(len(candidate.name) for candidate in self.candidates)
        lines = [f"encoder: {self.chosen}, {self.speedup:.2f} times as fast as {PLAIN}"]
        for c in self.candidates:
            figures = c.why_not or f"{c.milliseconds:8.2f} ms, largest error {c.error:.1e} of the RMS"
            lines.append(f"  {c.name:{width}}  {figures}")
        return "\n".join(lines)


class OptimizedEncoder(nn.Module):
    """An encoder for inference, made by `optimize_encoder`, in `dtype`: calling it gives what one method of the
    original, `features` or `branches`, gave, and it has that method.

    It takes images of the dtype and on the device it was made for, of any batch and size the original takes. An image
    that holds NaN or infinity gives NaN features.
    """

    def __init__(
        self, run: nn.Module, encoder: nn.Module, method: str, images_dtype: torch.dtype, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.run = run
        self.method = method
        self.channels = getattr(encoder, "channels", None)
        self.branch_channels = getattr(encoder, "branch_channels", None)
        self.images_dtype, self.dtype = images_dtype, dtype
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        # Any other dtype goes on as it is, for the encoder's own check to refuse.
        maps = self.run(images.to(self.dtype) if images.dtype == self.images_dtype else images)
        # Fused rectifiers make NaN zero; zero times an image is zero, or NaN if the image holds NaN or infinity.
        spoiled = (images * 0).sum(dim=(1, 2, 3), keepdim=True)
        if isinstance(maps, Tensor):
            return maps + spoiled.to(maps.dtype)
        return [one + spoiled.to(one.dtype) for one in maps]

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, C, Hf, Wf], if it was made of the method of that name."""
        self._require("features")
        return self(images)

    def branches(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → maps of `branch_channels`, if it was made of the method of that name."""
        self._require("branches")
        return self(images)

    def _require(self, method: str) -> None:
        if method != self.method:
            raise RuntimeError(f"OptimizedEncoder: was made of {self.method}(), and has no {method}()")

    def train(self, mode: bool = True) -> OptimizedEncoder:
        if mode:
            raise RuntimeError("OptimizedEncoder: is for inference only; train the encoder it was made from")
        return super().train(False)


class _Method(nn.Module):
    def __init__(self, encoder: nn.Module, method: str) -> None:
        super().__init__()
        self.encoder, self.method = encoder, method

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        return getattr(self.encoder, self.method)(images)


class _ChannelsLast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.contiguous(memory_format=torch.channels_last))


class _Compiled(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = torch.compile(network)

    def forward(self, images: Tensor) -> Tensor:
        from torch._inductor import config  # slow to import, and of use only here

        # Frozen weights become constants laid out for oneDNN. As an option of torch.compile it does not reach the
        # tracing of the weights, and every new size compiles again.
        with config.patch(freezing=True):
            return self.network(images)


@torch.no_grad()
def optimize_encoder(
    encoder: nn.Module,
    images: Tensor,
    method: str = "features",
    *,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> tuple[OptimizedEncoder, OptimizationReport]:
    """The fastest of several ways to run `encoder.features`, or another `method`, each verified before it is timed on
    `images`.

    The ways: as it is; with batch norms folded into convolutions; that in channels-last layout; that with convolutions
    packed for oneDNN (CPU); on demand in bfloat16 and compiled. Arguments and errors: as `Pipeline.optimize`.
    """
    _check(images, dtype)
    truth = _listed(getattr(encoder, method)(images))
    if not all(one.isfinite().all() for one in truth):
        raise ValueError("Pipeline.optimize: images must give finite features, got some that are not")
    networks, refused = _build(encoder, images, method, {images.dtype, dtype or images.dtype}, compile)
    encoders, errors = {}, {}
    for name, (network, computed_in) in networks.items():
        made = OptimizedEncoder(network, encoder, method, images.dtype, computed_in)
        each = [relative_error(*pair) for pair in zip(_listed(made(images)), truth, strict=True)]
        errors[name] = torch.tensor(each).max().item()  # NaN, if one is
        if errors[name] <= BOUNDS[computed_in]:
            encoders[name] = made
        else:
            bound = f"{BOUNDS[computed_in]:.0e} is allowed"
            refused[name] = f"wrong: its largest error is {errors[name]:.1e} of the RMS, {bound}"
    times = _milliseconds(encoders, images)
    chosen = min(times, key=lambda name: times[name])
    candidates = [Candidate(name, times[name], errors[name]) for name in times]
    candidates += [Candidate(name, why_not=reason) for name, reason in refused.items()]
    return encoders[chosen], OptimizationReport(chosen, tuple(candidates))


def _listed(maps: Tensor | list[Tensor]) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else maps


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the RMS of `expected`; NaN if `actual` holds one."""
    rms = expected.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual.double() - expected.double()).abs().max() / rms).item()


def _check(images: Tensor, dtype: torch.dtype | None) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"Pipeline.optimize: images must be a torch.Tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[0] == 0:
        raise ValueError(
            f"Pipeline.optimize: images must have shape [B, 3, H, W] with B of at least 1, got {list(images.shape)}"
        )
    if dtype not in (None, torch.bfloat16, images.dtype):
        raise ValueError(
            f"Pipeline.optimize: dtype must be None, torch.bfloat16 or the images' {images.dtype}, got {dtype}"
        )


def _build(
    encoder: nn.Module, images: Tensor, method: str, dtypes: set[torch.dtype], compile: bool
) -> tuple[dict[str, tuple[nn.Module, torch.dtype]], dict[str, str]]:
    """By name, the networks with the dtype they compute in, and the reasons why others could not be made."""
    networks: dict[str, tuple[nn.Module, torch.dtype]] = {
        PLAIN: (_Method(copy.deepcopy(encoder), method), images.dtype)
    }
    refused = {}
    try:
        folded = fold_batch_norm(encoder, method)
    except ValueError as error:
        return networks, {"folded": str(error)}
    networks["folded"] = (folded, images.dtype)
    for dtype in sorted(dtypes, key=lambda dtype: dtype != images.dtype):
        suffix = "" if dtype == images.dtype else f", {str(dtype).removeprefix('torch.')}"
        channels_last = _ChannelsLast(copy.deepcopy(folded).to(dtype))
        networks[f"folded, channels-last{suffix}"] = (channels_last, dtype)
        reason = why_not_pack(dtype, images.device)
        if reason is None:
            packed = pack_convolutions(copy.deepcopy(folded).to(dtype), images.to(dtype))
            networks[f"folded, packed{suffix}"] = (packed, dtype)
        else:
            refused[f"folded, packed{suffix}"] = reason
        if compile:
            networks[f"folded, channels-last, compiled{suffix}"] = (_Compiled(channels_last), dtype)
    return networks, refused


def _milliseconds(encoders: Mapping[str, OptimizedEncoder], images: Tensor) -> dict[str, float]:
    """Median time of each, in turn, so that a busy moment of the machine meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    began = time.perf_counter()
    for turn in range(_WARM_UP + _ROUNDS):
        if turn > _WARM_UP and time.perf_counter() - began > _SECONDS:
            break
        for name, encoder in encoders.items():
            _synchronise(images)
            started = time.perf_counter()
            encoder(images)
            _synchronise(images)
            if turn >= _WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}


def _synchronise(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
