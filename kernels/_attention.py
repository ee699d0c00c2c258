"""One attention matrix used both ways: the five kernels behind `attend_patches` and `pose_guided_attention`.

Per sample, A [P, R] = softmax over the P patches of scale · K Qᵀ, for each of G groups of rows that share a
key/value set (G = 1: all R = H·J rows; G = H: J rows each). A is never stored; every kernel recomputes it a tile
at a time. Patches lie on the M axis of every matrix product and rows on N:

                      BLOCK_R rows of one group
                    ┌───────────┐
    BLOCK_P patches │  A tile   │   A = exp(scale · K Qᵀ − lse)
                    └───────────┘

    kernel              one program owns          it loops over        result
    gather              a row block of a group    patch tiles          context, lse (online softmax)
    scatter             a patch tile              groups, row blocks   importance, attention, patches + A U
    row_statistics      a row block of a group    patch tiles          δ, dU
    row_gradients       a row block of a group    patch tiles          dQ
    token_gradients     a patch tile of a group   row blocks           dK, dV

with dA = V dOᵀ + dX Uᵀ + g/R + dAttention, dS = A ∘ (dA − δ) and
δ_r = Σ_p A dA = ⟨O,dO⟩ + ⟨U,dU⟩ + Σ_p A (g/R + dAttention). dU must be complete before δ is known, hence two passes
over the rows. Each output element has one owner and is summed in a fixed order: no atomics, bitwise repeatable,
and independent of the rest of the batch.

A result wider than a tile is split over programs (the last grid factor), which recompute A. Contractions run
over the whole width at once where the tiles fit (WHOLE), else CHUNK columns at a time.

Logits are products first, then scaled, and only then is the log-sum-exp subtracted: where one patch takes all of
a row, its logit is that row's log-sum-exp, and A is exactly 1 even at logits of 1e4. The mask between product and
difference keeps the compiler from fusing the two, which would lose this. A float32 log-sum-exp of large logits
still rounds by more than float32 gradients may: there the backward recomputes Σ A per row and divides by it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_plans import Plan, Shape, Work, chosen
from ._common import on_device, product, resident, tile

LOG2E = tl.constexpr(1.4426950408889634)
RUNTIME_SIZES = ["groups", "group_rows", "num_patches", "scale"]


@triton.jit
def attention_tile(dots, scale, shift, patch_ok, row_ok):
    """exp(scale · dots − shift); `shift` is the log-sum-exp, or the row maximum where the sum is divided by after."""
    logits = tl.where(patch_ok[:, None] & row_ok[None, :], dots * scale, float("-inf"))
    return tl.exp2((logits - shift[None, :]) * LOG2E)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def gather_kernel(
    query_pointer, key_pointer, value_pointer, context_pointer, lse_pointer, largest_pointer, total_pointer,
    groups, group_rows, num_patches, scale,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """context and lse of BLOCK_R rows; `value_pointer` None means that the tokens are key and value."""
    parts: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row_blocks = tl.cdiv(group_rows, BLOCK_R)
    program = tl.program_id(0)
    part = program % parts
    row = (program // parts) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    group = (program // parts // row_blocks).to(tl.int64)  # b · G + g
    row_ok = row < group_rows
    query_pointer += group * group_rows * E
    key_pointer += group * num_patches * E
    if value_pointer is not None:
        value_pointer += group * num_patches * F
    query = resident(query_pointer, row, row_ok, E, BLOCK_E, WHOLE)

    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    context = tl.zeros([BLOCK_F, BLOCK_R], tl.float32)  # transposed: rows stay on the N axis
    for first in range(0, num_patches, BLOCK_P):
        patch = first + tl.arange(0, BLOCK_P)
        patch_ok = patch < num_patches
        key = resident(key_pointer, patch, patch_ok, E, BLOCK_E, WHOLE)
        dots = product(
            key, key_pointer, patch, patch_ok, query, query_pointer, row, row_ok,
            E, CHUNK, WHOLE, PRECISION,
        )  # fmt: skip
        logits = tl.where(patch_ok[:, None], dots * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a tile of -inf alone must not give inf - inf
        weight = tl.exp2((logits - shift[None, :]) * LOG2E)
        shrink = tl.exp2((largest - shift) * LOG2E)
        total = total * shrink + tl.sum(weight, 0)
        if value_pointer is not None:
            value = tile(value_pointer, patch, patch_ok, part * BLOCK_F, F, BLOCK_F)
        elif WHOLE:
            value = key
        else:
            value = tile(key_pointer, patch, patch_ok, part * BLOCK_F, F, BLOCK_F)
        context = tl.dot(tl.trans(value), weight.to(value.dtype), context * shrink[None, :], input_precision=PRECISION)
        largest = larger

    context = context / total[None, :]
    column = part * BLOCK_F + tl.arange(0, BLOCK_F)
    tl.store(
        context_pointer + group * group_rows * F + row[None, :] * F + column[:, None],
        context.to(context_pointer.dtype.element_ty),
        mask=row_ok[None, :] & (column < F)[:, None],
    )
    if part == 0:
        offset = group * group_rows + row
        tl.store(lse_pointer + offset, largest + tl.log(total), mask=row_ok)
        tl.store(largest_pointer + offset, largest, mask=row_ok)
        tl.store(total_pointer + offset, total, mask=row_ok)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def scatter_kernel(
    query_pointer, key_pointer, largest_pointer, total_pointer, pose_value_pointer, patches_pointer,
    importance_pointer, attention_pointer, patches_out_pointer,
    groups, group_rows, num_patches, scale,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, PATCHES_IS_KEY: tl.constexpr,
):  # fmt: skip
    """importance and attention (if asked) and patches + A U (if there is a pose value) of BLOCK_P patches."""
    parts: tl.constexpr = 1 if pose_value_pointer is None else (D + BLOCK_D - 1) // BLOCK_D
    rows = groups * group_rows
    patch_blocks = tl.cdiv(num_patches, BLOCK_P)
    program = tl.program_id(0)
    part = program % parts
    patch = (program // parts) % patch_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    sample = (program // parts // patch_blocks).to(tl.int64)
    patch_ok = patch < num_patches
    query_pointer += sample * rows * E
    key_pointer += sample * num_patches * groups * E
    largest_pointer += sample * rows
    total_pointer += sample * rows
    if PATCHES_IS_KEY:
        key = resident(key_pointer, patch, patch_ok, E, BLOCK_E, WHOLE)
    if pose_value_pointer is not None:
        pose_value_pointer += sample * rows * D
        if PATCHES_IS_KEY and WHOLE:
            updated = key.to(tl.float32)
        else:
            patches_pointer += sample * num_patches * D
            updated = tile(patches_pointer, patch, patch_ok, part * BLOCK_D, D, BLOCK_D).to(tl.float32)
    importance = tl.zeros([BLOCK_P], tl.float32)

    for group in range(0, groups):
        if not PATCHES_IS_KEY:
            key = resident(key_pointer, patch, patch_ok, E, BLOCK_E, WHOLE)
        for first in range(0, group_rows, BLOCK_R):
            in_group = first + tl.arange(0, BLOCK_R)
            row_ok = in_group < group_rows
            row = group * group_rows + in_group
            query = resident(query_pointer, row, row_ok, E, BLOCK_E, WHOLE)
            dots = product(
                key, key_pointer, patch, patch_ok, query, query_pointer, row, row_ok,
                E, CHUNK, WHOLE, PRECISION,
            )  # fmt: skip
            largest = tl.load(largest_pointer + row, mask=row_ok, other=0.0)
            total = tl.load(total_pointer + row, mask=row_ok, other=1.0)
            attention = attention_tile(dots, scale, largest, patch_ok, row_ok) / total[None, :]
            if importance_pointer is not None:
                importance += tl.sum(attention, 1)
            if attention_pointer is not None:
                tl.store(
                    attention_pointer + (sample * num_patches + patch)[:, None] * rows + row[None, :],
                    attention.to(attention_pointer.dtype.element_ty),
                    mask=patch_ok[:, None] & row_ok[None, :],
                )
            if pose_value_pointer is not None:
                pose_value = tile(pose_value_pointer, row, row_ok, part * BLOCK_D, D, BLOCK_D)
                weight = attention.to(pose_value.dtype)
                updated = tl.dot(weight, pose_value, updated, input_precision=PRECISION)
        key_pointer += num_patches * E

    if importance_pointer is not None:  # noqa: SIM102 -- a compile-time and a run-time condition
        if part == 0:
            tl.store(importance_pointer + sample * num_patches + patch, importance / rows, mask=patch_ok)
    if pose_value_pointer is not None:
        column = part * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(
            patches_out_pointer + sample * num_patches * D + patch[:, None] * D + column[None, :],
            updated.to(patches_out_pointer.dtype.element_ty),
            mask=patch_ok[:, None] & (column < D)[None, :],
        )


@triton.jit
def outside_gradient(
    grad_importance_pointer, grad_attention_pointer, patch, patch_ok, row, row_ok, rows,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """g/R + dAttention [P, R]: the part of dA that needs no product."""
    gradient = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    if grad_importance_pointer is not None:
        gradient += (tl.load(grad_importance_pointer + patch, mask=patch_ok, other=0.0) / rows)[:, None]
    if grad_attention_pointer is not None:
        mask = patch_ok[:, None] & row_ok[None, :]
        offset = patch.to(tl.int64)[:, None] * rows + row[None, :]
        gradient += tl.load(grad_attention_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    return gradient


@triton.jit
def logit_gradient(attention, gradient, delta, num_patches):
    """dS = A ∘ (dA − δ); with one patch A is 1 whatever its logit, so dS is 0 and not a rounding error."""
    return attention * tl.where(num_patches > 1, gradient - delta[None, :], 0.0)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def row_statistics_kernel(
    query_pointer, key_pointer, pose_value_pointer, context_pointer, lse_pointer,
    grad_context_pointer, grad_patches_pointer, grad_importance_pointer, grad_attention_pointer,
    delta_pointer, weight_pointer, grad_pose_value_pointer,
    groups, group_rows, num_patches, scale,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """δ (a partial sum per part of D: delta [B·R, parts]), dU = Aᵀ dX and, if asked, 1 / Σ A of BLOCK_R rows."""
    parts: tl.constexpr = 1 if grad_patches_pointer is None else (D + BLOCK_D - 1) // BLOCK_D
    rows = groups * group_rows
    row_blocks = tl.cdiv(group_rows, BLOCK_R)
    program = tl.program_id(0)
    part = program % parts
    in_group = (program // parts) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = in_group < group_rows
    sample_group = (program // parts // row_blocks).to(tl.int64)
    sample = sample_group // groups
    row = sample_group % groups * group_rows + in_group
    query_pointer += sample * rows * E
    key_pointer += sample_group * num_patches * E
    if grad_importance_pointer is not None:
        grad_importance_pointer += sample * num_patches
    if grad_attention_pointer is not None:
        grad_attention_pointer += sample * num_patches * rows
    if grad_patches_pointer is not None:
        grad_patches_pointer += sample * num_patches * D

    delta = tl.zeros([BLOCK_R], tl.float32)
    if grad_context_pointer is not None:  # noqa: SIM102 -- a compile-time and a run-time condition
        if part == 0:
            context_pointer += sample * rows * F
            grad_context_pointer += sample * rows * F
            for column in range(0, F, CHUNK):
                context = tile(context_pointer, row, row_ok, column, F, CHUNK).to(tl.float32)
                delta += tl.sum(context * tile(grad_context_pointer, row, row_ok, column, F, CHUNK), 1)

    has_outside: tl.constexpr = grad_importance_pointer is not None or grad_attention_pointer is not None
    outside_delta = tl.zeros([BLOCK_R], tl.float32)
    if has_outside or grad_patches_pointer is not None or weight_pointer is not None:
        total = tl.zeros([BLOCK_R], tl.float32)
        lse = tl.load(lse_pointer + sample * rows + row, mask=row_ok, other=0.0)
        query = resident(query_pointer, row, row_ok, E, BLOCK_E, WHOLE)
        if grad_patches_pointer is not None:
            grad_pose_value = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
        for first in range(0, num_patches, BLOCK_P):
            patch = first + tl.arange(0, BLOCK_P)
            patch_ok = patch < num_patches
            key = resident(key_pointer, patch, patch_ok, E, BLOCK_E, WHOLE)
            dots = product(
                key, key_pointer, patch, patch_ok, query, query_pointer, row, row_ok,
                E, CHUNK, WHOLE, PRECISION,
            )  # fmt: skip
            attention = attention_tile(dots, scale, lse, patch_ok, row_ok)
            if weight_pointer is not None:
                total += tl.sum(attention, 0)
            if has_outside:
                outside = outside_gradient(
                    grad_importance_pointer, grad_attention_pointer, patch, patch_ok, row, row_ok, rows,
                    BLOCK_P, BLOCK_R,
                )  # fmt: skip
                outside_delta += tl.sum(attention * outside, 0)
            if grad_patches_pointer is not None:
                grad_patches = tile(grad_patches_pointer, patch, patch_ok, part * BLOCK_D, D, BLOCK_D)
                grad_pose_value = tl.dot(
                    tl.trans(grad_patches), attention.to(grad_patches.dtype), grad_pose_value,
                    input_precision=PRECISION,
                )  # fmt: skip
        if weight_pointer is not None:
            total = tl.where(row_ok, total, 1.0)
            outside_delta = outside_delta / total
            if grad_patches_pointer is not None:
                grad_pose_value = grad_pose_value / total[None, :]
            if part == 0:
                tl.store(weight_pointer + sample * rows + row, 1.0 / total, mask=row_ok)
        if grad_patches_pointer is not None:
            column = part * BLOCK_D + tl.arange(0, BLOCK_D)
            offset = sample * rows * D + row[None, :] * D + column[:, None]
            mask = row_ok[None, :] & (column < D)[:, None]
            pose_value = tl.load(pose_value_pointer + offset, mask=mask, other=0.0)
            delta += tl.sum(pose_value * grad_pose_value, 0)
            tl.store(
                grad_pose_value_pointer + offset,
                grad_pose_value.to(grad_pose_value_pointer.dtype.element_ty),
                mask=mask,
            )
    delta += tl.where(part == 0, outside_delta, 0.0)
    tl.store(delta_pointer + (sample * rows + row) * parts + part, delta, mask=row_ok)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def row_gradients_kernel(
    query_pointer, key_pointer, value_pointer, pose_value_pointer, lse_pointer, delta_pointer, weight_pointer,
    grad_context_pointer, grad_patches_pointer, grad_importance_pointer, grad_attention_pointer,
    grad_query_pointer,
    groups, group_rows, num_patches, scale,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale · dSᵀ K of BLOCK_R rows."""
    parts: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    rows = groups * group_rows
    row_blocks = tl.cdiv(group_rows, BLOCK_R)
    program = tl.program_id(0)
    part = program % parts
    in_group = (program // parts) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = in_group < group_rows
    sample_group = (program // parts // row_blocks).to(tl.int64)
    sample = sample_group // groups
    row = sample_group % groups * group_rows + in_group
    query_pointer += sample * rows * E
    key_pointer += sample_group * num_patches * E
    if value_pointer is not None:
        value_pointer += sample_group * num_patches * F
    if grad_importance_pointer is not None:
        grad_importance_pointer += sample * num_patches
    if grad_attention_pointer is not None:
        grad_attention_pointer += sample * num_patches * rows
    lse = tl.load(lse_pointer + sample * rows + row, mask=row_ok, other=0.0)
    delta = tl.load(delta_pointer + sample * rows + row, mask=row_ok, other=0.0)
    query = resident(query_pointer, row, row_ok, E, BLOCK_E, WHOLE)
    if grad_context_pointer is not None:
        grad_context_pointer += sample * rows * F
        grad_context = resident(grad_context_pointer, row, row_ok, F, BLOCK_F, WHOLE)
    if grad_patches_pointer is not None:
        grad_patches_pointer += sample * num_patches * D
        pose_value_pointer += sample * rows * D
        pose_value = resident(pose_value_pointer, row, row_ok, D, BLOCK_D, WHOLE)

    grad_query = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    for first in range(0, num_patches, BLOCK_P):
        patch = first + tl.arange(0, BLOCK_P)
        patch_ok = patch < num_patches
        key = resident(key_pointer, patch, patch_ok, E, BLOCK_E, WHOLE)
        dots = product(
            key, key_pointer, patch, patch_ok, query, query_pointer, row, row_ok,
            E, CHUNK, WHOLE, PRECISION,
        )  # fmt: skip
        attention = attention_tile(dots, scale, lse, patch_ok, row_ok)
        if weight_pointer is not None:
            attention = attention * tl.load(weight_pointer + sample * rows + row, mask=row_ok, other=0.0)[None, :]
        gradient = outside_gradient(
            grad_importance_pointer, grad_attention_pointer, patch, patch_ok, row, row_ok, rows,
            BLOCK_P, BLOCK_R,
        )  # fmt: skip
        if grad_context_pointer is not None:
            if value_pointer is None:
                gradient += product(
                    key, key_pointer, patch, patch_ok, grad_context, grad_context_pointer, row, row_ok,
                    F, CHUNK, WHOLE, PRECISION,
                )  # fmt: skip
            else:
                value = resident(value_pointer, patch, patch_ok, F, BLOCK_F, WHOLE)
                gradient += product(
                    value, value_pointer, patch, patch_ok, grad_context, grad_context_pointer, row, row_ok,
                    F, CHUNK, WHOLE, PRECISION,
                )  # fmt: skip
        if grad_patches_pointer is not None:
            grad_patches = resident(grad_patches_pointer, patch, patch_ok, D, BLOCK_D, WHOLE)
            gradient += product(
                grad_patches, grad_patches_pointer, patch, patch_ok,
                pose_value, pose_value_pointer, row, row_ok, D, CHUNK, WHOLE, PRECISION,
            )  # fmt: skip
        grad_logits = logit_gradient(attention, gradient, delta, num_patches)
        token = key if WHOLE else tile(key_pointer, patch, patch_ok, part * BLOCK_E, E, BLOCK_E)
        grad_query = tl.dot(tl.trans(token), grad_logits.to(token.dtype), grad_query, input_precision=PRECISION)

    column = part * BLOCK_E + tl.arange(0, BLOCK_E)
    tl.store(
        grad_query_pointer + sample * rows * E + row[None, :] * E + column[:, None],
        (grad_query * scale).to(grad_query_pointer.dtype.element_ty),
        mask=row_ok[None, :] & (column < E)[:, None],
    )


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def token_gradients_kernel(
    query_pointer, key_pointer, value_pointer, pose_value_pointer, lse_pointer, delta_pointer, weight_pointer,
    grad_context_pointer, grad_patches_pointer, grad_importance_pointer, grad_attention_pointer,
    grad_key_pointer, grad_value_pointer,
    groups, group_rows, num_patches, scale,
    E: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, PATCHES_IS_KEY: tl.constexpr,
):  # fmt: skip
    """dK = scale · dS Q and dV = A dO of BLOCK_P patches; in one sum, with dX, where the tensors are one."""
    key_parts: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    value_parts: tl.constexpr = 1 if value_pointer is None else (F + BLOCK_F - 1) // BLOCK_F
    parts: tl.constexpr = key_parts if key_parts > value_parts else value_parts
    rows = groups * group_rows
    patch_blocks = tl.cdiv(num_patches, BLOCK_P)
    program = tl.program_id(0)
    part = program % parts
    patch = (program // parts) % patch_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    patch_ok = patch < num_patches
    sample_group = (program // parts // patch_blocks).to(tl.int64)
    sample = sample_group // groups
    first_row = sample_group % groups * group_rows
    query_pointer += sample * rows * E
    key_pointer += sample_group * num_patches * E
    lse_pointer += sample * rows
    delta_pointer += sample * rows
    if weight_pointer is not None:
        weight_pointer += sample * rows
    key = resident(key_pointer, patch, patch_ok, E, BLOCK_E, WHOLE)
    grad_key = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    if grad_importance_pointer is not None:
        grad_importance_pointer += sample * num_patches
    if grad_attention_pointer is not None:
        grad_attention_pointer += sample * num_patches * rows
    if grad_context_pointer is not None:
        grad_context_pointer += sample * rows * F
    if value_pointer is not None:
        value_pointer += sample_group * num_patches * F
        grad_value = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
        if grad_context_pointer is not None:
            value = resident(value_pointer, patch, patch_ok, F, BLOCK_F, WHOLE)
    if grad_patches_pointer is not None:
        grad_patches_pointer += sample * num_patches * D
        pose_value_pointer += sample * rows * D
        grad_patches = resident(grad_patches_pointer, patch, patch_ok, D, BLOCK_D, WHOLE)
        if PATCHES_IS_KEY:
            grad_key += tile(grad_patches_pointer, patch, patch_ok, part * BLOCK_E, E, BLOCK_E).to(tl.float32)

    for first in range(0, group_rows, BLOCK_R):
        in_group = first + tl.arange(0, BLOCK_R)
        row_ok = in_group < group_rows
        row = first_row + in_group
        lse = tl.load(lse_pointer + row, mask=row_ok, other=0.0)
        delta = tl.load(delta_pointer + row, mask=row_ok, other=0.0)
        query = resident(query_pointer, row, row_ok, E, BLOCK_E, WHOLE)
        dots = product(
            key, key_pointer, patch, patch_ok, query, query_pointer, row, row_ok,
            E, CHUNK, WHOLE, PRECISION,
        )  # fmt: skip
        attention = attention_tile(dots, scale, lse, patch_ok, row_ok)
        if weight_pointer is not None:
            attention = attention * tl.load(weight_pointer + row, mask=row_ok, other=0.0)[None, :]
        gradient = outside_gradient(
            grad_importance_pointer, grad_attention_pointer, patch, patch_ok, row, row_ok, rows,
            BLOCK_P, BLOCK_R,
        )  # fmt: skip
        if grad_context_pointer is not None:
            grad_context = resident(grad_context_pointer, row, row_ok, F, BLOCK_F, WHOLE)
            if value_pointer is None:
                gradient += product(
                    key, key_pointer, patch, patch_ok, grad_context, grad_context_pointer, row, row_ok,
                    F, CHUNK, WHOLE, PRECISION,
                )  # fmt: skip
            else:
                gradient += product(
                    value, value_pointer, patch, patch_ok, grad_context, grad_context_pointer, row, row_ok,
                    F, CHUNK, WHOLE, PRECISION,
                )  # fmt: skip
            if not WHOLE:
                grad_context = tile(grad_context_pointer, row, row_ok, part * BLOCK_F, F, BLOCK_F)
            weight = attention.to(grad_context.dtype)
            if value_pointer is None:
                grad_key = tl.dot(weight, grad_context, grad_key, input_precision=PRECISION)
            else:
                grad_value = tl.dot(weight, grad_context, grad_value, input_precision=PRECISION)
        if grad_patches_pointer is not None:
            pose_value = resident(pose_value_pointer, row, row_ok, D, BLOCK_D, WHOLE)
            gradient += product(
                grad_patches, grad_patches_pointer, patch, patch_ok,
                pose_value, pose_value_pointer, row, row_ok, D, CHUNK, WHOLE, PRECISION,
            )  # fmt: skip
        grad_logits = logit_gradient(attention, gradient, delta, num_patches) * scale
        if not WHOLE:
            query = tile(query_pointer, row, row_ok, part * BLOCK_E, E, BLOCK_E)
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)

    column = part * BLOCK_E + tl.arange(0, BLOCK_E)
    tl.store(
        grad_key_pointer + sample_group * num_patches * E + patch[:, None] * E + column[None, :],
        grad_key.to(grad_key_pointer.dtype.element_ty),
        mask=patch_ok[:, None] & (column < E)[None, :],
    )
    if value_pointer is not None:
        column = part * BLOCK_F + tl.arange(0, BLOCK_F)
        tl.store(
            grad_value_pointer + sample_group * num_patches * F + patch[:, None] * F + column[None, :],
            grad_value.to(grad_value_pointer.dtype.element_ty),
            mask=patch_ok[:, None] & (column < F)[None, :],
        )


def forward(
    query: Tensor,  # [B, H, J, E]
    key: Tensor,  # [B, Hk, P, E]
    value: Tensor | None,  # [B, Hk, P, F]; None: key
    pose_value: Tensor | None,  # [B, H, J, D]; None: no update of patches
    patches: Tensor | None,  # [B, P, D]; None: key
    scale: float,
    need_attention: bool,
    need_importance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """context, importance [B,P] or empty, attention [B,H,J,P] or empty, patches_out [B,P,D] or empty, lse [B,H,J]."""
    batch, heads, joints, key_width = query.shape
    groups, num_patches = key.shape[1], key.shape[2]
    rows = heads * joints
    value_width = key_width if value is None else value.shape[3]
    model_width = 1 if pose_value is None else pose_value.shape[3]
    updates = pose_value is not None
    patches_is_key = updates and patches is None
    query, key = query.contiguous(), key.contiguous()
    value = None if value is None else value.contiguous()
    pose_value = None if pose_value is None else pose_value.contiguous()
    patches = None if patches is None else patches.contiguous()

    context = query.new_empty(batch, heads, joints, value_width)
    lse = query.new_empty(batch, heads, joints, dtype=torch.float32)
    largest, total = torch.empty_like(lse), torch.empty_like(lse)  # rounds less than lse at large logits
    importance = query.new_empty((batch, num_patches) if need_importance else (0,), dtype=torch.float32)
    attention = query.new_empty((batch, num_patches, rows) if need_attention else (0,))
    patches_out = query.new_empty((batch, num_patches, model_width) if updates else (0,))
    if batch:
        work = Work(query.dtype, rows // groups, (key_width, value_width, model_width), value is None)
        sizes = (groups, rows // groups, num_patches, scale)

        def launch(plan: Plan) -> None:
            row_programs = batch * groups * triton.cdiv(rows // groups, plan.tiles.block_r)
            patch_programs = batch * triton.cdiv(num_patches, plan.tiles.block_p)
            gather_kernel[(row_programs * plan.parts(value_width),)](
                query, key, value, context, lse, largest, total, *sizes, **plan.constants, **plan.options
            )
            if need_importance or need_attention or updates:
                scatter_kernel[(patch_programs * plan.parts(model_width),)](
                    query, key, largest, total, pose_value, key if patches_is_key else patches,
                    importance if need_importance else None,
                    attention if need_attention else None, patches_out if updates else None,
                    *sizes, **plan.constants, PATCHES_IS_KEY=patches_is_key, **plan.options,
                )  # fmt: skip

        with on_device(query):
            shape = Shape(batch, groups, num_patches, (need_importance, need_attention, updates, patches_is_key))
            launch(chosen("forward", work, shape, query, launch))
    if need_attention:
        attention = attention.transpose(1, 2).unflatten(1, (heads, joints))
    return context, importance, attention, patches_out, lse


def backward(
    grad_context: Tensor | None,
    grad_patches: Tensor | None,
    grad_importance: Tensor | None,
    grad_attention: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    pose_value: Tensor | None,
    context: Tensor,
    lse: Tensor,
    scale: float,
    need_token_grads: bool,
    patches_is_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_query, grad_key, grad_value, grad_pose_value; missing gradients count as zero and cost nothing."""
    batch, heads, joints, key_width = query.shape
    groups, num_patches = key.shape[1], key.shape[2]
    rows = heads * joints
    value_width = context.shape[3]
    model_width = 1 if pose_value is None else pose_value.shape[3]
    query, key, context, lse = (tensor.contiguous() for tensor in (query, key, context, lse))
    value = None if value is None else value.contiguous()
    grad_context = None if grad_context is None else grad_context.contiguous()
    grad_importance = None if grad_importance is None else grad_importance.contiguous()
    if grad_attention is not None:
        grad_attention = grad_attention.flatten(1, 2).transpose(1, 2).contiguous()  # [B, P, R]
    grad_pose_value = query.new_empty(0)
    if pose_value is not None:
        pose_value = pose_value.contiguous()
        grad_pose_value = (torch.zeros_like if grad_patches is None else torch.empty_like)(pose_value)
    if grad_patches is not None:
        grad_patches = grad_patches.contiguous()

    grad_query = torch.empty_like(query)
    grad_key = torch.empty_like(key) if need_token_grads else key.new_empty(0)
    grad_value = key.new_empty(0) if value is None or not need_token_grads else torch.empty_like(value)
    if batch:
        work = Work(query.dtype, rows // groups, (key_width, value_width, model_width), value is None)
        sizes = (groups, rows // groups, num_patches, scale)
        incoming = (grad_context, grad_patches, grad_importance, grad_attention)
        weight = torch.empty_like(lse) if query.dtype == torch.float32 else None

        def row_programs(plan: Plan) -> int:
            return batch * groups * int(triton.cdiv(rows // groups, plan.tiles.block_r))

        def row_statistics(plan: Plan) -> Tensor:
            parts = 1 if grad_patches is None else plan.parts(model_width)
            delta = query.new_empty(batch * rows, parts, dtype=torch.float32)
            row_statistics_kernel[(row_programs(plan) * parts,)](
                query, key, pose_value, context, lse, *incoming,
                delta, weight, grad_pose_value, *sizes, **plan.constants, **plan.options,
            )  # fmt: skip
            return delta.sum(1) if parts > 1 else delta

        def row_gradients(plan: Plan) -> None:
            row_gradients_kernel[(row_programs(plan) * plan.parts(key_width),)](
                query, key, value, pose_value, lse, delta, weight, *incoming,
                grad_query, *sizes, **plan.constants, **plan.options,
            )  # fmt: skip

        def token_gradients(plan: Plan) -> None:
            patch_programs = batch * groups * triton.cdiv(num_patches, plan.tiles.block_p)
            parts = plan.parts(key_width if value is None else max(key_width, value_width))
            token_gradients_kernel[(patch_programs * parts,)](
                query, key, value, pose_value, lse, delta, weight, *incoming,
                grad_key, None if value is None else grad_value,
                *sizes, **plan.constants, PATCHES_IS_KEY=patches_is_key, **plan.options,
            )  # fmt: skip

        with on_device(query):
            shape = Shape(batch, groups, num_patches, (*(grad is None for grad in incoming), patches_is_key))
            delta = row_statistics(chosen("row_statistics", work, shape, query, row_statistics))
            row_gradients(chosen("row_gradients", work, shape, query, row_gradients))
            if need_token_grads:
                token_gradients(chosen("token_gradients", work, shape, query, token_gradients))
    return grad_query, grad_key, grad_value, grad_pose_value
