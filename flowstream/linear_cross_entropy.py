"""The weighted next-token loss from hidden states and the head, without the logits of a batch: not in training either.

Forward walks blocks of rows and, for each, slices of the vocabulary, as attention walks its keys: a running maximum,
the sum of exponentials, and the mean of the head's rows under the softmax, which is the gradient of the hidden state.
Backward walks slices and, for each, blocks of rows: a slice of the head's gradient is summed over all rows in fp32 and
rounded once. No sum is larger than a slice or a block, however large the vocabulary. The price is four matrix products
where three would do with a head's whole gradient in fp32, 2.4 GB for 256 k tokens of 2304 dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowstream.losses import Kept, keep, next_tokens

__all__ = ["weighted_linear_cross_entropy"]

_MOST_ROWS, _MOST_COLUMNS = 2048, 8192
"""Larger products are no faster: on a GPU these fill it, on a CPU smaller ones stay in its caches."""

_LIFT = 1024.0
"""Times this, the exponentials of a large vocabulary are no subnormals where fp16 multiplies them."""


def weighted_linear_cross_entropy(
    hidden: Tensor,
    head: nn.Linear | Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    denominator: str | float | Tensor = "tokens",
    softcap: float | None = None,
    scale: float = 1.0,
    max_bytes: int = 2**28,
) -> Tensor:
    """`weighted_lm_loss(head(hidden), labels, weight)` without its logits [B, T, V]: a 0-d fp32 tensor, in nats.

    hidden [B, T, D], the last hidden states, after the final norm, of any float dtype; head the `nn.Linear` to the
    vocabulary, or its weight [V, D]. labels [B, T], weight [B] or [B, T], and denominator are those of
    `weighted_lm_loss`, where the loss, Σ_i w_i Σ_t nll_it / denominator, has its source (arXiv 2502.02797). The logits
    are `scale * head(hidden)` (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`), under `softcap` c those become
    c·tanh(·/c) (Gemma 2's `final_logit_softcapping`).

    Gradients reach hidden, the head's weight and its bias, in their own dtypes, whichever require one: first ones only.
    Logits, softmax and sums are in fp32 (fp64 for fp64 tensors) also where hidden and head are in half precision, so
    the loss is more exact than from a head's own bf16 logits. Products take the dtype of the tensors, promoted to a
    common one, or on a GPU that of autocast; a CPU, which has no product from bf16 to fp32, multiplies in fp32. Only
    rows with a label and a weight other than 0 are read: what stands elsewhere cannot spoil loss or gradients.

    Memory beyond inputs and gradients: at most `max_bytes` at a time and some 100 bytes a labelled row; between forward
    and backward, the labelled rows' gradient of hidden. Time: four products of [rows, D] with [D, V] in place of three;
    two where the head is frozen (LoRA), three where hidden needs no gradient, one under `torch.no_grad()`. Chunks are
    as in "Cut Your Losses" (arXiv 2411.09009) and Liger (arXiv 2410.10989), in plain PyTorch.

    Raises ValueError for shapes, dtypes, devices and options that do not fit, for a head other than a plain linear
    layer (quantised, sharded, adapted), for a max_bytes below one row and one column, and, where labels are on the CPU,
    for labels outside the vocabulary; RuntimeError for second derivatives. Labels on a GPU cost one synchronisation;
    left on the CPU, with the weight, they cost none.

    >>> head = torch.nn.Linear(4, 7)
    >>> hidden, labels = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    >>> loss = weighted_linear_cross_entropy(hidden, head, labels, torch.tensor([0.5, 0.2]), softcap=30.0)
    >>> loss.backward()
    >>> head.weight.grad.shape, hidden.grad.shape, hidden.grad[:, -1].any()  # the last position predicts nothing
    (torch.Size([7, 4]), torch.Size([2, 3, 4]), tensor(False))
    """
    # A compiler would unroll the chunks, and again for every number of rows: it is to leave this call alone.
    loss = torch.compiler.disable(_loss) if torch.compiler.is_compiling() else _loss
    return loss(hidden, head, labels, weight, denominator, softcap, scale, max_bytes)


def _loss(
    hidden: Tensor,
    head: nn.Linear | Tensor,
    labels: Tensor,
    weight: Tensor,
    denominator: str | float | Tensor,
    softcap: float | None,
    scale: float,
    max_bytes: int,
) -> Tensor:
    matrix, bias = _parameters(head)
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or hidden.shape[-1] != matrix.shape[-1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, labels {list(labels.shape)} and the head's weight "
            f"{list(matrix.shape)}; give [B, T, D], [B, T] and [V, D]"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has dtype {hidden.dtype}; give the last hidden states, of a float dtype")
    if hidden.device != matrix.device:
        raise ValueError(f"hidden is on {hidden.device} and the head on {matrix.device}; move one to the other")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap {softcap}; give a finite number above 0, or None for logits without a cap")
    if not math.isfinite(scale):
        raise ValueError(f"scale {scale}; give a finite number, 1.0 for logits as they are")
    following, weights = next_tokens(labels, weight)
    kept = keep(following, weights, denominator, len(matrix), hidden)
    plan = _plan(hidden, matrix, len(kept.index), softcap, scale, max_bytes)
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return cast(Tensor, _LinearCrossEntropy.apply(hidden, matrix, bias, kept, plan, wanted))


def _parameters(head: nn.Linear | Tensor) -> tuple[Tensor, Tensor | None]:
    """The head's weight [V, D] and bias [V]."""
    remedy = "give a torch.nn.Linear or its weight [V, D], or weighted_lm_loss the logits"
    if isinstance(head, nn.Linear):
        # A subclass with a forward of its own (bitsandbytes, fp8) computes something else than its weight says.
        if type(head).forward is not nn.Linear.forward:
            raise ValueError(
                f"the head is a {type(head).__name__}, quantised or otherwise with a forward of its own; {remedy} "
                "(dequantised, where it is frozen)"
            )
        matrix, bias = head.weight, head.bias
    elif isinstance(head, Tensor):
        matrix, bias = head, None
    else:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(f"the head is a {kind}; {remedy} (of an adapted head, with its adapter merged)")
    if type(matrix) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"the head's weight is a {type(matrix).__name__}, sharded or quantised; {remedy} (gathered, "
            "as by `full_tensor()`, or dequantised)"
        )
    if matrix.ndim != 2 or not matrix.is_floating_point() or matrix.is_meta:
        raise ValueError(
            f"the head's weight has shape {list(matrix.shape)} and dtype {matrix.dtype} on {matrix.device}; {remedy}, "
            "floating, and gathered or loaded where it is elsewhere"
        )
    return matrix, bias


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How logits are made from rows and columns, and how many of each at a time."""

    softcap: float | None
    scale: float
    operand: torch.dtype
    """What products multiply."""
    wide: torch.dtype
    """What they sum to, and what softmax and losses are in."""
    rows: list[slice]
    columns: list[slice]


def _plan(hidden: Tensor, matrix: Tensor, num_rows: int, softcap: float | None, scale: float, max_bytes: int) -> _Plan:
    """Blocks of rows and slices of the vocabulary such that what either pass holds stays within `max_bytes`."""
    narrow = torch.promote_types(hidden.dtype, matrix.dtype)
    wide = torch.promote_types(narrow, torch.float32)
    if not hidden.is_cuda:
        narrow = wide
    elif torch.is_autocast_enabled("cuda") and wide == torch.float32:
        narrow = torch.get_autocast_dtype("cuda")
    num_columns, width = matrix.shape
    # Logits, their softcap's slope, and a copy for the product; a row, its cast, its label's, their sums and a product.
    a_logit = wide.itemsize * (1 if softcap is None else 2) + narrow.itemsize * (narrow != wide)
    a_row = width * (hidden.dtype.itemsize + matrix.dtype.itemsize + 2 * narrow.itemsize + 3 * wide.itemsize) + 64
    a_column = width * (narrow.itemsize + 2 * wide.itemsize) + 64
    rows = min(max(num_rows, 1), _MOST_ROWS)
    # Long slices: the sums of a block are scaled once a slice, and a GPU's products want both sides large.
    while (columns := (max_bytes - rows * a_row) // (rows * a_logit + a_column)) < min(num_columns, 2 * rows):
        if rows == 1:
            break
        rows = math.ceil(rows / 2)
    if columns < 1:
        least = a_row + a_logit + a_column
        raise ValueError(f"max_bytes {max_bytes} is too small for one row and one column; give {least} or more")
    rows = math.ceil(num_rows / math.ceil(num_rows / rows)) if num_rows else rows  # blocks alike, no short last one
    columns = min(columns, num_columns, _MOST_COLUMNS)
    if columns > 64:
        columns -= columns % 64  # aligned, as tensor cores like it
    return _Plan(
        softcap=softcap,
        scale=scale,
        operand=narrow,
        wide=wide,
        rows=_slices(num_rows, rows),
        columns=_slices(num_columns, columns),
    )


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor | None, kept: Kept, plan: _Plan, wanted: bool
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            nll, shift, pull, norm = _walk_rows(hidden, matrix, bias, kept, plan, wanted)
            loss = (kept.weight.to(plan.wide) * nll).sum() / kept.divisor
        matrix_wanted = ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2])
        ctx.kept, ctx.plan, ctx.shape, ctx.dtype = kept, plan, hidden.shape, hidden.dtype
        ctx.save_for_backward(nll, shift, pull, norm, *((hidden, matrix, bias) if matrix_wanted else (None,) * 3))
        return loss.float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # these gradients would be constants to whoever differentiates them
            raise RuntimeError(
                "weighted_linear_cross_entropy can be differentiated once, not with create_graph=True: for second "
                "derivatives give weighted_lm_loss the logits"
            )
        nll, shift, pull, norm, hidden, matrix, bias = ctx.saved_tensors
        kept, plan = ctx.kept, ctx.plan
        factor = upstream.to(plan.wide) * plan.scale / kept.divisor
        grad_hidden = grad_matrix = grad_bias = None
        with torch.autocast(upstream.device.type, enabled=False):
            if pull is not None and ctx.needs_input_grad[0]:
                grad_hidden = torch.zeros(ctx.shape, dtype=ctx.dtype, device=pull.device)
                flat = grad_hidden.flatten(0, 1)
                for rows in plan.rows:
                    by_row = kept.weight[rows] * norm[rows] * factor
                    flat[kept.index[rows]] = (pull[rows] * by_row[:, None]).to(ctx.dtype)
            if matrix is not None:
                grad_matrix, grad_bias = _walk_columns(hidden, matrix, bias, kept, plan, nll, shift, factor)
        return grad_hidden, grad_matrix, grad_bias, None, None, None


def _walk_rows(
    hidden: Tensor, matrix: Tensor, bias: Tensor | None, kept: Kept, plan: _Plan, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """nll [n] and logsumexp [n]; if `wanted`, d nll / d hidden / scale, as [n, D] of hidden's dtype times [n].

    Each row has a largest entry of 1 there, lest fp16 lose it before the upstream gradient scales it.
    """
    num = len(kept.index)
    nll, total = hidden.new_empty(num, dtype=plan.wide), hidden.new_empty(num, dtype=plan.wide)
    pull = hidden.new_empty(num, hidden.shape[-1]) if wanted else None
    norm = torch.empty_like(nll) if wanted else None
    smallest = torch.finfo(plan.wide).tiny
    for rows in plan.rows:
        entries, targets = _read(hidden, kept.index[rows]).to(plan.operand), kept.target[rows]
        peak = hidden.new_full((len(targets), 1), torch.finfo(plan.wide).min, dtype=plan.wide)
        mass = torch.zeros_like(peak)
        logit, slope = torch.full_like(peak, math.nan), torch.ones_like(peak)
        mean = hidden.new_zeros(entries.shape, dtype=plan.wide) if wanted else None
        for columns in plan.columns:
            part = matrix[columns].to(plan.operand)
            logits, slopes = _logits(entries, part, bias, columns, plan, sloped=wanted)
            where, inside = _locate(targets, columns)
            logit = torch.where(inside, logits.gather(1, where), logit)
            # Not below the smallest number, for a slice of logits that are all -inf.
            higher = torch.maximum(peak, logits.amax(1, keepdim=True))
            faded = (peak - higher).exp_()
            exponentials = logits.sub_(higher - math.log(_LIFT)).exp_()
            mass = mass * faded + exponentials.sum(1, keepdim=True)
            peak = higher
            if mean is not None:
                if slopes is not None:
                    slope = torch.where(inside, slopes.gather(1, where), slope)
                    exponentials.mul_(slopes)
                # The label's own share comes last, as p - 1 without cancellation: half precision would lose it.
                _put(exponentials, where, inside, torch.zeros_like(logit))
                _add_product(mean.mul_(faded), exponentials, part, plan)
            del part, logits, exponentials, slopes  # before the next are made, not after
        every = peak - math.log(_LIFT) + mass.log()
        nll[rows], total[rows] = (every - logit).squeeze(1), every.squeeze(1)
        if mean is not None and pull is not None and norm is not None:
            own = matrix.index_select(0, targets).to(plan.wide)
            mean.div_(mass).add_(own.mul_((logit - every).expm1_() * slope))
            largest = torch.linalg.vector_norm(mean, ord=math.inf, dim=1, keepdim=True).clamp_(min=smallest)
            pull[rows], norm[rows] = mean.div_(largest), largest.squeeze(1)
            del own
        del entries, mean
    return nll, total, pull, norm


def _walk_columns(
    hidden: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    kept: Kept,
    plan: _Plan,
    nll: Tensor,
    total: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the head's weight and bias: factor · Σ_i weight_i d nll_i."""
    grad = torch.zeros_like(matrix)
    grad_bias = None if bias is None else torch.zeros_like(bias)
    if not plan.rows:
        return grad, grad_bias
    weight = kept.weight.to(plan.wide)
    largest = weight.abs().amax()
    # The size of a weight goes into the exponent and its sign to the rows, which spares a pass over the logits.
    lift, sign = weight.abs() / largest * _LIFT, weight.sign()[:, None]
    shift, own, amount = (total - lift.log())[:, None], (lift * torch.expm1(-nll))[:, None], factor * largest / _LIFT
    for columns in plan.columns:
        part = matrix[columns].to(plan.operand)
        place = grad[columns]
        sums = place if grad.dtype == plan.wide else torch.zeros_like(place, dtype=plan.wide)
        bias_sums = sums.new_zeros(len(part))
        for rows in plan.rows:
            entries = _read(hidden, kept.index[rows]).to(plan.operand)
            logits, slopes = _logits(entries, part, bias, columns, plan, sloped=True)
            push = logits.sub_(shift[rows]).exp_()
            _put(push, *_locate(kept.target[rows], columns), own[rows])
            if slopes is not None:
                push.mul_(slopes)
            if grad_bias is not None:
                bias_sums.add_((sign[rows].T @ push)[0])
            _add_product(sums, push.T, entries * sign[rows].to(entries.dtype), plan)
            del entries, logits, push, slopes
        place.copy_(sums.mul_(amount))
        if grad_bias is not None:
            grad_bias[columns] = bias_sums * amount
        del part, place, sums
    return grad, grad_bias


def _logits(
    entries: Tensor, part: Tensor, bias: Tensor | None, columns: slice, plan: _Plan, *, sloped: bool
) -> tuple[Tensor, Tensor | None]:
    """The logits of a block of rows and a slice of the vocabulary; with a softcap, its derivative there as well."""
    if plan.operand == plan.wide:
        logits = entries @ part.T
    else:
        logits = torch.mm(entries, part.T, out_dtype=plan.wide)
    if bias is not None:
        logits.add_(bias[columns])
    if plan.softcap is None:
        return logits if plan.scale == 1 else logits.mul_(plan.scale), None
    logits.mul_(plan.scale / plan.softcap).tanh_()
    slopes = torch.square(logits).neg_().add_(1) if sloped else None
    return logits.mul_(plan.softcap), slopes


def _read(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, T, D] by position in [B, T], however it lies in memory: flattening could copy it all."""
    return hidden[index // hidden.shape[1], index % hidden.shape[1]]


def _locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each row's label is within a slice, [n, 1], and whether it is: without the synchronisation of a mask."""
    offset = (targets - columns.start)[:, None]
    num = columns.stop - columns.start
    return offset.clamp(0, num - 1), (offset >= 0) & (offset < num)


def _put(entries: Tensor, where: Tensor, inside: Tensor, value: Tensor) -> None:
    entries.scatter_(1, where, torch.where(inside, value, entries.gather(1, where)))


def _add_product(sums: Tensor, left: Tensor, right: Tensor, plan: _Plan) -> None:
    if plan.operand == plan.wide:
        sums.addmm_(left, right)
    else:
        sums.add_(torch.mm(left.to(plan.operand), right, out_dtype=plan.wide))
