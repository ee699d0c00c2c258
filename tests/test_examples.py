"""Every script in examples/, run as a user runs it: it checks itself, and says what examples/README.md promises."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAID = {
    "compile_the_lifter.py": r"Inference: one graph, outputs equal, [\d.]+x as fast as eager here\.\n"
    r"Training step: one graph, \d+ gradients equal\.\n",
    "cuda_graph.py": (
        r"Replayed outputs equal the eager ones\.\n"
        if torch.cuda.is_available()
        else r"skipped: a CUDA graph needs a CUDA device\.\n"
    ),
    "export_the_lifter.py": "".join(
        rf"From {source}, batch {size}: ONNX Runtime within 0\.0\d+ mm of the fused lifter\.\n"
        for source in ("features", "image")
        for size in (2, 5)
    )
    + r"torch\.export: the programs' poses equal their modules'\.\n",
    "ops_in_a_training_loop.py": r"Gradients by the backend \w+ equal the reference's\.\n"
    r"Loss [\d.]+ before, [\d.]+ after 200 steps\.\n",
    "precomputed_features.py": r"Every stored feature is its encoder's, rounded to float16\.\n"
    r"Loss [\d.]+ before, [\d.]+ after 20 steps without the encoder\.\n"
    r"Rounding moves poses by at most [\d.]+ mm, another's image by up to \d+ mm\.\n",
    "replace_cross_attention.py": r"Decoder layer: outputs and gradients equal, [\d.]+x as fast in inference here\.\n"
    r"Cross-attention: outputs and gradients equal, [\d.]+x as fast in inference here\.\n",
}


def test_every_example_is_tried_and_named() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(SAID)
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert scripts == set(re.findall(r"\(([a-z_]+\.py)\)", page))


@pytest.mark.parametrize("name", sorted(SAID))
def test_example(name: str, tmp_path: Path) -> None:
    if name == "export_the_lifter.py":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # a user has no interpreter
    run = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(SAID[name], run.stdout), run.stdout
    assert list(tmp_path.iterdir()) == []


SCRIPT = runpy.run_path(str(EXAMPLES / "replace_cross_attention.py"))


@pytest.mark.parametrize(
    "option",
    [
        {"dropout": 0.1},
        {"batch_first": False},
        {"bias": False},
        {"kdim": 8},
        {"add_zero_attn": True},
        {"add_bias_kv": True},
    ],
)
def test_adapter_refuses_what_it_would_compute_otherwise(option: dict[str, object]) -> None:
    sentence = "FusedCrossAttention: expected batch_first, one width, biases, dropout 0 and no added key"
    attention = torch.nn.MultiheadAttention(16, 2, **{"batch_first": True, **option})
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        SCRIPT["FusedCrossAttention"](attention)


@pytest.mark.parametrize("option", [{"activation": "relu"}, {"norm_first": True}, {"layer_norm_eps": 1e-6}])
def test_replace_layer_refuses_other_layers(option: dict[str, object]) -> None:
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, **{"activation": "gelu", **option})
    with pytest.raises(
        ValueError, match="^replace_layer: expected a post-norm layer with GELU and layer_norm_eps 1e-5$"
    ):
        SCRIPT["replace_layer"](layer)
